"""The picture's own edges decide: (heat (H W), pixels (H W 3), ...) -> a sharper heat, or a mask. Each usable alone.

Networks see things, and seldom where they end. What is done here knows nothing of networks: heat says where a thing
is, and colours where it ends.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float

from whatwhere.errors import InputError, extra
from whatwhere.types import Heat, Mask, Pixels, Size

CELLS = 56 * 56
"""On which evidence walks, at most, whatever the picture's size: cells of 4 x 4 pixels of a usual network's input."""

STEPS = (1, 2, 4)
"""How many cells away a cell's neighbours are: evidence gets past what is small, and sees gentle edges too."""
BINS = 12
"""A side of a histogram of colours."""
LEAST, MOST = np.array([0.0, -60.0, -60.0]), np.array([100.0, 60.0, 60.0])
"""Colours in CIELAB that a histogram goes from and to; few are beyond, and those count at its ends."""

Colours = Float[np.ndarray, "c y x"]
Pair = tuple[tuple[slice, slice], tuple[slice, slice], np.ndarray]
"""Cells, those at one step from them, and how easily one goes from each to the other."""


def walk(
    heat: Heat,
    pixels: Pixels,
    *,
    trust: float = 0.2,
    contrast: float = 3.0,
    steps: Sequence[int] = STEPS,
    features: Float[np.ndarray, "c y x"] | None = None,
) -> Heat:
    """Evidence that walks over the picture at random and seldom crosses an edge: one colour is of one heat.

    Random walker with a prior (Grady, PAMI 2006; CVPR 2005, eq. 11): the heat p for which

        ``trust * sum_i (p_i - heat_i)^2 + sum_ij w_ij (p_i - p_j)^2``

    is least, on a grid of at most CELLS cells, with ``w_ij = exp(-contrast * d_ij^2 / mean d^2)``, d the distance of
    the colours in CIELAB, and the mean over neighbours, so that a pale picture has edges too (Rother et al. 2004,
    eq. 5). One linear system, solved by conjugate gradients.

    Args:
        heat: in pixels of the picture, not negative.
        pixels: the picture.
        trust: in the heat as it is; less of it lets evidence go further.
        contrast: how much an edge holds back.
        steps: how many cells away, in eight directions, a cell's neighbours are.
        features: of a network, on any grid over the whole picture; their distances count beside those of the colours.

    Returns:
        From 0 to 1; zeros where the heat is constant.

    Raises:
        InputError: heat and pixels differ in size; trust is not positive, contrast negative, or there are no steps.
    """
    _check(heat, pixels)
    _check_walk(trust, contrast, steps)
    size = grid_of(heat.shape)
    seen = [colours_of(pixels, size)]
    if features is not None:
        seen.append(np.stack([_resized(one, size) for one in features]))
    prior = _resized(heat, size)
    if not prior.any():
        return np.zeros_like(heat)
    found = _least(prior.astype(np.float64), _pairs(seen, size, contrast, steps), trust)
    return _unit(_resized(found, heat.shape)).astype(heat.dtype)


def recolour(heat: Heat, pixels: Pixels, *, bins: int = BINS) -> Heat:
    """Of every pixel, how much more often its colour is met where there is heat than where there is none.

    Bayes' rule with two colour histograms, each pixel counting by its heat in one and by what is missing to 1 in the
    other, and both sides as likely: ``f / (f + b)``. In CIELAB, each histogram blurred by a triangle of one bin.

    Args:
        heat: in pixels of the picture, from 0 to 1.
        pixels: the picture.
        bins: a side of the histograms.

    Returns:
        From 0 to 1; zeros where the heat is constant.

    Raises:
        InputError: heat and pixels differ in size; no bins.
    """
    _check(heat, pixels)
    if bins < 1:
        raise InputError(f"a histogram has at least 1 bin a side, got {bins}")
    size = grid_of(heat.shape)
    if heat.min() == heat.max():
        return np.zeros_like(heat)
    share = _by_colour(_resized(heat, size).clip(0, 1), colours_of(pixels, size), bins)
    return _resized(share, heat.shape).astype(heat.dtype)


def settle(heat: Heat, pixels: Pixels, *, trust: float = 0.2, contrast: float = 3.0, colour: float = 0.3) -> Heat:
    """Evidence walks, the colours of where it came to are learned, and it walks again from there and from the map.

    ``walk(heat)``, then ``walk((1 - colour) * heat + colour * recolour(walk(heat)))``, on one grid.

    Args:
        heat: in pixels of the picture, not negative.
        pixels: the picture.
        trust: as of ``walk``.
        contrast: as of ``walk``.
        colour: what the colours count beside the heat, from 0 to 1.

    Returns:
        From 0 to 1; zeros where the heat is constant.

    Raises:
        InputError: as ``walk``; colour is not in [0, 1].
    """
    _check(heat, pixels)
    _check_walk(trust, contrast, STEPS)
    if not 0 <= colour <= 1:
        raise InputError(f"what the colours count is from 0 to 1, got {colour}")
    size = grid_of(heat.shape)
    prior = _unit(_resized(heat, size)).astype(np.float64)
    if not prior.any():
        return np.zeros_like(heat)
    seen = colours_of(pixels, size)
    pairs = _pairs([seen], size, contrast, STEPS)
    first = _unit(_least(prior, pairs, trust))
    mixed = (1 - colour) * prior + colour * _by_colour(first, seen, BINS)
    return _unit(_resized(_least(mixed, pairs, trust), heat.shape)).astype(heat.dtype)


