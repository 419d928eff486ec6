"""Element-wise Grad-CAM: only what speaks for the score, cell by cell."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def gradcam_elementwise(trace: Trace, score: Score) -> Weights:
    """Element-wise Grad-CAM: as HiResCAM, each channel's negative part left out before the sum.

    As pytorch-grad-cam's ``GradCAMElementWise`` (Gildenblat et al.):
    ``M(y, x) = sum_c relu(dS / dA_c(y, x) A_c(y, x))``.
    """
    gradient = trace.gradient(score)
    return gradient * (gradient * trace.features.detach() > 0)
