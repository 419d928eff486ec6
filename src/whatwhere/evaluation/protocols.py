"""What a map is measured by: in which pixels, from 0 to 1 how, which boxes, which overlaps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import InputError, nearest
from whatwhere.evaluation import localization, wsol2020
from whatwhere.evaluation.localization import SHARES, Overlaps
from whatwhere.geometry import Box, Frame
from whatwhere.maps.shape import positive, to_original, unit
from whatwhere.regions.sweep import levels_of
from whatwhere.types import Heat, Pixels, Size, Truth

Levels = Int[np.ndarray, "H W"]
"""Of every pixel, how many thresholds it passes."""


@dataclass(frozen=True)
class Protocol:
    """The rules of one benchmark; thresholds are shares of the maximum in steps of .001.

    Attributes:
        name: what the command line calls it.
        heat: a raw map (y x), and how its image lies in the network's input -> the map in the protocol's pixels.
        pixels: the image -> the image in the protocol's pixels, for presets that look at it again.
        size: (H, W) of the image -> of the protocol's pixels.
        levels: heat -> of every pixel, how many of the thresholds it passes.
        overlaps: heat, levels, true boxes of an image of (H, W), its name -> the best overlaps at every threshold.
        truth: a mask of the image's pixels -> of the protocol's.
        fit: how images must lie in the network's input; "" for in any way.
    """

    name: str
    heat: Callable[[Float[np.ndarray, "y x"], Frame], Heat]
    pixels: Callable[[Pixels], Pixels]
    size: Callable[[Size], Size]
    levels: Callable[[Heat], Levels]
    overlaps: Callable[[Heat, Levels, Sequence[Box], Size, str], Overlaps]
    truth: Callable[[Truth], Truth]
    fit: str = ""

    def check(self, net: Classifier) -> None:
        """Raises an InputError where the protocol is not for how the classifier sees images."""
        if self.fit and net.preprocess.fit != self.fit:
            raise InputError(
                f"{self.name} is for images that are resized whole, and {net.name} has fit={net.preprocess.fit!r}; "
                "load it with preprocess=Preprocess(..., fit='whole') or use half-open"
            )


def _heat(map: Float[np.ndarray, "y x"], frame: Frame) -> Heat:
    heat: Heat = to_original(unit(positive(torch.from_numpy(map)[None])), frame)[0].numpy()
    return heat


HALF_OPEN = Protocol(
    name="half-open",
    heat=_heat,
    pixels=lambda pixels: pixels,
    size=lambda size: size,
    levels=lambda heat: levels_of(heat, len(SHARES)),
    overlaps=lambda heat, levels, boxes, size, name: localization.overlaps_of_levels(heat, levels, boxes, name),
    truth=lambda truth: truth,
)
"""As ``explain`` gives them: the positive part of the map from 0 to 1 in the image's own pixels, half-open boxes."""

WSOL2020 = Protocol(
    name="wsol2020",
    heat=lambda map, frame: wsol2020.heat_of(map),
    pixels=wsol2020.pixels_of,
    size=lambda size: (wsol2020.SIDE, wsol2020.SIDE),
    levels=wsol2020.levels_of,
    overlaps=lambda heat, levels, boxes, size, name: wsol2020.overlaps(heat, wsol2020.scaled(boxes, size), name),
    truth=wsol2020.truth_of,
    fit="whole",
)
"""The WSOL benchmark's own (``wsol2020.py``)."""

PROTOCOLS = {one.name: one for one in (HALF_OPEN, WSOL2020)}


def find_protocol(name: str | Protocol) -> Protocol:
    """A protocol by its name.

    Raises:
        InputError: no such protocol; names the nearest.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise InputError(f"no protocol is called {name!r}; nearest: {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def region_of(boxes: Sequence[Box], size: Size) -> Truth:
    """The pixels inside boxes: those whose centre is."""
    truth: Truth = np.zeros(size, dtype=np.int8)
    for box in boxes:
        x0, y0, x1, y1 = (max(0, int(np.ceil(edge - 0.5))) for edge in box.to_list())
        truth[y0:y1, x0:x1] = 1
    return truth
