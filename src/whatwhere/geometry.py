"""Box and Frame: where things are, in the original image and in the network's input."""

import math
from dataclasses import dataclass

from whatwhere.errors import InputError
from whatwhere.types import Size


@dataclass(frozen=True)
class Box:
    """Pixel edges, half-open: the pixels with x0 <= x < x1 and y0 <= y < y1.

    Edges may be fractional. ``width * height`` is the area; there is no ``+ 1`` anywhere.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """x1 - x0, in pixels."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """y1 - y0, in pixels."""
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Square pixels; zero for an empty or inverted box."""
        return max(self.width, 0) * max(self.height, 0)

    def intersection(self, other: "Box") -> "Box":
        """What both cover; its area is 0 where they do not meet."""
        return Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1))

    def iou(self, other: "Box") -> float:
        """Intersection over union, in [0, 1]; 0 where both are empty."""
        common = self.intersection(other).area
        union = self.area + other.area - common
        return common / union if union > 0 else 0.0

    def to_list(self) -> list[float]:
        """[x0, y0, x1, y1]."""
        return [self.x0, self.y0, self.x1, self.y1]


@dataclass(frozen=True)
class Frame:
    """Which part of the original image the network saw, and where in its input that part lies.

    Pixel edges map linearly: ``seen`` in the original image onto ``placed`` in the network's input.
    Whatever of the original is outside ``seen`` was cut away; whatever of the input is outside
    ``placed`` is padding.

    Attributes:
        original: (H, W) of the original image, upright.
        network: (h, w) of the network's input.
        seen: part of the original image that was resized into the input.
        placed: where that part lies in the input.
    """

    original: Size
    network: Size
    seen: Box
    placed: Box

    @classmethod
    def whole(cls, original: Size, network: Size) -> "Frame":
        """The whole image, squashed to the network's size: nothing is cut away."""
        return cls(_positive(original), _positive(network), _full(original), _full(network))

    @classmethod
    def crop(cls, original: Size, network: Size, fraction: float = 1.0) -> "Frame":
        """The largest centred part with the network's aspect ratio, shrunk by ``fraction``.

        Equals resizing the shorter side to ``size / fraction`` and cutting the centre out, without the
        rounding of the intermediate size.
        """
        if not 0 < fraction <= 1:
            raise InputError(f"a centre crop keeps a fraction in (0, 1] of the shorter side, got {fraction}")
        (H, W), (h, w) = _positive(original), _positive(network)
        step = min(H / h, W / w) * fraction
        x0, y0 = (W - w * step) / 2, (H - h * step) / 2
        return cls(original, network, Box(x0, y0, x0 + w * step, y0 + h * step), _full(network))

    @classmethod
    def letterbox(cls, original: Size, network: Size) -> "Frame":
        """The whole image, aspect ratio kept to the nearest pixel, centred on padding."""
        (H, W), (h, w) = _positive(original), _positive(network)
        step = max(H / h, W / w)
        inner_h, inner_w = max(1, min(h, round(H / step))), max(1, min(w, round(W / step)))
        x0, y0 = (w - inner_w) // 2, (h - inner_h) // 2
        return cls(original, network, _full(original), Box(x0, y0, x0 + inner_w, y0 + inner_h))

    @property
    def scale(self) -> tuple[float, float]:
        """Network pixels per original pixel, as (x, y)."""
        return self.placed.width / self.seen.width, self.placed.height / self.seen.height

    def to_network(self, box: Box) -> Box:
        """A box of the original image in the network's input, clipped to what was seen."""
        sx, sy = self.scale
        seen = box.intersection(self.seen)
        return Box(
            self.placed.x0 + (seen.x0 - self.seen.x0) * sx,
            self.placed.y0 + (seen.y0 - self.seen.y0) * sy,
            self.placed.x0 + (seen.x1 - self.seen.x0) * sx,
            self.placed.y0 + (seen.y1 - self.seen.y0) * sy,
        )

    def to_original(self, box: Box) -> Box:
        """A box of the network's input in the original image; padding is clipped away."""
        inner = box.intersection(self.placed)
        found = Box(*self.point_to_original(inner.x0, inner.y0), *self.point_to_original(inner.x1, inner.y1))
        return found.intersection(_full(self.original))

    def point_to_original(self, x: float, y: float) -> tuple[float, float]:
        """A point (x, y) of the network's input in the original image; one of the padding lies outside of it."""
        sx, sy = self.scale
        return self.seen.x0 + (x - self.placed.x0) / sx, self.seen.y0 + (y - self.placed.y0) / sy


def _full(size: Size) -> Box:
    return Box(0, 0, size[1], size[0])


def _positive(size: Size) -> Size:
    if min(size) < 1 or not all(math.isfinite(side) for side in size):
        raise InputError(f"a size is (height, width) with both sides at least 1 pixel, got {size}")
    return size
