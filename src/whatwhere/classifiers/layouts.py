"""What a layer returns -> a grid (b c y x) of features, and back: channels last and tokens end here."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import modules_of
from whatwhere.types import Extent, Size

MAX_PREFIX = 16
"""Class, distillation and register tokens that may stand before the patches."""


class NoGridError(ValueError):
    """A layer's output has no rows and columns."""


def first_tensor(output: Any) -> Tensor:
    """The features in what a layer returns: the tensor itself or the first of a tuple.

    Raises:
        NoGridError: there is none.
    """
    found = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(found, Tensor):
        return found
    raise NoGridError(f"its output is a {type(output).__name__} without a tensor in front")


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """What a layer returned, with its features replaced."""
    if isinstance(output, Tensor):
        return tensor
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: tensor})
    return type(output)((tensor, *output[1:]))


def normalized_widths(network: nn.Module) -> frozenset[int]:
    """How many channels the network's layer norms take: those that may stand last."""
    norms = (module for module in modules_of(network) if isinstance(module, nn.LayerNorm))
    return frozenset(norm.normalized_shape[-1] for norm in norms)


def as_grid(output: Tensor, size: Extent, widths: frozenset[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A layer's output as (b c *yx), and the way back into its own layout; it may bring back more images than came.

    Takes (b c y x), (b y x c) where the network normalizes so many channels as stand last, and tokens (b n c) with up
    to 16 prefix tokens before the patches. Where both of the first two would do, the input's aspect ratio decides.
    Of volumes, (b c z y x) alone.

    Args:
        output: what the layer gave.
        size: (h, w) or (z, h, w) of the network's input.
        widths: from ``normalized_widths``.

    Raises:
        NoGridError: it is none of these.
    """
    if len(size) == 3:
        if output.ndim == 5:
            return output, lambda grid: grid
        raise NoGridError(f"its output has shape {tuple(output.shape)}, of volumes it is (b c z y x)")
    size = size[0], size[1]
    if output.ndim == 4:
        fits_last = output.shape[3] in widths and _fits(output.shape[1:3], size)
        if fits_last and not _fits(output.shape[2:4], size):
            return output.permute(0, 3, 1, 2), lambda grid: grid.permute(0, 2, 3, 1)
        return output, lambda grid: grid
    if output.ndim == 3:
        b, n, c = output.shape
        fitting = (p for p in range(min(MAX_PREFIX, n - 1) + 1) if math.prod(_grid_of(n - p, size)) == n - p)
        prefix = next(fitting, None)
        if prefix is not None:
            front, (y, x) = output[:, :prefix], _grid_of(n - prefix, size)
            tokens = output[:, prefix:].transpose(1, 2).reshape(b, c, y, x)
            return tokens, lambda grid: torch.cat([_as_many(front, grid), grid.flatten(2).transpose(1, 2)], 1)
        raise NoGridError(f"{n} tokens are no grid for an input of {size[0]} x {size[1]}")
    raise NoGridError(f"its output has shape {tuple(output.shape)}")


def _as_many(tokens: Tensor, grid: Tensor) -> Tensor:
    """The tokens of one image for each of its variants."""
    return tokens if len(tokens) == len(grid) else tokens.expand(len(grid), -1, -1)


def _grid_of(cells: int, size: Extent) -> Size:
    """The grid of about so many square cells over an input of (h, w)."""
    step = (size[0] * size[1] / cells) ** 0.5
    return max(1, round(size[0] / step)), max(1, round(size[1] / step))


def _fits(grid: Iterable[int], size: Extent) -> bool:
    y, x = grid
    return (y, x) == _grid_of(y * x, size)
