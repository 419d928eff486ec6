"""The first principal component of the cells: what most of the activations have in common."""

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.types import Features, Maps

Cells = Float[Tensor, "b n c"]


def first_component(features: Features) -> Maps:
    """Every cell's coordinate along the first right singular vector of its image's (cells, channels) matrix.

    Taken through the Gram matrix of the cells or of the channels, whichever are fewer. Signs are chosen so that cells
    of much energy are positive.
    """
    b, c, *yx = features.shape
    cells = features.flatten(2).transpose(1, 2).double()
    if cells.shape[1] <= c:
        component = first_eigenvector(cells @ cells.transpose(1, 2))
    else:
        direction = torch.nn.functional.normalize(first_eigenvector(cells.transpose(1, 2) @ cells), dim=1, eps=1e-300)
        component = (cells @ direction[..., None])[..., 0]
    return oriented(component, cells).reshape(b, *yx).to(features.dtype)


def signed_component(products: Features) -> Maps:
    """The first component of what sums to a map over its channels, with the sign on which the two agree most."""
    component = first_component(products)
    against = (component * products.sum(1)).flatten(1).sum(1) < 0
    return torch.einsum("b...,b->b...", component, torch.where(against, -1.0, 1.0).to(component))


def first_eigenvector(gram: Float[Tensor, "b n n"], scale: Float[Tensor, "b"] | None = None) -> Float[Tensor, "b n"]:
    """The first eigenvector of a Gram matrix times the root of its eigenvalue.

    Eigenvalues that are rounding errors of ``scale``, by default of the trace, count as 0.
    """
    values, vectors = torch.linalg.eigh(gram)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) if scale is None else scale
    value = torch.where(values[:, -1] > 1e-12 * scale, values[:, -1], 0)
    vector: Tensor = vectors[:, :, -1] * value.sqrt()[:, None]
    return vector


def oriented(component: Float[Tensor, "b n"], cells: Cells) -> Float[Tensor, "b n"]:
    """A component with the sign on which cells of much energy are positive."""
    energy = cells.square().sum(2)
    energy = energy - energy.amin(1, keepdim=True)
    against: Tensor = (component * energy).sum(1, keepdim=True) < 0
    return torch.where(against, -component, component)
