"""HiResCAM: gradient times activation, cell by cell."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def hirescam(trace: Trace, score: Score) -> Weights:
    """HiResCAM: gradient times activation, cell by cell, summed over channels (Draelos & Carin 2020).

    Draelos, Carin: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks.
    ``M(y, x) = sum_c dS / dA_c(y, x) A_c(y, x)``, before the ReLU, which is ``positive``. Where the head is linear,
    the map sums to the score less its bias.
    """
    return trace.gradient(score)
