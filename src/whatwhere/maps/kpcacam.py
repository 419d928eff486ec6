"""KPCA-CAM: the first component of a kernel principal component analysis."""

import math

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import UnsupportedError
from whatwhere.maps.components import first_eigenvector, oriented
from whatwhere.types import Maps, Score

MOST_CELLS = 8192


def kpcacam(trace: Trace, score: Score, *, gamma: float | None = None) -> Maps:
    """KPCA-CAM: Eigen-CAM with a kernel between the cells instead of their products (Karmani et al. 2024).

    Karmani, Sivakaran, Prasad, Ali, Yang, Tang: KPCA-CAM, Visual Explainability of Deep Computer Vision Models using
    Kernel PCA. With the features centred over the cells and the sigmoid kernel
    ``K_ij = tanh(gamma a_i . a_j + 1)``, centred in its own space, ``M`` is its first eigenvector times the root of
    the eigenvalue; equal to scikit-learn's ``KernelPCA``, with the sign of Eigen-CAM. The score is not read.

    Args:
        trace: what the network saw.
        score: not read; the map is the same for every class.
        gamma: of the kernel; 1 / channels by default.

    Raises:
        UnsupportedError: a grid of more than 8192 cells, whose kernel would take over half a gigabyte an image.
    """
    b, c, *yx = trace.features.shape
    if math.prod(yx) > MOST_CELLS:
        raise UnsupportedError(
            f"kpcacam compares every cell with every other, and {trace.net.name} has {math.prod(yx)} of them here; "
            f"it takes up to {MOST_CELLS}: use a deeper layer, or eigencam"
        )
    cells = trace.features.detach().flatten(2).transpose(1, 2).double()
    centred = cells - cells.mean(1, keepdim=True)
    kernel = ((centred @ centred.transpose(1, 2)) * (1 / c if gamma is None else gamma) + 1).tanh()
    rows, columns = kernel.mean(1, keepdim=True), kernel.mean(2, keepdim=True)
    scale = kernel.diagonal(dim1=1, dim2=2).sum(1)
    component = first_eigenvector(kernel - rows - columns + rows.mean(2, keepdim=True), scale)
    return oriented(component, cells).reshape(b, *yx).to(trace.features.dtype)
