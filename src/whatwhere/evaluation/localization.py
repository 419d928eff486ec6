"""Boxes and pixels against the truth at every threshold, one threshold for the whole split.

After Choe, Oh, Lee, Chun, Akata, Shim: Evaluating Weakly Supervised Object Localization Methods Right (CVPR 2020),
whose journal version has MaxBoxAccV2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from whatwhere.errors import InputError
from whatwhere.evaluation.tally import ONE, Measure, Tally, measure, weighted, weights
from whatwhere.geometry import Box
from whatwhere.regions.sweep import levels_of, sweep
from whatwhere.types import Heat, Truth

IOUS = (0.3, 0.5, 0.7)
SHARES = np.arange(1000) / 1000
"""Thresholds, as shares of a map's maximum."""
HITS = ("any 0.3", "any 0.5", "any 0.7", "largest 0.5", "top-1", "top-5")
"""Rows of what is counted: a component's box reaches an IoU; the largest one's does; and the class is right too."""


class Overlaps(NamedTuple):
    """At every threshold, the best IoU with some true box."""

    largest: Float[np.ndarray, "t"]
    """Of the box of the largest component; 0 where there is none."""
    any: Float[np.ndarray, "t"]
    """Of the box of any component."""


def overlaps(heat: Heat, truth: Sequence[Box], name: str = "image") -> Overlaps:
    """How well a map's boxes fit the true ones, at every threshold.

    Components are those of ``regions.components``, of the pixels strictly above a share of the maximum; boxes are
    half-open pixel edges.

    Args:
        heat: in pixels of the image, from 0 to 1; all 0 where there is no evidence.
        truth: at least one true box.
        name: of the image, for messages.

    Raises:
        InputError: no true box.
    """
    return overlaps_of_levels(heat, levels_of(heat, len(SHARES)), truth, name)


def overlaps_of_levels(
    heat: Heat, levels: Int[np.ndarray, "H W"], truth: Sequence[Box], name: str = "image"
) -> Overlaps:
    """As ``overlaps``, of pixels that lie above so many thresholds."""
    if not truth:
        raise InputError(f"{name}: wanted at least one true box")
    found = sweep(levels, len(SHARES), heat)
    best = iou(found.boxes, np.array([box.to_list() for box in truth], dtype=float)).max(1)
    rows = found.largest()
    largest = np.where(rows >= 0, best[rows] if len(best) else 0.0, 0.0)
    return Overlaps(largest, best_of_each(found.threshold, best, len(SHARES)))


def best_of_each(number: Int[np.ndarray, "n"], values: Float[np.ndarray, "n"], count: int) -> np.ndarray:
    """The largest value of each number 0..count-1; 0 where there is none."""
    found = np.zeros(count)
    np.maximum.at(found, number, values)
    return found


def iou(boxes: Float[np.ndarray, "n 4"] | Int[np.ndarray, "n 4"], truth: Float[np.ndarray, "g 4"]) -> np.ndarray:
    """Intersection over union of every box with every true one, (n g); half-open, in pixel edges."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    common = (high - low).clip(0).prod(2)
    areas = [(part[:, 2:] - part[:, :2]).clip(0).prod(1) for part in (boxes, truth)]
    union = areas[0][:, None] + areas[1][None] - common
    shares: np.ndarray = np.divide(common, union, out=np.zeros(common.shape), where=union > 0)
    return shares


def boxes_tally(
    names: Sequence[str], found: Sequence[Overlaps], top1: Bool[np.ndarray, "n"], top5: Bool[np.ndarray, "n"]
) -> Tally:
    """Count, at every threshold, the images whose boxes are good enough: ``hits`` (rows 6 t), ``overlap``, ``boxed``.

    Args:
        names: of the images.
        found: of each.
        top1: whether the class whose map it is was the most probable one.
        top5: or one of the five.
    """
    largest, some = (np.stack([one[part] for one in found]) for part in (0, 1))
    good = largest >= 0.5
    hits = np.stack([*(some >= reached for reached in IOUS), good, good & top1[:, None], good & top5[:, None]], 1)
    rows = weights(names)
    units = np.round(largest * ONE).astype(np.int64)
    return Tally(
        {
            "boxed": rows.sum(1),
            "hits": weighted(rows, hits),
            "overlap": weighted(rows, units),
        }
    )


def best_threshold(tally: Tally) -> float:
    """The share of the maximum at which MaxBoxAcc is reached; of several the one in the middle."""
    hits = tally["hits"][0, HITS.index("largest 0.5")]
    best = np.flatnonzero(hits == hits.max())
    return float(SHARES[best[len(best) // 2]])


def boxes_result(tally: Tally, threshold: float | None = None) -> dict[str, Measure]:
    """MaxBoxAcc, MaxBoxAccV2, GT-known, top-1 and top-5 localization, mean IoU; shares of the boxed images.

    The last four are at one threshold: the one given, or the one at which MaxBoxAcc is reached. Intervals of what is
    reached at the best threshold are those of the share at that threshold.
    """
    boxed, hits = _known(tally["boxed"]), tally["hits"]
    known = at(best_threshold(tally) if threshold is None else threshold)
    best = hits[:, np.arange(len(HITS)), hits[0].argmax(1)] / boxed[:, None]
    here = hits[:, :, known] / boxed[:, None]
    rows = {
        "MaxBoxAcc": best[:, 3],
        "MaxBoxAccV2": best[:, :3].mean(1),
        "MaxBoxAccV2 0.3": best[:, 0],
        "MaxBoxAccV2 0.5": best[:, 1],
        "MaxBoxAccV2 0.7": best[:, 2],
        "GT-known loc": here[:, 3],
        "top-1 loc": here[:, 4],
        "top-5 loc": here[:, 5],
        "mean IoU": tally["overlap"][:, known] / ONE / boxed,
    }
    return {name: measure(row) for name, row in rows.items()}


def _known(counts: np.ndarray) -> Float[np.ndarray, "..."]:
    """Counts to divide by; a bootstrap sample without any image has no share."""
    return np.where(counts > 0, counts, np.nan)


def at(threshold: float) -> int:
    """The number of a threshold.

    Raises:
        InputError: it is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise InputError(f"a threshold is a share of the maximum in [0, 1), got {threshold}")
    return min(round(threshold * len(SHARES)), len(SHARES) - 1)


