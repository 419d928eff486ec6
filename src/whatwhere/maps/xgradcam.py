"""XGrad-CAM: gradients weighted by where the channel is active."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def xgradcam(trace: Trace, score: Score) -> Weights:
    """XGrad-CAM: gradients averaged with the activations as weights (Fu et al., BMVC 2020).

    Fu, Hu, Dong, Guo, Gao, Li: Axiom-based Grad-CAM. ``w_c = sum_yx (A_c(y, x) / sum A_c) dS / dA_c(y, x)`` (eq. 8)
    and ``M = sum_c w_c A_c``; a channel whose activations sum to 0 has weight 0.
    """
    features = trace.features.detach()
    total = features.flatten(2).sum(2)
    weighted = (trace.gradient(score) * features).flatten(2).sum(2)
    return torch.where(total == 0, 0, weighted / torch.where(total == 0, 1, total))
