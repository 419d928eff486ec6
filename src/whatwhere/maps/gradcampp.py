"""Grad-CAM++: gradients weighted cell by cell."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def gradcampp(trace: Trace, score: Score) -> Weights:
    """Grad-CAM++: positive gradients weighted cell by cell, then summed (Chattopadhay et al., WACV 2018).

    Chattopadhay, Sarkar, Howlader, Balasubramanian: Grad-CAM++, Generalized Gradient-Based
    Visual Explanations for Deep Convolutional Networks.

    With ``g = dS / dA_c(y, x)`` and the class score taken as ``exp(S)``, whose higher derivatives are powers of g:
    ``alpha = g^2 / (2 g^2 + g^3 sum_yx A_c)`` (eq. 19), 0 where the denominator is not positive; ``w_c = sum_yx alpha
    relu(g)`` (eq. 5) and ``M = sum_c w_c A_c``. The factor ``exp(S)``, one for the whole map, is left out: it
    says nothing about where, and overflows.
    """
    gradient, features = trace.gradient(score).flatten(2), trace.features.detach().flatten(2)
    # g^2 cancels; what is left of the fraction is 1 / (2 + g sum A), for g != 0
    denominator = 2 + gradient * features.sum(2, keepdim=True)
    usable = (gradient != 0) & (denominator > 0)  # features below 0, which the paper's networks have not
    alpha = torch.where(usable, 1 / torch.where(usable, denominator, 1), 0)
    return (alpha * gradient.relu()).sum(2)