def pixels_of(heat: Heat, truth: Truth) -> Int[np.ndarray, "2 levels"]:
    """How many pixels lie above so many thresholds, off the object and on it; those not known are left out.

    Raises:
        InputError: heat and truth differ in size.
    """
    if heat.shape != truth.shape:
        raise InputError(f"heat and truth have one size, got {heat.shape} and {truth.shape}")
    return histogram(levels_of(heat, len(SHARES)), truth)


def histogram(levels: Int[np.ndarray, "H W"], truth: Truth) -> Int[np.ndarray, "2 levels"]:
    """Pixels by level, off the object and on it."""
    size = len(SHARES) + 1
    places = (truth.astype(np.int64) + 1) * size + levels
    return np.bincount(places.ravel(), minlength=3 * size).reshape(3, size)[1:]


def pixels_tally(names: Sequence[str], found: Sequence[Int[np.ndarray, "2 levels"]]) -> Tally:
    """Pixels of all images together, ``pixels`` (rows 2 levels); each one's own overlap, ``masks`` and ``masked``."""
    levels, rows = np.stack(found), weights(names)
    above = levels[:, :, :0:-1].cumsum(2)[:, :, ::-1]  # of each threshold
    union = above[:, 0] + levels[:, 1].sum(1)[:, None]
    overlap = np.divide(above[:, 1], union, out=np.zeros(union.shape), where=union > 0)
    units = np.round(overlap * ONE).astype(np.int64)
    return Tally({"pixels": weighted(rows, levels), "masks": weighted(rows, units), "masked": rows.sum(1)})


def pixels_result(tally: Tally, threshold: float) -> dict[str, Measure]:
    """PxAP, the area under the ROC curve, mask IoU, and the rates of true and false positives at a threshold.

    Mask IoU is the mean over images at the one threshold for the split at which it is highest.
    """
    levels = tally["pixels"]
    above = levels[:, :, ::-1].cumsum(2)  # at the last threshold, at the last two, ...
    false, true = (above[:, on] / _known(above[:, on, -1:]) for on in (0, 1))
    precision = above[:, 1] / np.maximum(above.sum(1), 1)
    steps = np.diff(true, prepend=0, axis=1)
    middles = true - steps / 2  # equal heat counts half
    here = len(SHARES) - 1 - at(threshold)
    rows = {
        "PxAP": (precision * steps).sum(1),
        "pixel ROC AUC": (np.diff(false, prepend=0, axis=1) * middles).sum(1),
        "TPR": true[:, here],
        "FPR": false[:, here],
    }
    if "masks" in tally:  # evaluations that were saved before it was measured have none
        rows["mask IoU"] = tally["masks"][:, tally["masks"][0].argmax()] / ONE / _known(tally["masked"])
    return {name: measure(row) for name, row in rows.items()}
