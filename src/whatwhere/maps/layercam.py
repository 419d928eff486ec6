"""Layer-CAM: every cell weighted by its own positive gradient."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def layercam(trace: Trace, score: Score) -> Weights:
    """Layer-CAM: every cell weighted by its own positive gradient (Jiang et al., TIP 2021).

    Jiang, Zhang, Hou, Cheng, Wei: LayerCAM, Exploring Hierarchical Class Activation Maps for Localization.

    ``M(y, x) = sum_c relu(dS / dA_c(y, x)) A_c(y, x)`` (eqs. 6 to 8, before the last ReLU, which is ``positive``).
    Made for shallow layers too, where a channel's gradient changes sign over the image.
    """
    return trace.gradient(score).relu()
