"""What the classics share: how a picture falls into cells, and how it comes to libraries that take arrays."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.errors import UnsupportedError
from whatwhere.types import Extent, Images, Size

Sees = tuple[tuple[float, float], Size, tuple[float, float]]
"""Size, step and start of what the cells of a grid see, in pixels, of what counts with libraries."""


def cells_in(size: Extent, cell: int, what: str) -> Size:
    """(y, x) of the square cells of so many pixels in a picture of (h, w).

    Raises:
        UnsupportedError: fewer than two, or the last ones would be cut off; says what a picture's size must be.
    """
    h, w = size[-2:]
    if cell < 1 or len(size) != 2 or h % cell or w % cell or (h // cell) * (w // cell) < 2:
        raise UnsupportedError(
            f"{what} wants pictures whose sides are multiples of {cell} pixels, two cells at least, got "
            f"{' x '.join(map(str, size))}; set size, or cells of another"
        )
    return h // cell, w // cell


def pixels_of(images: Images) -> list[Float[np.ndarray, "h w 3"]]:
    """Each picture of a batch as an array of RGB in [0, 1], for libraries; no gradient comes back from there."""
    return [image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).contiguous().numpy() for image in images]


def stacked(grids: list[Float[Tensor, "c y x"]], like: Images) -> Float[Tensor, "b c y x"]:
    """The grids of a batch, one after another made, so that none depends on the others; as the images are."""
    return torch.stack(grids).to(like)
