"""The first principal component of the cells: what most of the activations have in common."""

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.types import Features, Maps


def first_component(features: Features) -> Maps:
    """Every cell's coordinate along the first right singular vector of its image's (cells, channels) matrix.

    Taken through the Gram matrix of the cells, of which there are far fewer than channels: its first eigenvector
    times the root of the eigenvalue. Signs are chosen so that cells of much energy are positive.
    """
    b, _, *yx = features.shape
    cells = features.flatten(2).transpose(1, 2).double()
    return oriented(cells @ cells.transpose(1, 2), cells).reshape(b, *yx).to(features.dtype)


def signed_component(products: Features) -> Maps:
    """The first component of what sums to a map over its channels, with the sign on which the two agree most."""
    component = first_component(products)
    against = (component * products.sum(1)).flatten(1).sum(1) < 0
    return torch.einsum("b...,b->b...", component, torch.where(against, -1.0, 1.0).to(component))


def oriented(gram: Float[Tensor, "b n n"], cells: Float[Tensor, "b n c"], scale: Tensor | None = None) -> Tensor:
    """The first eigenvector of a Gram matrix times the root of its eigenvalue, (b n), with its sign chosen.

    Eigenvalues that are rounding errors of ``scale``, by default of the trace, count as 0.
    """
    values, vectors = torch.linalg.eigh(gram)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) if scale is None else scale
    value = torch.where(values[:, -1] > 1e-12 * scale, values[:, -1], 0)
    component = vectors[:, :, -1] * value.sqrt()[:, None]
    energy = cells.square().sum(2)
    energy = energy - energy.amin(1, keepdim=True)
    against: Tensor = (component * energy).sum(1, keepdim=True) < 0
    return torch.where(against, -component, component)
