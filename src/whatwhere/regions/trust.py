"""How far a box is to be trusted: the chance that it and a true one overlap by half, from what is seen without boxes.

A box that stays where it is while the threshold moves has an edge of the heat on every side; one that does not was
drawn where the threshold happened to be. That, whether looks of several sizes say the same, and how sure the
classifier is go through a logistic function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool

from whatwhere.errors import InputError
from whatwhere.geometry import Box
from whatwhere.regions.components import components
from whatwhere.regions.threshold import Threshold, mask_of
from whatwhere.types import Heat

LOWER, HIGHER = (0.5, 0.6, 0.7, 0.8, 0.9), (1.1, 1.2, 1.3, 1.4, 1.6)
"""Thresholds that a box is compared at, as multiples of its own."""
HIGHEST = 0.95
"""Share of the maximum that they do not go beyond."""
SIDE = 160
"""Pixels on the longer side of the heat that boxes are compared on; of more every second, third, ... counts."""
LEAST = 1e-6
"""No probability is smaller."""
FINER = 8
AGREED = 0.5
"""Share of the maximum at which boxes of single looks are compared."""
SPREAD = (1.0, 0.15, 0.15, 0.25)
"""Of the signals, over pictures: how far apart weights are is measured by them."""


class Signals(NamedTuple):
    """What is seen of a box without knowing where the thing is."""

    confidence: float
    """Logarithm of the probability that the classifier gives the class that it finds most probable."""
    lower: float
    """Mean IoU with the boxes at lower thresholds, in [0, 1]."""
    higher: float
    """Mean IoU with the boxes at higher thresholds, in [0, 1]."""
    agreement: float
    """Mean IoU of the boxes of any two looks, in [0, 1]; 1 of a single one."""


@dataclass(frozen=True)
class Trust:
    """A logistic function of the signals; called with them.

    Attributes:
        weights: of each signal.
        bias: beside them.
    """

    weights: tuple[float, float, float, float]
    bias: float

    def __call__(self, signals: Signals) -> float:
        """The chance that the box's IoU with a true one is at least .5."""
        return float(_logistic(np.dot(self.weights, signals) + self.bias))


def signals_of(
    heat: Heat, threshold: Threshold, confidence: float, looks: Sequence[np.ndarray] = ()
) -> Signals | None:
    """What is seen of the box around the largest component; None where there is no box.

    Args:
        heat: in pixels of the picture, not negative.
        threshold: that the box is drawn at.
        confidence: the highest probability of any class, in [0, 1].
        looks: what was merged (y x), each on a grid over the same part of the picture; not negative.

    Raises:
        InputError: no such threshold.
    """
    step = -(-max(heat.shape) // SIDE)
    heat = heat[::step, ::step]
    mask, top = mask_of(heat, threshold), float(heat.max())
    if not mask.any():
        return None
    own, level = _box(mask), float(heat.max(where=~mask, initial=0.0)) / top

    def stays(multiples: Sequence[float]) -> float:
        return float(np.mean([own.iou(_box(heat > min(level * one, HIGHEST) * top)) for one in multiples]))

    boxes = [_box(look > AGREED * max(float(look.max()), 0.0)) for look in finer(looks)]
    pairs = [one.iou(other) for one, other in combinations(boxes, 2)]
    agreement = float(np.mean(pairs)) if pairs else 1.0
    return Signals(float(np.log(max(confidence, LEAST))), stays(LOWER), stays(HIGHER), agreement)


def finer(looks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Maps on one grid, several times as fine as the finest of theirs: IoUs of boxes do not depend on its shape."""
    size = [FINER * max(look.shape[axis] for look in looks) for axis in (1, 0)] if looks else []
    return [cv2.resize(look.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) for look in looks]


def fitted(signals: Sequence[Signals], right: Bool[np.ndarray, "n"], begun: Trust, strength: float = 4.0) -> Trust:
    """A trust that fits what boxes turned out to be, and is near another where that is little to go by.

    Logistic regression by Newton's method. Added to the negative log-likelihood is ``strength / 2`` times the squared
    distance of the weights, in units of what a signal varies by, from those it begins with; the bias is free.

    Args:
        signals: of n boxes.
        right: whether each one's IoU was at least .5.
        begun: what it begins with.
        strength: in boxes, about, that the beginning counts for.

    Raises:
        InputError: not one for each box; none that was right, or none that was wrong.
    """
    if len(signals) != len(right):
        raise InputError(f"wanted one answer for each box, got {len(right)} for {len(signals)} boxes")
    if not 0 < right.sum() < len(right):
        raise InputError(
            f"wanted boxes that were right and boxes that were not, got {int(right.sum())} right of {len(right)}"
        )
    scale = np.array([*SPREAD, 1.0])
    seen = np.column_stack([np.array(signals), np.ones(len(signals))]) / scale
    start = np.array([*begun.weights, begun.bias]) * scale
    held = np.diag([*[strength] * len(SPREAD), 1e-6])
    found = start.copy()

    def loss(weights: np.ndarray) -> float:
        z = seen @ weights
        away = weights - start
        return float(np.logaddexp(0, z).sum() - z[right].sum() + away @ held @ away / 2)

    for _ in range(100):
        chance = _logistic(seen @ found)
        slope = seen.T @ (chance - right) + held @ (found - start)
        step = np.linalg.solve(seen.T @ (seen * (chance * (1 - chance))[:, None]) + held, slope)
        length, now = 1.0, loss(found)
        while loss(found - length * step) > now and length > 1e-6:
            length /= 2
        found = found - length * step
        if np.abs(length * step).max() < 1e-9:
            break
    confidence, lower, higher, agreement, bias = (found / scale).tolist()
    return Trust((confidence, lower, higher, agreement), bias)


def _box(mask: np.ndarray) -> Box:
    boxes = components(mask).boxes
    return boxes[0] if boxes else Box(0, 0, 0, 0)


def _logistic(z: Any) -> Any:
    return np.exp(-np.logaddexp(0, -z))
