"""A labelled data set, looked through: labels to doubt, pictures that are there twice, groups in each class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from whatwhere.classifiers.classifier import Classifier
from whatwhere.curation.doubts import Doubts, doubted
from whatwhere.curation.duplicates import Pair, duplicates, originals
from whatwhere.curation.kinds import WAYS, distances, grouped, seeded
from whatwhere.curation.pooled import Pooled, pooled
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import InputError, extra, nearest
from whatwhere.maps import Method


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of one class.

    Attributes:
        label: the class.
        entries: which of the entries of ``Pooled`` show it.
        group: of each, its number; -1 for none.
        names: of the groups: "1", "2", ... or as the seeds call them.
        distance: of each to the centre of its group, or of the nearest: 1 - cosine.
        outlier: whether that is far, or it has no group.
        silhouette: how far groups are apart, in [-1, 1]; nan where there is one.
    """

    label: int
    entries: Int[np.ndarray, "m"]
    group: Int[np.ndarray, "m"]
    names: tuple[str, ...]
    distance: Float[np.ndarray, "m"]
    outlier: Bool[np.ndarray, "m"]
    silhouette: float


@dataclass(frozen=True, eq=False)
class Groups:
    """What is found in a data set.

    Attributes:
        pooled: its pictures and entries.
        doubts: of the labels of its entries.
        pairs: of pictures that are one.
        groupings: one for each class that is shown.
    """

    pooled: Pooled
    doubts: Doubts
    pairs: list[Pair]
    groupings: list[Grouping]


def find_groups(
    net: Classifier,
    dataset: Dataset,
    *,
    method: str | Method = "gradcam",
    mapping: Mapping[str, int | str] | None = None,
    by: str = "kmeans",
    seeds: Mapping[str, str] | None = None,
    seed: int = 0,
    batch: int = 16,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Groups:
    """Look through a labelled data set: see ``doubted``, ``duplicates``, and ``grouped``, of the classes one by one.

    Args:
        net: a classifier; its classes need not be the data set's. Best is one whose features have not learned from
            these labels, the embedded one or a run of light mode: what has learned them no longer doubts them.
        dataset: of one or several splits.
        method: a map method, by name or as a function.
        mapping: which of the classifier's classes the data set's are, where names do not say it.
        by: "kmeans", with the number of groups that the silhouette says, or "hdbscan", which leaves pictures out.
        seeds: name of a picture -> name of its group, for some pictures of some classes.
        seed: of what is drawn.
        batch: pictures that go through the network at once.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        DataError: no picture can be used.
        InputError: no such method, way of grouping, class in ``mapping`` or picture in ``seeds``.
        UnsupportedError: the method does not apply to the network.
        MissingExtraError: scikit-learn is not installed.
    """
    if by not in WAYS:
        raise InputError(f"groups are sought by {' or '.join(WAYS)}, got {by!r}")
    if seeds and by != "kmeans":
        raise InputError(f"seeds are for kmeans, got {by!r}")
    names = {sample.name for sample in dataset}
    if lost := next((name for name in seeds or {} if name not in names), None):
        raise InputError(f"{dataset.name} has no picture {lost!r} for a seed; nearest: {nearest(lost, names)}")
    with extra("classic", "grouping"):
        import sklearn  # noqa: F401  # said before the pictures are looked at
    found = pooled(net, dataset, method=method, mapping=mapping, batch=batch, seen=seen)
    pairs = duplicates(found.whole, found.small, found.digests)
    groupings = []
    for label in np.unique(found.labels).tolist():
        entries = np.flatnonzero(found.labels == label)
        told = [(seeds or {}).get(found.samples[picture].name) or None for picture in found.pictures[entries]]
        groupings.append(_grouping(label, entries, found.where[entries], told, by, seed))
    return Groups(found, _doubts(found, pairs, seed), pairs, groupings)


def _doubts(found: Pooled, pairs: Sequence[Pair], seed: int) -> Doubts:
    """Of the labels of pictures that show one class; the others are not judged."""
    alone = np.flatnonzero(np.bincount(found.pictures, minlength=len(found.samples))[found.pictures] == 1)
    pictures = found.pictures[alone]
    some = doubted(
        found.whole[pictures],
        found.labels[alone],
        originals(len(found.samples), pairs)[pictures],
        seed=seed,
    )
    doubts = Doubts(np.full(len(found.labels), np.nan), np.full(len(found.labels), -1, dtype=np.int64))
    doubts.doubt[alone], doubts.likelier[alone] = some.doubt, some.likelier
    return doubts


def _grouping(
    label: int,
    entries: Int[np.ndarray, "m"],
    where: Float[np.ndarray, "m c"],
    told: Sequence[str | None],
    by: str,
    seed: int,
) -> Grouping:
    names = tuple(sorted({name for name in told if name is not None}))
    if names:
        group, silhouette = seeded(where, np.array([-1 if name is None else names.index(name) for name in told]))
    else:
        group, silhouette = grouped(where, by=by, seed=seed)
        names = tuple(str(number + 1) for number in range(group.max() + 1))
    distance, outlier = distances(where, group)
    return Grouping(label, entries, group, names, distance, outlier, silhouette)
