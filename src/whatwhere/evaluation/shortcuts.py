"""Classes whose evidence is not where their objects are: outside the truth, at the border, always at one place."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int

from whatwhere.evaluation.tally import ONE, Tally
from whatwhere.types import Heat, Truth

CELLS = 16
"""A side of the grid on which maps are compared with one another."""
BAND = 0.1
"""Share of a side that is border, on each of both ends."""
LEAST = 4
"""Images of a class below which nothing is said of it."""


class Shortcut(NamedTuple):
    """Where the evidence of a class lies.

    Attributes:
        label: the class, of the data set's.
        images: how many were looked at.
        inside: share of the heat on the object, over the share of the area that it has; 1 is chance. None without
            truth.
        border: the same of a band of a tenth of each side.
        sameness: the mean correlation between the maps of two images, from -1 to 1.
        reasons: what speaks for a shortcut, in words; empty where nothing does.
    """

    label: int
    images: int
    inside: float | None
    border: float
    sameness: float
    reasons: tuple[str, ...]


class Lies(NamedTuple):
    """Where the heat of one image lies, in units of 1 / ONE; nothing where there is no heat."""

    shares: Int[np.ndarray, "7"]
    """How often: with heat, with a map that varies, with truth. Then shares of heat and area: border, object."""
    map: Int[np.ndarray, "cells cells"]
    """Small, less its mean, of length 1."""


def lies(heat: Heat, energy: float | None, area: float | None) -> Lies:
    """Where the heat of an image lies.

    Args:
        heat: not negative.
        energy: share of it on the object (``saliency``); None or nan without one.
        area: share of the pixels that the object has (``on_object``).
    """
    map, mean = np.zeros((CELLS, CELLS), dtype=np.int64), cv2.mean(heat)[0]
    if mean <= 0:
        return Lies(np.zeros(7, dtype=np.int64), map)
    y, x = (round(side * BAND) for side in heat.shape)
    inner = heat[y : heat.shape[0] - y, x : heat.shape[1] - x]
    within = inner.size / heat.size
    known = energy is not None and area is not None and not math.isnan(energy)
    on = [energy, area] if known else [0.0, 0.0]
    shares = [1 - cv2.mean(np.ascontiguousarray(inner))[0] * within / mean, 1 - within, *on]
    small = cv2.resize(heat, (CELLS, CELLS), interpolation=cv2.INTER_AREA).astype(np.float64)
    small -= small.mean()
    length = float(np.sqrt((small * small).sum()))
    if length > 0:
        map = np.round(small / length * ONE).astype(np.int64)
    counts = [1, int(length > 0), int(known)]
    return Lies(np.array([*counts, *np.round(np.array(shares) * ONE)], dtype=np.int64), map)


def on_object(truth: Truth) -> float:
    """The share that the object has of the pixels of which it is known."""
    known = int((truth >= 0).sum())
    return float((truth == 1).sum() / known) if known else 0.0


def shortcuts_tally(labels: Sequence[int], found: Sequence[Lies], d: int) -> Tally:
    """Sum, class by class of d, where the heat lies: ``places`` (d 7) and ``maps`` (d CELLS CELLS)."""
    places, maps = np.zeros((d, 7), dtype=np.int64), np.zeros((d, CELLS, CELLS), dtype=np.int64)
    for label, one in zip(labels, found, strict=True):
        places[label] += one.shares
        maps[label] += one.map
    return Tally({"places": places, "maps": maps})


def shortcuts_result(tally: Tally) -> list[Shortcut]:
    """Every class that was looked at, those first for which most speaks."""
    found = [
        _of_class(label, row, maps)
        for label, (row, maps) in enumerate(zip(tally["places"], tally["maps"], strict=True))
    ]
    known = [one for one in found if one is not None]
    return sorted(known, key=lambda one: (-len(one.reasons), 1 if one.inside is None else one.inside, -one.sameness))


def _of_class(label: int, row: Int[np.ndarray, "7"], maps: Int[np.ndarray, "cells cells"]) -> Shortcut | None:
    images, varying, truths = (int(value) for value in row[:3])
    if not images:
        return None
    border_heat, border_area, heat, area = (row[3:] / ONE).tolist()
    inside = heat / area if truths and area > 0 else None
    border = border_heat / border_area if border_area > 0 else 1.0
    pairs = varying * (varying - 1)
    sameness = (float(((maps / ONE) ** 2).sum()) - varying) / pairs if pairs else 0.0
    reasons = []
    if images >= LEAST:
        if inside is not None and inside < 1.1:
            reasons.append("no more heat on the object than its area has by chance")
        if border > 1.3:
            reasons.append("heat gathers at the border")
        if sameness > 0.75:
            reasons.append("the same place in every image")
    return Shortcut(label, images, inside, border, sameness, tuple(reasons))