def guided(heat: Heat, pixels: Pixels, *, radius: int = 8, eps: float = 1e-3) -> Heat:
    """Heat that has its edges where the picture has some (He, Sun & Tang, Guided image filtering, PAMI 2013).

    In every window, heat is a linear function of grey: ``a * I + b`` with ``a = cov(I, heat) / (var(I) + eps)``
    (eqs. 5, 6, 8), with reflected borders, as OpenCV's.

    Args:
        heat: in pixels of the picture.
        pixels: the picture.
        radius: of the windows, in pixels.
        eps: variance of grey, from 0 to 1, below which a window counts as flat.

    Raises:
        InputError: heat and pixels differ in size; a radius of less than 1, or eps not positive.
    """
    _check(heat, pixels)
    if radius < 1 or eps <= 0:
        raise InputError(f"wanted a radius of at least 1 and eps > 0, got {radius} and {eps}")
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float64) / 255
    given = heat.astype(np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        side = 2 * radius + 1
        blurred: np.ndarray = cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT)
        return blurred

    middle, level = mean(grey), mean(given)
    slope = (mean(grey * given) - middle * level) / (mean(grey * grey) - middle * middle + eps)
    found: Heat = (mean(slope) * grey + mean(level - slope * middle)).clip(0, 1).astype(heat.dtype)
    return found


