"""Shapley-CAM: gradients corrected by the curvature."""

from torch.nn.attention import SDPBackend, sdpa_kernel

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def shapleycam(trace: Trace, score: Score) -> Weights:
    """Shapley-CAM: Grad-CAM with second-order weights, the Shapley values of a quadratic (Cai 2025).

    Cai: CAMs as Shapley Value-based Explainers. With the Hessian ``H`` of the score in the features,
    ``w_c = mean_yx (g - 1/2 H A)_c(y, x)`` and ``M = sum_c w_c A_c``. Where the head is piecewise linear, Grad-CAM.
    """
    try:
        gradient, curved = trace.gradient_and_curvature(score)
    except RuntimeError:  # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            trace = trace.net.trace(trace.images)
        gradient, curved = trace.gradient_and_curvature(score)
    return (gradient - curved / 2).flatten(2).mean(2)
