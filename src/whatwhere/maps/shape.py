"""From a raw map, three visible steps to something to look at: positive, unit, upsample.

Their order is the caller's, because published numbers depend on it; ``explain`` takes them in this one.
Resizing is linear and separable, so a map is brought to any window of any grid by a small matrix an axis,
exactly, and at the cost of the pixels that come out.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.classifier import full_precision
from whatwhere.geometry import Frame
from whatwhere.types import Extent, Maps

Interpolation = Literal["bilinear", "bicubic"]


def positive(maps: Maps) -> Maps:
    """What speaks for the score: max(map, 0). The ReLU of Grad-CAM (Selvaraju et al. 2017, eq. 2)."""
    return maps.clamp(min=0)


def unit(maps: Maps) -> Maps:
    """Each map scaled to [0, 1] by its own minimum and maximum; a constant map becomes zeros.

    Constant is what varies by no more than rounding. Where there is nan in a map, all of it becomes nan.
    """
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    span = high - low
    varies = span > 8 * torch.finfo(maps.dtype).eps * torch.maximum(high.abs(), low.abs())
    scaled = torch.where(varies, (maps - low) / span.where(varies, torch.ones_like(span)), 0)
    return torch.where(span.isnan(), span, scaled)


def upsample(maps: Maps, size: Extent, interpolation: Interpolation = "bilinear") -> Float[Tensor, "b *hw"]:
    """Maps brought to (h, w), or of volumes to (z, h, w), cells taken as areas (``align_corners=False``).

    Equals ``torch.nn.functional.interpolate`` of that mode, for growing; shrinking is not antialiased.
    """
    return _resample(maps, [(0, pixels, pixels) for pixels in size], interpolation)


def to_original(maps: Maps, frame: Frame, interpolation: Interpolation = "bilinear") -> Float[Tensor, "b H W"]:
    """Maps of the network's input brought to the pixels of the original image, through its frame.

    Pixels that the network did not see are 0.
    """
    sx, sy = frame.scale
    # where the network's whole input, padding and all, would lie in the original
    x0, y0 = frame.seen.x0 - frame.placed.x0 / sx, frame.seen.y0 - frame.placed.y0 / sy
    H, W = frame.original
    rows_of, columns_of = (y0, y0 + frame.network[0] / sy, H), (x0, x0 + frame.network[1] / sx, W)
    out = _resample(maps, [rows_of, columns_of], interpolation)
    rows = _inside(H, frame.seen.y0, frame.seen.y1).to(out)
    columns = _inside(W, frame.seen.x0, frame.seen.x1).to(out)
    return out if bool(rows.all() and columns.all()) else out * rows[:, None] * columns


def _resample(maps: Tensor, axes: Sequence[tuple[float, float, int]], interpolation: Interpolation) -> Tensor:
    """Values at pixel centres, for maps spread on each axis from a start to a stop of that many pixels."""
    with full_precision(maps):
        for axis, (start, stop, pixels) in enumerate(axes, 1):
            taps = _taps(maps.shape[axis], pixels, start, stop, interpolation).to(maps)
            maps = maps @ taps.T if axis == len(axes) else (taps @ maps.movedim(axis, -2)).movedim(-2, axis)
    return maps


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _taps(cells: int, pixels: int, start: float, stop: float, interpolation: Interpolation) -> Tensor:
    """(pixels, cells): the weight of every cell in every pixel along one axis; edges are repeated."""
    centres = torch.arange(pixels, dtype=torch.float64) + 0.5
    at = (centres - start) * (cells / (stop - start)) - 0.5
    base = at.floor()
    offsets = torch.arange(-1, 3) if interpolation == "bicubic" else torch.arange(0, 2)
    distance = (at[:, None] - base[:, None] - offsets).abs()
    weight = _keys(distance) if interpolation == "bicubic" else 1 - distance
    index = (base[:, None] + offsets).clamp(0, cells - 1).long()
    return torch.zeros(pixels, cells, dtype=torch.float64).scatter_add_(1, index, weight)


def _keys(distance: Tensor, a: float = -0.75) -> Tensor:
    """The cubic convolution kernel (Keys 1981), with the constant that PyTorch and OpenCV use."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, far)


def _inside(pixels: int, start: float, stop: float) -> Tensor:
    centres = torch.arange(pixels) + 0.5
    return (centres >= start) & (centres < stop)
