"""All thresholds at once: what ``components`` gives at every one of them, in one pass over the pixels of a map.

Every pixel climbs to the maximum that its steepest neighbours lead to. At any threshold a pixel above it is
connected with its maximum, so components are sets of such basins, joined where neighbouring pixels of two of them are
both above it. Basins are joined from the highest such pass downwards (Kruskal), with the boxes and areas of all
thresholds below.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int

MANY = 300
"""Maxima of a map, above which one threshold after the other is faster than all at once."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """The components of every mask ``level > threshold``: one row for each component of each threshold.

    Attributes:
        threshold: (n) its number, 0..count-1, rising.
        boxes: (n 4) the tight boxes, x0 y0 x1 y1 in pixel edges.
        areas: (n) pixels in each.
        count: how many thresholds there are.
    """

    threshold: Int[np.ndarray, "n"]
    boxes: Int[np.ndarray, "n 4"]
    areas: Int[np.ndarray, "n"]
    count: int

    def largest(self) -> Int[np.ndarray, "count"]:
        """Of every threshold, the row of the largest component; -1 where there is none.

        Of equal areas the one that ``components`` puts first: from top to bottom, left to right.
        """
        order = np.lexsort((self.boxes[:, 0], self.boxes[:, 1], -self.areas, self.threshold))
        numbers, first = np.unique(self.threshold[order], return_index=True)
        found = np.full(self.count, -1)
        found[numbers] = order[first]
        return found


def levels_of(heat: Float[np.ndarray, "H W"], count: int) -> Int[np.ndarray, "H W"]:
    """Of every pixel, how many thresholds it lies strictly above: 0, 1 / count, 2 / count, ... of the maximum."""
    top = max(float(heat.max()), 0.0)
    if top <= 0:
        return np.zeros(heat.shape, dtype=np.int64)
    edges = np.append(np.arange(count) / count * top, np.inf).astype(heat.dtype)  # as in comparing with one of them
    levels = (heat.clip(0) * (count / top)).astype(np.int64)
    # rounded down, and rounding is off by one at most: it lies above what is below it, and perhaps above its own
    levels += heat > np.take(edges, levels)
    levels -= (levels > 0) & (heat <= np.take(edges, levels - 1))
    return levels


def sweep(levels: Int[np.ndarray, "H W"], count: int, heat: Float[np.ndarray, "H W"]) -> Sweep:
    """The components, eight neighbours a pixel, of the masks ``levels > 0``, ``levels > 1``, ..., so many of them.

    Equal to ``components`` of each of them.

    Args:
        levels: in 0..count.
        count: of the masks.
        heat: what the levels are of, which they never fall with. It says which way is up where levels are equal.
    """
    # masks change only at levels that occur: 0 = values[0] < values[1] < ...
    occurs = np.bincount(levels.ravel(), minlength=count + 1) > 0
    occurs[0] = True
    values = np.flatnonzero(occurs)
    cuts = len(values) - 1  # cut i: ranks > i, which is the thresholds values[i] .. values[i + 1] - 1
    if not cuts:
        return Sweep(np.zeros(0, int), np.zeros((0, 4), int), np.zeros(0, int), count)
    # a column of nothing at the right, so that the neighbours of a pixel are at the same steps everywhere
    ranks, wider = (np.zeros((levels.shape[0], levels.shape[1] + 1), dtype) for dtype in (np.int64, np.float64))
    ranks[:, :-1], wider[:, :-1] = np.take(occurs.cumsum() - 1, levels), heat
    basins, n = _basins(ranks, wider)
    if n > MANY:
        return _one_by_one(levels, count)
    extents, tops = _extents(ranks, basins, n, cuts)
    rows = _joined(extents, tops, _passes(ranks, basins, n))
    cut = np.concatenate([cut for cut, _ in rows])
    found = np.concatenate([extent for _, extent in rows], 1)
    repeats = values[cut + 1] - values[cut]
    at = np.repeat(np.arange(len(cut)), repeats)
    threshold = values[cut[at]] + np.arange(len(at)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    order = np.argsort(threshold, kind="stable")
    at, threshold = at[order], threshold[order]
    left, top, right, bottom, area = found[:, at]
    return Sweep(threshold, np.stack([left, top, 1 - right, 1 - bottom], 1), area, count)


def _one_by_one(levels: np.ndarray, count: int) -> Sweep:
    """The plain way, which needs no memory for maps that are rough in every pixel."""
    thresholds, boxes, areas = [], [], []
    for number in range(int(levels.max())):
        n, _, table, _ = cv2.connectedComponentsWithStats((levels > number).astype(np.uint8), connectivity=8)
        left, top, width, height, area = table[1:].T.astype(np.int64)
        thresholds.append(np.full(n - 1, number))
        boxes.append(np.stack([left, top, left + width, top + height], 1))
        areas.append(area)
    return Sweep(np.concatenate(thresholds), np.concatenate(boxes), np.concatenate(areas), count)


def _basins(ranks: np.ndarray, heat: np.ndarray) -> tuple[np.ndarray, int]:
    """Of every pixel (H W), the number of the maximum that it climbs to, 0..n-1, or n where the rank is 0; and n."""
    # whole numbers that a float64 holds: the heat, and among equals the later one, so that plateaus have a summit
    bits = int(ranks.size).bit_length()
    heat *= (1 << 52 - bits) / float(heat.max())
    keys = np.floor(heat, out=heat)
    keys *= 1 << bits
    keys += np.arange(keys.size).reshape(keys.shape)
    highest = cv2.dilate(keys, np.ones((3, 3), np.uint8))
    above = (highest.astype(np.int64) & ((1 << bits) - 1)).ravel()
    while not np.array_equal(above, further := np.take(above, above)):
        above = further
    inside = ranks.ravel() > 0
    summits = np.flatnonzero((above == np.arange(above.size)) & inside)
    number = np.zeros(ranks.size, dtype=np.int64)
    number[summits] = np.arange(len(summits))
    basins: np.ndarray = np.where(inside, np.take(number, above), len(summits)).reshape(ranks.shape)
    return basins, len(summits)


def _extents(ranks: np.ndarray, basins: np.ndarray, n: int, cuts: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every basin and cut, what lies above it: (5 n cuts) x0, y0, -x and -y of the last, area; and its top.

    Joining takes the minimum of the first four and the sum of the fifth.
    """
    extents = np.full((5, n, cuts + 1), max(ranks.shape), dtype=np.int64)
    for axis in (0, 1):  # along x and along y: the highest rank in every column and row of a basin
        side = ranks.shape[1 - axis]
        places = np.arange(side)
        highest = np.zeros((n + 1) * side, dtype=np.int64)
        np.maximum.at(highest, (basins * side + (places if axis == 0 else places[:, None])).ravel(), ranks.ravel())
        own = highest.reshape(n + 1, side)[:n]
        lines = (np.arange(n)[:, None] * (cuts + 1) + own).ravel()
        np.minimum.at(extents[axis].reshape(-1), lines, np.tile(places, n))
        np.minimum.at(extents[axis + 2].reshape(-1), lines, np.tile(-places, n))
    areas = np.bincount((basins * (cuts + 1) + ranks).ravel(), minlength=(n + 1) * (cuts + 1))
    areas = areas.reshape(n + 1, cuts + 1)[:n, 1:]
    extents = extents[:, :, 1:]  # rank 0 lies above no cut
    extents[:4] = np.minimum.accumulate(extents[:4, :, ::-1], 2)[:, :, ::-1]
    extents[4] = areas[:, ::-1].cumsum(1)[:, ::-1]
    return extents, (areas > 0).cumsum(1).argmax(1) + 1


