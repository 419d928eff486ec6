"""The same picture moved, resized, turned, in another light, to see if a network still says the same of it.

Nothing is made up. The picture is rendered somewhat larger than the network's input; a window of it is the base view,
and every moved view is the window that shows what has come there instead. So views differ by what they should, and
by true parts of the picture at their edges, but have no border that was padded, mirrored or wrapped. It is how Zhang,
Making Convolutional Networks Shift-Invariant Again (ICML 2019, section 4), and Azulay & Weiss, Why Do Deep
Convolutional Networks Generalize so Poorly to Small Image Transformations? (JMLR 2019), take two crops of a picture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn.functional import grid_sample

from whatwhere.errors import InputError
from whatwhere.geometry import Box
from whatwhere.images import Photo, Preprocess
from whatwhere.types import Size

Kind = Literal["shift", "scale", "rotation", "brightness", "contrast"]
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "diagonal": (1, 1)}
"""Of a shift: (x, y)."""


class Transform(NamedTuple):
    """What is done to a picture."""

    kind: Kind
    strength: float
    """Pixels of the network's input, right, down, or each of both; factor of its size; degrees, counter-clockwise;
    factor of its brightness, or of the distance from its mean grey."""
    direction: str = ""
    """Of a shift: right, down or diagonal."""


TRANSFORMS: tuple[Transform, ...] = (
    *(Transform("shift", pixels, direction) for direction in DIRECTIONS for pixels in (1, 2, 4, 8, 16, 32)),
    *(Transform("scale", factor) for factor in (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)),
    *(Transform("rotation", degrees) for degrees in (5, 10, 15, 30, 45)),
    *(Transform("brightness", factor) for factor in (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)),
    *(Transform("contrast", factor) for factor in (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)),
)


class View(NamedTuple):
    """A picture as a network's input, and how it lies to the base view.

    Points are (x, y) on pixel edges: the middle of the first pixel is (.5, .5).
    """

    transform: Transform
    pixels: Float[Tensor, "d h w"]
    to_base: Float[Tensor, "2 3"]
    """``to_base @ (x, y, 1)`` is where the base view has what this one has at (x, y)."""


@dataclass(frozen=True, eq=False)
class Family:
    """A base view and what is compared with it.

    Attributes:
        base: (d h w), as the network takes it.
        seen: where the picture lies in the base view: all of it but for a letterbox's padding.
        views: made as they are asked for.
    """

    base: Float[Tensor, "d h w"]
    seen: Box
    views: Iterator[View]


def checked(transforms: Sequence[Transform], size: Size) -> list[Transform]:
    """The transforms that go into an input of (h, w): shifts of more than half of its shorter side are left out.

    Raises:
        InputError: an unknown kind or direction, a strength that makes no sense, or nothing to do.
    """
    for kind, strength, direction in transforms:
        if kind not in get_args(Kind):
            raise InputError(f"a transform is one of {', '.join(get_args(Kind))}, got {kind!r}")
        if (direction not in DIRECTIONS) if kind == "shift" else direction:
            raise InputError(f"a shift has a direction, {', '.join(DIRECTIONS)}; got {direction!r} for a {kind}")
        whole = kind != "shift" or strength == int(strength)
        if not math.isfinite(strength) or not whole or (strength <= 0 and kind != "rotation"):
            raise InputError(f"a strength is positive, of a shift a number of whole pixels; got {kind} {strength}")
    found = [one for one in transforms if one.kind != "shift" or 2 * one.strength <= min(size)]
    if not found:
        raise InputError(f"wanted transforms that fit into an input of {size[0]} x {size[1]}, got {list(transforms)}")
    return found


def families(preprocess: Preprocess, photo: Photo, transforms: Sequence[Transform]) -> Iterator[Family]:
    """A picture's views, those of one kind, and of both kinds of light, with one base view.

    - shift: the picture is rendered with as many pixels more as the longest shift has, right and down; of 224 pixels
      and shifts up to 32, windows are 224 of 256 pixels.
    - scale: rendered once for each factor, smoothed as ``preprocess`` does, and the middle cut out. The smallest
      shows all of the picture.
    - rotation: rendered so large that turned windows lie within; they are sampled there by cubic convolution.
    - brightness and contrast: of the photograph itself, as Pillow does, in 8 bits; the base view is the whole input.

    Args:
        preprocess: the network's; its input has two sides.
        photo: the picture.
        transforms: from ``checked``.

    Raises:
        InputError: the network takes no photos.
    """
    makers: dict[Callable[..., Family], tuple[Kind, ...]] = {
        _shifted: ("shift",),
        _scaled: ("scale",),
        _turned: ("rotation",),
        _lit: ("brightness", "contrast"),
    }
    for make, kinds in makers.items():
        own = [one for one in transforms if one.kind in kinds]
        if own:
            yield make(preprocess, photo, own)


def _shifted(preprocess: Preprocess, photo: Photo, transforms: Sequence[Transform]) -> Family:
    most = int(max(one.strength for one in transforms))
    h, w = preprocess.size[-2:]
    whole = _Rendering(preprocess, photo, (h + most, w + most), (most, most))

    def views() -> Iterator[View]:
        for one in transforms:
            x, y = (int(one.strength) * step for step in DIRECTIONS[one.direction])
            yield View(one, whole.window(most - y, most - x), _affine(1, 0, -x, 0, 1, -y))

    return Family(whole.window(), whole.seen, views())


def _scaled(preprocess: Preprocess, photo: Photo, transforms: Sequence[Transform]) -> Family:
    least = min(1.0, *(one.strength for one in transforms))
    h, w = preprocess.size[-2:]

    def at(factor: float) -> _Rendering:
        H, W = (max(side, round(side * factor / least)) for side in (h, w))
        return _Rendering(preprocess, photo, (H, W), ((H - h) // 2, (W - w) // 2))

    base = at(1.0)

    def views() -> Iterator[View]:
        for one in transforms:
            view = at(one.strength)
            # through the original, since pixels are whole
            (x0, y0), (x1, y1) = (base.point(*view.original(*corner)) for corner in ((0, 0), (w, h)))
            yield View(one, view.window(), _affine((x1 - x0) / w, 0, x0, 0, (y1 - y0) / h, y0))

    return Family(base.window(), base.seen, views())


def _turned(preprocess: Preprocess, photo: Photo, transforms: Sequence[Transform]) -> Family:
    angles = [math.radians(one.strength) for one in transforms]
    h, w = preprocess.size[-2:]
    reach = [(abs(math.cos(a)), abs(math.sin(a))) for a in angles]
    top = max(0, *(math.ceil((h * c + w * s - h) / 2 - 1e-9) for c, s in reach))
    left = max(0, *(math.ceil((w * c + h * s - w) / 2 - 1e-9) for c, s in reach))
    H, W = h + 2 * top, w + 2 * left
    whole = _Rendering(preprocess, photo, (H, W), (top, left))

    def views() -> Iterator[View]:
        for one, a in zip(transforms, angles, strict=True):
            c, s = math.cos(a), math.sin(a)
            to_base = _affine(c, -s, (w - c * w + s * h) / 2, s, c, (h - s * w - c * h) / 2)
            points = in_base(to_base, (h, w)) + torch.tensor([left, top])
            grid = (2 * points / torch.tensor([W, H]) - 1).to(whole.pixels)
            (pixels,) = grid_sample(whole.pixels[None], grid[None], "bicubic", "border", align_corners=False)
            yield View(one, pixels, to_base)

    return Family(whole.window(), whole.seen, views())


def _lit(preprocess: Preprocess, photo: Photo, transforms: Sequence[Transform]) -> Family:
    h, w = preprocess.size[-2:]
    whole = _Rendering(preprocess, photo, (h, w), (0, 0))

    def views() -> Iterator[View]:
        for one in transforms:
            enhance = ImageEnhance.Brightness if one.kind == "brightness" else ImageEnhance.Contrast
            image = enhance(Image.fromarray(photo.pixels)).enhance(one.strength)
            pixels, _ = preprocess(replace(photo, pixels=np.asarray(image)))
            yield View(one, pixels, _affine(1, 0, 0, 0, 1, 0))

    return Family(whole.window(), whole.seen, views())


class _Rendering:
    """A picture in a size of its own, and the window of it, as large as the input, that begins at (row, column)."""

    def __init__(self, preprocess: Preprocess, photo: Photo, size: Size, corner: Size) -> None:
        self.pixels, self.frame = replace(preprocess, size=size)(photo)
        (self.h, self.w), (self.top, self.left) = preprocess.size[-2:], corner

    def window(self, top: int | None = None, left: int | None = None) -> Float[Tensor, "d h w"]:
        top, left = self.top if top is None else top, self.left if left is None else left
        return self.pixels[:, top : top + self.h, left : left + self.w]

    @property
    def seen(self) -> Box:
        """Where the picture lies in the window."""
        edges = self.frame.placed
        lies = Box(edges.x0 - self.left, edges.y0 - self.top, edges.x1 - self.left, edges.y1 - self.top)
        return lies.intersection(Box(0, 0, self.w, self.h))

    def original(self, x: float, y: float) -> tuple[float, float]:
        """A point of the window in the original image."""
        return self.frame.point_to_original(x + self.left, y + self.top)

    def point(self, x: float, y: float) -> tuple[float, float]:
        """A point of the original image in the window."""
        (sx, sy), seen, placed = self.frame.scale, self.frame.seen, self.frame.placed
        return placed.x0 + (x - seen.x0) * sx - self.left, placed.y0 + (y - seen.y0) * sy - self.top


def _affine(*values: float) -> Float[Tensor, "2 3"]:
    return torch.tensor(values, dtype=torch.float64).reshape(2, 3)


def in_base(to_base: Float[Tensor, "2 3"], size: Size) -> Float[Tensor, "h w 2"]:
    """Where the base view has what a view of (h, w) has at the middle of each pixel, (x, y)."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) + 0.5 for side in size), indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], 2) @ to_base.T
