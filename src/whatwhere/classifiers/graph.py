"""What an exported file computes: pixels -> network -> logits, class maps, the box; all in tensors of any size.

While a graph is made, lengths are symbols; so shapes are said in words here and not checked.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whatwhere.classifiers.compiled import Look
from whatwhere.errors import UnsupportedError
from whatwhere.images import Preprocess

Length = int | torch.SymInt


class Axis(NamedTuple):
    """How one axis of a picture lies in the network's input: ``geometry.Frame`` in tensors.

    Attributes:
        pixels: of the picture.
        seen: where what is seen begins, in its pixels.
        scale: its pixels to one of the input.
        placed: where that begins in the input.
        inner: pixels of the input that it fills.
    """

    pixels: Tensor
    seen: Tensor
    scale: Tensor
    placed: Tensor
    inner: Tensor


class Pixels(nn.Module):
    """8-bit RGB (b H W 3) of any size -> the network's input (b d h w), as ``Preprocess`` makes it.

    Each axis is resized by one small matrix with Pillow's antialiased filters. Pillow rounds to whole levels after
    each axis, and this does not: an input differs by half a level or so, in 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        """The preprocessing of a checkpoint.

        Raises:
            InputError: the network takes no photos.
            UnsupportedError: a filter that is none of the four.
        """
        super().__init__()
        preprocess.frame((1, 1))  # refuses what takes no photos
        if preprocess.interpolation.lower() not in _FILTERS:
            raise UnsupportedError(
                f"pixels in the graph are resized by {', '.join(_FILTERS)}, and this model's by "
                f"{preprocess.interpolation}; export it without uint8"
            )
        self.preprocess = preprocess
        self.filter = _FILTERS[preprocess.interpolation.lower()]
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Axis, Axis]:
        """(b H W 3) -> the input (b d h w), and how rows and columns lie in it."""
        rows, columns = self.axes(_length(images.shape[1]), _length(images.shape[2]))
        pixels = images.permute(0, 3, 1, 2).float()
        if len(self.mean) == 1:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        h, w = self.preprocess.size[-2:]
        across, is_column = self._taps(columns, images.shape[2], w)
        down, is_row = self._taps(rows, images.shape[1], h)
        pixels = (down @ (pixels @ across.T).clamp(0, 255)).clamp(0, 255)
        return (pixels / 255 - self.mean) / self.std * is_row[:, None] * is_column, rows, columns

    def axes(self, height: Tensor, width: Tensor) -> tuple[Axis, Axis]:
        """How pictures of so many pixels lie in the input."""
        H, W = height, width
        h, w = self.preprocess.size[-2:]
        zero = H * 0
        if self.preprocess.fit == "whole":
            return Axis(H, zero, H / h, zero, zero + h), Axis(W, zero, W / w, zero, zero + w)
        if self.preprocess.fit == "crop":
            step = torch.minimum(H / h, W / w) * self.preprocess.crop_fraction
            return (
                Axis(H, (H - h * step) / 2, step, zero, zero + h),
                Axis(W, (W - w * step) / 2, step, zero, zero + w),
            )
        step = torch.maximum(H / h, W / w)
        inner_h, inner_w = (H / step).round().clamp(1, h), (W / step).round().clamp(1, w)
        return (
            Axis(H, zero, H / inner_h, ((h - inner_h) / 2).floor(), inner_h),
            Axis(W, zero, W / inner_w, ((w - inner_w) / 2).floor(), inner_w),
        )

    def _taps(self, axis: Axis, pixels: Length, out: int) -> tuple[Tensor, Tensor]:
        """(out, pixels): the weight of each pixel in each of the input's; and which of those are not padding."""
        places = torch.arange(out, dtype=torch.float32)
        inside = (places >= axis.placed) & (places < axis.placed + axis.inner)
        centres = axis.seen + (places + 0.5 - axis.placed) * axis.scale
        if self.preprocess.interpolation.lower() == "nearest":
            taps = (torch.arange(pixels, dtype=torch.float32) == centres.floor()[:, None]).float()
        else:
            at = torch.arange(pixels, dtype=torch.float32) + 0.5
            taps = self.filter((at - centres[:, None]) / axis.scale.clamp(min=1))
            taps = taps / taps.sum(1, keepdim=True)
        return torch.where(inside[:, None], taps, 0), inside.float()