def _passes(ranks: np.ndarray, basins: np.ndarray, n: int) -> list[tuple[int, int, int]]:
    """The highest pass between any two basins that touch: its rank and their numbers, highest first."""
    flat, basin = ranks.ravel(), basins.ravel()
    found = []
    for step in (1, ranks.shape[1] - 1, ranks.shape[1], ranks.shape[1] + 1):
        at = np.flatnonzero(basin[:-step] != basin[step:])
        a, b = basin[at], basin[at + step]
        rank = np.minimum(flat[at], flat[at + step])
        found.append(np.stack([rank, np.minimum(a, b) * n + np.maximum(a, b)])[:, rank > 0])
    rank, pair = np.concatenate(found, 1)
    order = np.lexsort((pair, -rank))
    rank, pair = rank[order], pair[order]
    first = np.sort(np.unique(pair, return_index=True)[1])
    return [(int(rank[i]), int(pair[i]) // n, int(pair[i]) % n) for i in first]


def _joined(
    extents: np.ndarray, tops: np.ndarray, passes: list[tuple[int, int, int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The cuts at which each component is one, and its extents there."""
    leader, upper = list(range(len(tops))), tops.tolist()
    rows = []

    def lead(basin: int) -> int:
        while leader[basin] != basin:
            leader[basin] = leader[leader[basin]]
            basin = leader[basin]
        return basin

    def note(basin: int, lower: int) -> None:
        if lower < upper[basin]:
            rows.append((np.arange(lower, upper[basin]), extents[:, basin, lower : upper[basin]]))

    for rank, one, other in passes:
        a, b = lead(one), lead(other)
        if a == b:
            continue
        note(a, rank)
        note(b, rank)
        leader[b], upper[a] = a, min(rank, max(upper[a], upper[b]))
        # what was noted above stays as it is; below, the two are one
        below = np.s_[:, a, :rank]
        joined = np.minimum(extents[:4, a, :rank], extents[:4, b, :rank])
        areas = extents[4, a, :rank] + extents[4, b, :rank]
        extents[below] = np.concatenate([joined, areas[None]])
    for basin in range(len(leader)):
        if leader[basin] == basin:
            note(basin, 0)
    return rows
