"""What needs no look at the image, beside which every method is shown."""

import zlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from whatwhere.maps.shape import unit, upsample
from whatwhere.types import Heat, Size


@lru_cache(maxsize=8)
def centre(size: Size) -> Heat:
    """A Gaussian at the image's centre, a quarter of each side wide, from 0 in the corners to 1."""
    places = [((np.arange(side) + 0.5) / side - 0.5) * 4 for side in size]
    heat = np.exp(-(places[0][:, None] ** 2 + places[1][None] ** 2) / 2)
    heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-9)
    found: Heat = heat.astype(np.float32)
    found.flags.writeable = False
    return found


def noise(size: Size, name: str, cells: Size = (7, 7)) -> Heat:
    """A map of noise on a feature grid, always the same for an image of that name, brought to its pixels."""
    grid = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape"))).random(
        (1, *cells), dtype=np.float32
    )
    heat: Heat = upsample(unit(torch.from_numpy(grid)), size)[0].numpy()
    return heat


def whole(size: Size) -> Heat:
    """1 everywhere: the image itself is the box."""
    heat: Heat = np.ones(size, dtype=np.float32)
    return heat


BASELINES: dict[str, Callable[[Size, str], Heat]] = {
    "centre Gaussian": lambda size, name: centre(size),
    "random map": noise,
    "whole image": lambda size, name: whole(size),
}
"""Size and name of an image -> heat."""
