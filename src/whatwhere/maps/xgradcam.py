"""XGrad-CAM: gradients weighted by where the channel is active."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.shape import weighted_sum
from whatwhere.types import Maps, Score


def xgradcam(trace: Trace, score: Score) -> Maps:
    """XGrad-CAM: gradients averaged with the activations as weights (Fu et al., BMVC 2020).

    Fu, Hu, Dong, Guo, Gao, Li: Axiom-based Grad-CAM. ``w_c = sum_yx (A_c(y, x) / sum A_c) dS / dA_c(y, x)`` (eq. 8)
    and ``M = sum_c w_c A_c``; a channel whose activations sum to 0 has weight 0.
    """
    features = trace.features.detach()
    total = features.sum((-2, -1))
    weighted = (trace.gradient(score) * features).sum((-2, -1))
    return weighted_sum(features, torch.where(total == 0, 0, weighted / torch.where(total == 0, 1, total)))
