"""Eigen-CAM and Eigen-Grad-CAM: the first principal component."""

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.components import first_component, signed_component
from whatwhere.types import Maps, Score


def eigencam(trace: Trace, score: Score) -> Maps:
    """Eigen-CAM: the features' first principal component, the same for every class (Muhammad & Yeasin, IJCNN 2020).

    Muhammad, Yeasin: Eigen-CAM, Class Activation Map using Principal Components. With the features as a matrix
    ``A = U S V'`` of cells by channels: ``M = A v_1`` (eq. 5), not centred, as in the paper. The sign of ``v_1`` is
    chosen so that cells of much energy are positive. The score is not read.
    """
    return first_component(trace.features.detach())


def eigengradcam(trace: Trace, score: Score) -> Maps:
    """Eigen-Grad-CAM: the first principal component of gradient times activation, so of one class.

    As pytorch-grad-cam's ``EigenGradCAM`` (Gildenblat et al.), without its centring: Eigen-CAM of
    ``dS / dA_c(y, x) A_c(y, x)``. Its sign is that of HiResCAM where the two agree most.
    """
    return signed_component(trace.gradient(score) * trace.features.detach())
