"""The work on many machines: the same functions under Ray Data. It schedules, queues and tries again; we do not.

    numbers of parts -> map_batches(Annotating, actors that hold a model and a process that reads for it) -> rows

Every machine sees the source and the run's folder under the same names; parts are written by the one that asks.
"""

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from whatwhere.annotate.listing import Listing
from whatwhere.annotate.local import batches_of
from whatwhere.annotate.looking import Looker, Settings
from whatwhere.annotate.reading import Reader
from whatwhere.annotate.rows import Row
from whatwhere.annotate.workers import Workers
from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import UnsupportedError, WhatWhereError, extra

Block = dict[str, np.ndarray]
"""Rows as Ray holds them, columns of arrays."""


def annotate_parts(
    listing: Listing,
    parts: Sequence[int],
    reader: Reader,
    net: Classifier,
    settings: Settings,
    model: str,
    *,
    workers: int | None,
    address: str | None,
    watch: Callable[[list[Row]], None],
) -> Generator[tuple[int, list[Row]], None, None]:
    """The rows of each part, in order; as ``local.annotate_parts``, of the same batches.

    Args:
        listing: the pictures.
        parts: numbers of those to do.
        reader: what the processes run.
        net: the classifier, which goes to every actor once.
        settings: of the run.
        model: digest of the classifier.
        workers: actors; by default as many as leave a processor for those that read.
        address: of a cluster; by default one of this machine's own, or the one that the program is in.
        watch: is told every batch's rows.

    Raises:
        MissingExtraError: Ray is not installed.
        UnsupportedError: the cluster has no processor, or the model is to be on another device.
    """
    if net.device.type != "cpu":
        raise UnsupportedError(f"--engine ray holds models on processors, and {net.name} is on {net.device}")
    with extra("scale", "--engine ray"):
        import ray.data
    with _in_cluster(ray, address):
        processors = _processors(ray)
        if processors <= 0:
            raise UnsupportedError("the Ray cluster has no processor; start it with --num-cpus")
        actors, share = shares(processors, workers)
        held = ray.put((net, settings, model))
        told = {"folder": listing.folder, "images": listing.images, "part": listing.part}
        with _in_order(ray):
            items = [{"number": number} for number in parts]
            numbers = ray.data.from_items(items, override_num_blocks=len(items))
            found: Any = numbers.map_batches(
                Annotating,
                batch_size=1,
                fn_constructor_args=(held, reader, told),
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=share,
            )
            rows: list[Row] = []
            for one in found.iter_rows():
                own = pickle.loads(one["rows"])
                watch(own)
                rows += own
                if one["is_last"]:
                    yield int(one["number"]), rows
                    rows = []


def _processors(ray: Any) -> float:
    return float(ray.cluster_resources().get("CPU", 0))


def shares(processors: float, workers: int | None) -> tuple[int, float]:
    """How many models a cluster holds, and how many processors each takes, so that one is left for reading."""
    if processors < 2:
        return workers or 1, processors / 2 / (workers or 1)
    most = int(processors) - 1
    return min(workers or most, most), 1.0


class Annotating:
    """An actor: a model, and a process that reads ahead for it, so that a file that ends it is a row and no retry."""

    def __init__(self, held: Any, reader: Reader, listed: dict[str, Any]) -> None:
        import cv2
        import ray
        import torch

        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        net, self.settings, model = ray.get(held)
        self.pool = Workers(reader, 1)
        self.looker, self.listing = Looker(net, self.settings, model), Listing(**listed)

    def __call__(self, block: Block) -> Iterator[Block]:
        """Numbers of parts -> the rows of their batches, as they come."""
        for number in block["number"].tolist():
            batches = batches_of(self.listing, number, self.settings.batch)
            answers = self.pool.answers([item for _, item in batch] for batch in batches)
            for i, (batch, read) in enumerate(zip(batches, answers, strict=True)):
                rows = pickle.dumps(self.looker(batch, read))
                is_last = i == len(batches) - 1
                yield {
                    "number": np.array([number]),
                    "is_last": np.array([is_last]),
                    "rows": np.array([rows], object),
                }


@contextmanager
def _in_order(ray: Any) -> Iterator[None]:
    """Rows come out in the order of what went in."""
    context = ray.data.DataContext.get_current()
    kept = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = kept


@contextmanager
def _in_cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connected to a cluster; one that we started is stopped again."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WhatWhereError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
