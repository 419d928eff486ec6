"""HiResCAM: gradient times activation, cell by cell."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.types import Maps, Score


def hirescam(trace: Trace, score: Score) -> Maps:
    """HiResCAM: gradient times activation, cell by cell, summed over channels (Draelos & Carin 2020).

    Draelos, Carin: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks.
    ``M(y, x) = sum_c dS / dA_c(y, x) A_c(y, x)``, before the ReLU, which is ``positive``. Where the head is linear,
    the map sums to the score less its bias.
    """
    return (trace.gradient(score) * trace.features.detach()).sum(1)
