"""Sub-kinds: descriptors of one class in groups, and how far each is from the middle of its own."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from whatwhere.errors import extra

WAYS = ("kmeans", "hdbscan")
"""Of grouping."""
AXES = 8
"""Principal components of a class's descriptors, in which its groups are sought: with all of them noise decides."""
MOST = 8
"""Groups of a class, at most."""
LEAST = 0.28
"""The mean silhouette from which on groups are groups: nine of ten of cub60's species have less, the sexes of
mallards and mergansers 0.32 and 0.38, two species together 0.45 (median); of ten pictures or fewer, seldom that."""
SMALLEST = 3
"""Pictures that make a group."""
DENSE = 5
"""Pictures that make a group for HDBSCAN."""


class Grouped(NamedTuple):
    """Pictures in groups.

    Attributes:
        group: of each, its number, the largest group first; -1 for none.
        silhouette: how far groups are apart, in [-1, 1]; nan where there is one.
    """

    group: Int[np.ndarray, "m"]
    silhouette: float


def grouped(descriptors: Float[np.ndarray, "m c"], *, by: str = "kmeans", seed: int = 0) -> Grouped:
    """Descriptors in groups, by their directions, in ``AXES`` principal components.

    By k-means with the number of clusters whose mean silhouette (Rousseeuw 1987) is the largest; or by HDBSCAN
    (Campello, Moulavi & Sander 2013). What is in a cluster of fewer than ``SMALLEST`` is in no group. All are one
    group where there are no two, or where no silhouette of k-means reaches ``LEAST``.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with extra("classic", "grouping"):
        from sklearn.cluster import HDBSCAN, KMeans
    points = _points(descriptors, seed)
    best = Grouped(np.zeros(len(points), dtype=np.int64), float("nan"))
    different = len(np.unique(points.round(6), axis=0))
    if by == "hdbscan":
        if different >= 2 * DENSE:
            group = HDBSCAN(min_cluster_size=DENSE, copy=True).fit_predict(points)
            if group.max() > 0:
                best = Grouped(_by_size(group), _silhouette(points, group, seed))
        return best
    for k in range(2, min(MOST, len(points) // SMALLEST, different) + 1):
        group = KMeans(k, n_init=5, random_state=seed).fit_predict(points)
        silhouette, group = _silhouette(points, group, seed), _by_size(group)
        if silhouette >= LEAST and not silhouette <= best.silhouette and group.max() > 0:
            best = Grouped(group, silhouette)
    return best


def seeded(descriptors: Float[np.ndarray, "m c"], seeds: Int[np.ndarray, "m"], *, seed: int = 0) -> Grouped:
    """Descriptors in the groups that some of them are known to be in.

    Seeded k-means (Basu, Banerjee & Mooney, Semi-supervised Clustering by Seeding, ICML 2002): each centre
    begins as the mean of its seeds, and goes on as in k-means; a seed may end in another group.

    Args:
        descriptors: as ``grouped`` takes them.
        seeds: the group of each, from 0 on without gaps; -1 where it is not known.
        seed: of the principal components.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with extra("classic", "grouping"):
        from sklearn.cluster import KMeans
    points, k = _points(descriptors, seed), int(seeds.max()) + 1
    centres = np.stack([points[seeds == number].mean(0) for number in range(k)])
    if len(np.unique(points.round(6), axis=0)) < k:
        return Grouped(((points[:, None] - centres) ** 2).sum(2).argmin(1), float("nan"))
    group = KMeans(k, init=centres, n_init=1).fit_predict(points).astype(np.int64)
    return Grouped(group, _silhouette(points, group, seed))


def distances(
    descriptors: Float[np.ndarray, "m c"], group: Int[np.ndarray, "m"]
) -> tuple[Float[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
    """1 - cosine to the centre of the group, or of the nearest where there is none, and whether that is far.

    Far is more than three times the median absolute deviation (scaled as a normal distribution's standard deviation)
    above the median of the group (Leys et al. 2013), or no group.
    """
    unit = _directions(descriptors)
    centres = _directions(np.stack([unit[group == number].mean(0) for number in range(group.max() + 1)]))
    apart = np.clip(1 - unit @ centres.T, 0, 2).astype(np.float64)
    rows = np.arange(len(unit))
    distance = np.where(group < 0, apart.min(1), apart[rows, group])
    outlier = group < 0
    for number in range(len(centres)):
        own = distance[group == number]
        middle = np.median(own)
        spread = 1.4826 * np.median(np.abs(own - middle))
        outlier |= (group == number) & (distance > middle + 3 * spread + 1e-6)
    return distance, outlier


def _points(descriptors: Float[np.ndarray, "m c"], seed: int) -> Float[np.ndarray, "m d"]:
    """Directions in their principal components."""
    from sklearn.decomposition import PCA

    unit = _directions(descriptors)
    centred = unit - unit.mean(0)
    points: np.ndarray = centred[:, :1]
    if np.abs(centred).max() >= 1e-6:  # else all are the same
        points = PCA(min(AXES, *centred.shape), random_state=seed).fit_transform(centred)
    return points


def _directions(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _silhouette(points: Float[np.ndarray, "m d"], group: Int[np.ndarray, "m"], seed: int) -> float:
    """The mean over those that have a group, or over 2000 of them."""
    from sklearn.metrics import silhouette_score

    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(group >= 0))[:2000]
    if not 1 < len(np.unique(group[drawn])) < len(drawn):
        return float("nan")
    return float(silhouette_score(points[drawn], group[drawn]))


def _by_size(group: Int[np.ndarray, "m"]) -> Int[np.ndarray, "m"]:
    """Groups numbered by falling size; those of too few become -1, which stays."""
    count = np.bincount(group[group >= 0])
    rank = np.argsort(np.argsort(-count, kind="stable"), kind="stable")
    numbered: np.ndarray = np.where((group < 0) | (count[group] < SMALLEST), -1, rank[group]).astype(np.int64)
    return numbered
