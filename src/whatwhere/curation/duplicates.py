"""Pictures that are there more than once: as they are, in another size or quality, mirrored, or slightly cropped.

Neighbours by their descriptors or by 8 x 8 pixels are only candidates. A pair is one where the small grey pictures,
brought into register by an affine transform (Evangelidis & Psarakis, Parametric image alignment using enhanced
correlation coefficient maximization, TPAMI 2008), are the same but for brightness and contrast.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from whatwhere.errors import extra

NEAREST = 5
"""Neighbours of each picture that are candidates."""
ALIKE, AKIN = 0.7, 0.65
"""Of these, the pairs whose 8 x 8 pixels, or else whose descriptors, correlate at least so much."""
STEPS = ((32, 15, 0.8), (64, 50, 0.97))
"""Pixels a side, iterations, and the correlation in register that goes on; what passes the last is a pair.

Copies that were resized to half, mirrored, cropped by 5 and 10 % and compressed again have 0.998 and more, the most
alike of 21 000 pairs of other birds on as many pixels 0.934 (CUB-200-2011).
"""
STRETCH, SHEAR = 0.25, 0.1
"""How far an affine transform may be from none: what turns a picture into another one is no crop."""


class Pair(NamedTuple):
    """Two pictures that are one.

    Attributes:
        first: which.
        second: which, a later one.
        correlation: of the small grey pictures in register, in [0.97, 1].
        mirrored: whether one has to be.
        identical: whether all pixels are the same.
    """

    first: int
    second: int
    correlation: float
    mirrored: bool
    identical: bool


def duplicates(
    whole: Float[np.ndarray, "p c"], small: UInt8[np.ndarray, "p s s"], digests: Sequence[str]
) -> list[Pair]:
    """Pairs of pictures that are one; of identical ones each with the first.

    Args:
        whole: descriptors of the pictures.
        small: the pictures in grey and squashed, of ``pooled.SIDE`` pixels.
        digests: of all their pixels.

    Returns:
        By their places.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    first: dict[str, int] = {}
    pairs = []
    for number, digest in enumerate(digests):
        if (same := first.setdefault(digest, number)) != number:
            pairs.append(Pair(same, number, 1.0, mirrored=False, identical=True))
    kept = np.array(list(first.values()), dtype=np.int64)
    for i, j, mirrored in _candidates(whole[kept], small[kept]):
        a, b = small[kept[i]], small[kept[j]]
        correlation = _in_register(a, b[:, ::-1] if mirrored else b)
        if correlation is not None:
            pairs.append(Pair(int(kept[i]), int(kept[j]), correlation, mirrored, identical=False))
    best: dict[tuple[int, int], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.correlation):
        best[pair.first, pair.second] = pair
    return [best[places] for places in sorted(best)]


def originals(pictures: int, pairs: Iterable[Pair]) -> Int[np.ndarray, "p"]:
    """Of each picture the first one that it is a copy of, or a copy of a copy; itself where it is none."""
    found = np.arange(pictures)
    for pair in pairs:
        one, other = sorted((found[pair.first], found[pair.second]))
        found[found == other] = one
    return found


def _candidates(whole: Float[np.ndarray, "p c"], small: UInt8[np.ndarray, "p s s"]) -> list[tuple[int, int, bool]]:
    """Pairs of neighbours, the first one before the other, and whether the other is to be mirrored."""
    if len(whole) < 2:
        return []
    with extra("classic", "looking for neighbours"):
        from sklearn.neighbors import NearestNeighbors
    akin = _unit(whole - whole.mean(0))
    tiny = [
        _unit(
            np.stack([cv2.resize(one, (8, 8), interpolation=cv2.INTER_AREA) for one in view]).reshape(len(small), 64)
        )
        for view in (small, small[:, :, ::-1])
    ]
    near = set()
    for among, asked in ((akin, akin), (tiny[0], tiny[0]), (tiny[0], tiny[1])):
        search = NearestNeighbors(n_neighbors=min(NEAREST + 1, len(among)), metric="cosine").fit(among)
        for i, row in enumerate(search.kneighbors(asked, return_distance=False).tolist()):
            near |= {(min(i, j), max(i, j)) for j in row if i != j}
    pairs = np.array(sorted(near), dtype=np.int64).reshape(-1, 2)
    one, other = pairs[:, 0], pairs[:, 1]
    close = (akin[one] * akin[other]).sum(1) >= AKIN
    found = []
    for mirrored, view in enumerate(tiny):
        alike = (tiny[0][one] * view[other]).sum(1) >= ALIKE
        found += [(int(i), int(j), bool(mirrored)) for i, j in pairs[close | alike]]
    return found


def _in_register(a: UInt8[np.ndarray, "s s"], b: UInt8[np.ndarray, "s s"]) -> float | None:
    """The correlation of two small pictures in register, where it shows that they are one."""
    correlation = -1.0
    for side, iterations, least in STEPS:
        one, other = (cv2.resize(x, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) for x in (a, b))
        correlation = _registered(one, other, iterations)
        if correlation < least:
            return None
    return correlation


def _registered(a: Float[np.ndarray, "s s"], b: Float[np.ndarray, "s s"], iterations: int) -> float:
    if min(a.std(), b.std()) < 1:  # of 255: a picture of nothing
        return -1.0
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, iterations, 1e-4)
    try:
        _, warp = cv2.findTransformECC(
            a, b, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, stop, np.ones(b.shape, np.uint8), 3
        )
    except cv2.error:  # it does not converge: they are not alike
        return -1.0
    change = np.abs(warp[:, :2] - np.eye(2))
    if not (change.max() <= STRETCH and max(change[0, 1], change[1, 0]) <= SHEAR):  # nor where it is nan
        return -1.0
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    inside = cv2.erode(cv2.warpAffine(np.ones_like(a), warp, a.shape, flags=how), np.ones((5, 5))) > 0.999
    if inside.mean() < 0.5:
        return -1.0
    a, b = (cv2.GaussianBlur(one, (3, 3), 0)[inside] for one in (a, cv2.warpAffine(b, warp, a.shape, flags=how)))
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 1 else -1.0


def _unit(vectors: np.ndarray) -> Float[np.ndarray, "p d"]:
    """Rows of mean 0 and length 1; what does not vary is 0."""
    centred = vectors.astype(np.float32) - vectors.mean(1, keepdims=True, dtype=np.float32)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: np.ndarray = np.where(lengths > 1e-6, centred / np.maximum(lengths, 1e-6), 0)
    return unit
