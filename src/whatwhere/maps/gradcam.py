"""Grad-CAM: channels weighted by their mean gradient."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def gradcam(trace: Trace, score: Score) -> Weights:
    """Grad-CAM: channels weighted by their mean gradient (Selvaraju et al., ICCV 2017).

    Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra: Visual Explanations from Deep Networks via
    Gradient-based Localization.

    ``a_c = mean_yx dS / dA_c(y, x)`` (eq. 1) and ``M = sum_c a_c A_c`` (eq. 2, before its ReLU, which is
    ``positive``). On a network of global average pooling and a linear layer, CAM divided by the number of
    cells. Where what decides has weights of its own for every cell, as of a classifier of pixels or of HOG, each
    activation is a channel of one cell, and the map is HiResCAM's.
    """
    gradient = trace.gradient(score)
    return gradient if trace.net.positional else gradient.flatten(2).mean(2)
