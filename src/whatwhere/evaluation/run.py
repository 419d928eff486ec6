"""An evaluation that is written down while it goes, cut into shards, taken up again; and what comes of it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from whatwhere.classifiers.classifier import Classifier
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import DataError, InputError
from whatwhere.evaluation.evaluate import Plan, chunks_in, evaluate, evaluate_each, plan_of, settings_of
from whatwhere.evaluation.results import AT_ONE, Evaluation
from whatwhere.explanation import trust_in
from whatwhere.images import printable
from whatwhere.regions.trust import Signals, fitted

SAVED_EVERY = 30.0
"""Seconds, after which a run is written down."""


def run(
    net: Classifier, dataset: Dataset, plan: Plan, folder: Path | None = None, shard: tuple[int, int] = (1, 1)
) -> Iterator[Evaluation]:
    """The growing sum, part after part.

    Args:
        net: the classifier.
        dataset: its samples.
        plan: methods and rules.
        folder: the sum is written there every half a minute and at the end, and what is in it is not done again.
        shard: which of how many; together they are the whole, and their sum is that of one run to the last bit.

    Raises:
        InputError: the folder holds an evaluation of other settings; no such shard.
    """
    (which, of), mine = shard, chunks_of(dataset, shard)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    file = None if folder is None else folder / ("evaluation.npz" if of == 1 else f"evaluation-{which}-of-{of}.npz")
    total = Evaluation.load(file) if file is not None and file.exists() else None
    if total is not None:
        try:
            total = Evaluation(settings_of(net, dataset, plan)) + total  # checks that they are the same
        except InputError as error:
            raise InputError(f"{printable(file or '')}: {error}; use another folder, or remove that file") from None
        yield total
    chunks = [one for one in mine if total is None or one not in total.chunks]
    saved, wait = time.monotonic(), SAVED_EVERY
    try:
        for part in evaluate_each(net, dataset, plan, chunks=chunks):
            total = part if total is None else total + part
            if file is not None and (begun := time.monotonic()) - saved > wait:
                total.save(file)
                saved = time.monotonic()
                wait = max(SAVED_EVERY, 20 * (saved - begun))  # a long list of images takes seconds to write
            yield total
    finally:
        if file is not None and total is not None and chunks:
            total.save(file)


def chunks_of(dataset: Dataset, shard: tuple[int, int]) -> range:
    """The parts of the data set that are a shard's, which of how many.

    Raises:
        InputError: no such shard.
    """
    which, of = shard
    if not 1 <= which <= of:
        raise InputError(f"a shard is one of 1/{of}, ..., {of}/{of}, got {which}/{of}")
    return range(which - 1, chunks_in(len(dataset)), of)


def gathered(folder: Path) -> Evaluation:
    """The sum of all evaluations in a folder, shards or the whole.

    Raises:
        DataError: there are none.
        InputError: they are of different settings, or overlap.
    """
    files = sorted(folder.glob("evaluation*.npz"))
    if not files:
        raise DataError(f"{printable(folder)}: no evaluation*.npz in this folder")
    total = Evaluation.load(files[0])
    for file in files[1:]:
        total = total + Evaluation.load(file)
    return total


def missing(evaluation: Evaluation) -> int:
    """How many parts of the data set are not in it yet."""
    return chunks_in(evaluation.settings["images"]) - len(evaluation.chunks)


def calibrate(
    net: Classifier,
    dataset: Dataset,
    methods: Sequence[str],
    *,
    batch: int = 16,
    mapping: Mapping[str, int | str] | None = None,
) -> dict[str, float]:
    """Choose each method's threshold on a small boxed set, and fit how far its boxes are to be trusted.

    The threshold is the one at which MaxBoxAcc is reached. Trust is fitted at it, from what it is without a fit, and
    is that where all boxes are right, or all wrong. The classifier keeps both, ``explain`` takes them, and ``save``
    writes them with it; what its run said of boxes at another threshold is gone from it. What is measured afterwards
    is measured on other images.

    Returns:
        The thresholds.

    Raises:
        InputError: the data set has no boxes or masks.
    """
    total = evaluate(net, dataset, plan_of(methods, batch=batch, baselines=False, mapping=mapping))
    found = {name: total.threshold(name) for name in methods}
    if not all(total.tally.part(name)["hits"][0].any() for name in methods if found[name] is not None):
        raise InputError(f"no map of {dataset.name} has a box that fits at any threshold; look at them before")
    if None in found.values():
        raise InputError(
            f"{dataset.name} has neither boxes nor masks; a threshold is chosen on images that have them"
        )
    thresholds = {name: float(share) for name, share in found.items() if share is not None}
    net.thresholds.update(thresholds)
    if measured := net.about.get("measured"):
        stale = {f"{name} {number}" for name in thresholds for number in AT_ONE}
        net.about = net.about | {"measured": {key: one for key, one in measured.items() if key not in stale}}
    again = evaluate(net, dataset, plan_of(list(thresholds), batch=batch, baselines=False, mapping=mapping))
    for name in thresholds:
        net.trusts.pop(name, None)
        seen = [one for row in again.rows if "signals" in (one := row["where"][name])]
        right = np.array([one["right"] for one in seen], dtype=bool)
        if 0 < right.sum() < len(right):
            trust = fitted([Signals(*one["signals"]) for one in seen], right, trust_in(net, name))
            net.trusts[name] = (*trust.weights, trust.bias)
    return thresholds
