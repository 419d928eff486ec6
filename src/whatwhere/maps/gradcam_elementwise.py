"""Element-wise Grad-CAM: only what speaks for the score, cell by cell."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.types import Maps, Score


def gradcam_elementwise(trace: Trace, score: Score) -> Maps:
    """Element-wise Grad-CAM: as HiResCAM, each channel's negative part left out before the sum.

    As pytorch-grad-cam's ``GradCAMElementWise`` (Gildenblat et al.):
    ``M(y, x) = sum_c relu(dS / dA_c(y, x) A_c(y, x))``.
    """
    return (trace.gradient(score) * trace.features.detach()).relu().sum(1)