def grabcut(heat: Heat, pixels: Pixels, *, threshold: float = 0.5, sure: float = 0.9, rounds: int = 3) -> Mask:
    """The region whose colours and edges part it best from the rest, begun with a map (Rother et al. 2004).

    OpenCV's, on as many cells as ``walk`` has, twice as many each way.

    Args:
        heat: in pixels of the picture, from 0 to 1.
        pixels: the picture.
        threshold: share of the maximum above which a pixel probably belongs.
        sure: share above which it does for certain; as far below the least it does not.
        rounds: of learning the colours and cutting.

    Raises:
        InputError: heat and pixels differ in size; not 0 <= threshold <= sure <= 1, or no rounds.
    """
    _check(heat, pixels)
    if not 0 <= threshold <= sure <= 1 or rounds < 1:
        raise InputError(f"wanted 0 <= threshold <= sure <= 1 and rounds, got {threshold}, {sure} and {rounds}")
    size = grid_of(heat.shape, 4 * CELLS)
    cells = _unit(_resized(heat, size))
    labels = np.where(cells > threshold, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[cells >= max(sure, 1e-6)] = cv2.GC_FGD
    labels[cells <= 1 - sure] = cv2.GC_BGD
    if len(np.unique(labels % 2)) == 2:
        shrunk = np.round(_resized(pixels, size)).astype(np.uint8)
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(shrunk, labels, (0, 0, 0, 0), *models, rounds, cv2.GC_INIT_WITH_MASK)
    mask: Mask = _resized((labels % 2).astype(np.float32), heat.shape) > 0.5
    return mask


def superpixels(heat: Heat, pixels: Pixels, *, scale: float = 100.0, smallest: int = 20) -> Heat:
    """Heat that votes in regions of one colour: in each its mean (Felzenszwalb & Huttenlocher, IJCV 2004).

    Args:
        heat: in pixels of the picture.
        pixels: the picture.
        scale: of the regions; more of it makes larger ones.
        smallest: region, in pixels.

    Raises:
        InputError: heat and pixels differ in size.
        MissingExtraError: scikit-image is not installed.
    """
    _check(heat, pixels)
    with extra("classic", "voting in superpixels"):
        from skimage.segmentation import felzenszwalb
    numbers = felzenszwalb(pixels, scale=scale, sigma=0.8, min_size=smallest, channel_axis=2)
    flat = numbers.ravel()
    means = np.bincount(flat, heat.ravel()) / np.maximum(np.bincount(flat), 1)
    voted: Heat = means[numbers].astype(heat.dtype)
    return voted


def grid_of(size: tuple[int, ...], cells: int = CELLS) -> Size:
    """The size of a grid over a picture: as many cells as it has pixels, or at most so many, of its shape."""
    H, W = size
    scale = min(1.0, (cells / (H * W)) ** 0.5)
    y = max(1, min(round(H * scale), cells))
    return y, max(1, min(round(W * scale), cells // y)) if scale < 1 else W


def colours_of(pixels: Pixels, size: Size) -> Colours:
    """The mean colour of each cell, CIELAB (3 y x)."""
    shrunk = _resized(pixels.astype(np.float32) / 255, size)
    colours: Colours = cv2.cvtColor(shrunk, cv2.COLOR_RGB2LAB).transpose(2, 0, 1).astype(np.float64)
    return colours


def _by_colour(cells: np.ndarray, colours: Colours, bins: int) -> np.ndarray:
    """Of each cell, the share of its colour that lies where there is heat."""
    shares = (colours.reshape(3, -1).T - LEAST) / (MOST - LEAST)
    at = (shares * bins).astype(np.int64).clip(0, bins - 1) @ np.array([bins * bins, bins, 1])
    front, back = (
        _counted(at, weights.ravel(), bins)[at] / max(float(weights.sum()), 1e-9) for weights in (cells, 1 - cells)
    )
    share: np.ndarray = np.divide(front, front + back, out=np.zeros_like(front), where=front + back > 0)
    return share.reshape(cells.shape)


def _counted(at: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """A histogram, a quarter of each bin in either neighbour along each axis."""
    counts: np.ndarray = np.bincount(at, weights, minlength=bins**3).reshape(bins, bins, bins)
    for axis in range(3):
        wider = np.pad(counts, [(1, 1) if one == axis else (0, 0) for one in range(3)])
        below, above = (np.take(wider, np.arange(bins) + start, axis) for start in (0, 2))
        counts = counts / 2 + (below + above) / 4
    return counts.ravel()


def _pairs(seen: Sequence[np.ndarray], size: Size, contrast: float, steps: Sequence[int]) -> list[Pair]:
    """All pairs of cells that are neighbours, a direction and step at a time."""
    distances: dict[tuple[int, int], list[np.ndarray]] = {}
    for step in sorted({1, *steps}):
        for dy, dx in ((0, step), (step, 0), (step, step), (step, -step)):
            if dy < size[0] and abs(dx) < size[1]:
                here, there = _apart(size, dy, dx)
                distances[dy, dx] = [np.square(one[:, *here] - one[:, *there]).sum(0) for one in seen]
    near = [values for (dy, dx), values in distances.items() if max(dy, abs(dx)) == 1]
    pairs = []
    means = [np.mean([values[k].mean() for values in near]) if near else 0.0 for k in range(len(seen))]
    for (dy, dx), values in distances.items():
        if max(dy, abs(dx)) in steps:
            apart = sum((one / mean if mean > 0 else one for one, mean in zip(values, means, strict=True)), 0.0)
            pairs.append((*_apart(size, dy, dx), np.exp(-contrast / len(seen) * apart)))
    return pairs


def _apart(size: Size, dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Cells that have another (dy, dx) away, and those."""
    y, x = size
    left, right = max(0, -dx), min(x, x - dx)
    return (slice(0, y - dy), slice(left, right)), (slice(dy, y), slice(left + dx, right + dx))


def _least(prior: np.ndarray, pairs: Sequence[Pair], trust: float) -> np.ndarray:
    """Solves (L + trust) p = trust * prior by conjugate gradients, preconditioned by the diagonal."""
    diagonal = np.full_like(prior, trust)
    for here, there, weight in pairs:
        diagonal[here] += weight
        diagonal[there] += weight

    def times(p: np.ndarray) -> np.ndarray:
        out: np.ndarray = diagonal * p
        for here, there, weight in pairs:
            out[here] -= weight * p[there]
            out[there] -= weight * p[here]
        return out

    found = prior.copy()
    rest = trust * prior - times(found)
    step = direction = rest / diagonal
    size = float((rest * step).sum())
    goal = 1e-10 * trust * float(np.square(prior).sum())
    for _ in range(prior.size):
        if size <= goal:
            break
        ahead = times(direction)
        length = size / float((direction * ahead).sum())
        found += length * direction
        rest -= length * ahead
        step = rest / diagonal
        before, size = size, float((rest * step).sum())
        direction = step + size / before * direction
    return found


def _check(heat: np.ndarray, pixels: np.ndarray) -> None:
    if heat.shape != pixels.shape[:2]:
        raise InputError(f"heat and pixels are of one picture, got {heat.shape} and {pixels.shape[:2]}")


def _check_walk(trust: float, contrast: float, steps: Sequence[int]) -> None:
    if trust <= 0 or contrast < 0 or not steps or min(steps) < 1:
        raise InputError(
            f"wanted trust > 0, contrast >= 0 and steps of at least 1, got {trust}, {contrast} and {tuple(steps)}"
        )


def _resized(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Means of areas where it shrinks, bilinear where it grows."""
    shrinks = size[0] < values.shape[0] or size[1] < values.shape[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: np.ndarray = cv2.resize(values.astype(np.float32), (size[1], size[0]), interpolation=way)
    return resized


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if high - low <= 8 * np.finfo(np.float32).eps * max(abs(low), abs(high)):
        return np.zeros_like(values)
    return (values - low) / (high - low)