class Whole(nn.Module):
    """The graph: images -> logits (b k), class maps (b k y x) and, if asked for, box (b 4); or logits, features.

    The class maps are plain CAM (Zhou et al. 2016, eq. 2): their mean over the cells, plus a bias, is the logit.

    Attributes:
        names: of the outputs.
    """

    def __init__(self, look: Look, pixels: Pixels | None, box: float | None) -> None:
        """What the graph is made of.

        Args:
            look: the network.
            pixels: what is before it; None if it takes preprocessed images (b d h w).
            box: the share of the maximum above which a map's pixels are in the box; None for no box.
        """
        super().__init__()
        self.look, self.pixels, self.share = look, pixels, box
        self.names = ["logits", "maps", "box"][: 2 + (box is not None)] if look.has_maps else ["logits", "features"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of ``names``."""
        if self.pixels is not None:
            inputs, rows, columns = self.pixels(images)
        else:
            inputs = images
        features, logits, *maps = self.look(inputs)
        if not maps:
            return logits, features
        if self.share is None:
            return logits, maps[0]
        H, W = (images.shape[1], images.shape[2]) if self.pixels is not None else images.shape[2:]
        if self.pixels is None:
            rows, columns = _itself(_length(H)), _itself(_length(W))
        size = inputs.shape[-2:]
        down, across = _spread(rows, H, maps[0].shape[2], size[0]), _spread(columns, W, maps[0].shape[3], size[1])
        return logits, maps[0], box_of(logits, maps[0], down, across, self.share)


def box_of(logits: Tensor, maps: Tensor, down: Tensor, across: Tensor, share: float) -> Tensor:
    """Where the most probable class is: x0 y0 x1 y1 in pixel edges; zeros where its map is nowhere positive.

    The map's positive part, scaled to [0, 1] and brought to pixels, is cut at a share of its maximum, and the box is
    the tight one around all pixels above it. ``explain`` takes the largest connected component of the same pixels:
    its box is this one where there is one component, and inside this one where there are several. To number
    components takes a loop until nothing changes, which graphs of the formats here have no plain operation for.

    Args:
        logits: (b k).
        maps: (b k y x), of all classes.
        down: (H y), weights of a map's rows in each row of pixels.
        across: (W x), of its columns.
        share: of the maximum, in [0, 1).

    Returns:
        (b 4), float32.
    """
    top = logits.argmax(1)[:, None, None, None].expand(-1, -1, maps.shape[2], maps.shape[3])
    heat = maps.gather(1, top)[:, 0].clamp(min=0)
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    span = high - low
    varies = span > 8 * torch.finfo(torch.float32).eps * high
    heat = torch.where(varies, (heat - low) / torch.where(varies, span, 1), 0)
    heat = down @ (heat @ across.T)
    mask = heat > share * heat.amax((1, 2), keepdim=True)
    y0, y1 = _extent(mask.any(2))
    x0, x1 = _extent(mask.any(1))
    return torch.stack([x0, y0, x1, y1], 1)


def _extent(found: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each row that is there (b), and one behind the last; zeros where none is."""
    places = torch.arange(found.shape[1], dtype=torch.float32)
    stop = torch.where(found, places + 1, 0).amax(1)
    start = torch.where(found, places, places[-1] + 1).amin(1)
    return torch.minimum(start, stop), stop


def _spread(axis: Axis, pixels: Length, cells: Length, size: Length) -> Tensor:
    """(pixels, cells): bilinear weights of a map's cells in the picture's pixels, 0 in those that were not seen."""
    centres = torch.arange(pixels, dtype=torch.float32) + 0.5
    inside = (centres >= axis.seen) & (centres < axis.seen + axis.inner * axis.scale)
    numbers = torch.arange(cells, dtype=torch.float32)
    at = (axis.placed + (centres - axis.seen) / axis.scale).mul(cells / size) - 0.5
    at = torch.minimum(at.clamp(min=0), numbers[-1])
    return (1 - (numbers - at[:, None]).abs()).clamp(min=0) * inside[:, None]


def _length(pixels: Length) -> Tensor:
    """A length as a tensor, also where it is open when the graph is made."""
    return torch.arange(pixels, dtype=torch.float32)[-1] + 1


def _itself(pixels: Tensor) -> Axis:
    zero = pixels * 0
    return Axis(pixels, zero, zero + 1, zero, pixels)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys 1981, with Pillow's constant of -0.5."""
    d = x.abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    safe = torch.where(x == 0, 1, x) * math.pi
    value = 3 * safe.sin() * (safe / 3).sin() / (safe * safe)
    return torch.where(x == 0, 1, torch.where(x.abs() < 3, value, 0))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": _triangle,
    "bilinear": _triangle,
    "bicubic": _cubic,
    "lanczos": _lanczos,
}
