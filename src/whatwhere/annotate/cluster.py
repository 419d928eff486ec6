"""The work on many machines: the same functions under Ray Data. It schedules, queues and tries again; we do not.

batches -> map_batches(read, tasks) -> map_batches(Looking, actors that hold the model) -> rows, in order
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
"""Batches as Ray holds them: of each its part, whether it is the part's last, and what is to be done, as bytes."""
BLOCK = 32 * 2**20
"""Bytes that go from a task to a model at once."""
READER = 1.0
"""Processors that a task which reads takes; one is always left for such tasks, or models would wait for ever."""


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
        reader: what tasks run.
        net: the classifier, which goes to every actor once.
        settings: of the run.
        model: digest of the classifier.
        workers: actors; by default as many as leave a processor for reading.
        address: of a cluster; by default one of this machine's own, or the one that the program is in.
        watch: is told every batch's rows.

    Raises:
        MissingExtraError: Ray is not installed.
        UnsupportedError: the cluster has no processor.
    """
    with extra("scale", "--engine ray"):
        import ray.data
    with _in_cluster(ray, address):
        processors = _processors(ray)
        if processors <= 0:
            raise UnsupportedError("the Ray cluster has no processor; start it with --num-cpus")
        actors, share = shares(processors, workers)
        held = ray.put((net, settings, model))
        of_list = {"folder": listing.folder, "images": listing.images, "part": listing.part}
        with _in_order(ray):
            # a row a part; what a task reads of it streams on to the models, a row a batch
            told = [{"number": number} for number in parts]
            numbers = ray.data.from_items(told, override_num_blocks=len(told))
            options = {"reader": reader, "of_list": of_list, "size": settings.batch}
            read: Any = numbers.map_batches(
                _read,  # type: ignore[arg-type]
                batch_size=1,
                fn_kwargs=options,
                num_cpus=min(READER, share),
            )
            looked = read.map_batches(
                Looking, batch_size=1, fn_constructor_args=(held,), concurrency=actors, num_cpus=share
            )
            rows: list[Row] = []
            for found in looked.iter_rows():
                own = pickle.loads(found["rows"])
                watch(own)
                rows += own
                if found["is_last"]:
                    yield int(found["part"]), rows
                    rows = []


def _processors(ray: Any) -> float:
    return float(ray.cluster_resources().get("CPU", 0))


def shares(processors: float, workers: int | None) -> tuple[int, float]:
    """How many models a cluster holds, and how many processors each takes, so that one is left for reading."""
    if processors < 2:
        return workers or 1, processors / 2 / (workers or 1)
    most = int(processors) - 1
    return min(workers or most, most), 1.0


_pool: Workers | None = None


def _read(block: Block, reader: Reader, of_list: dict[str, Any], size: int) -> Iterator[Block]:
    """Parts -> their batches, read in a process of the task's own: what a file does to it is a row, and no retry."""
    global _pool
    if _pool is None or _pool.read != reader:
        _pool = Workers(reader, 1)
    listing = Listing(**of_list)
    for number in block["number"].tolist():
        batches = batches_of(listing, number, size)
        answers = _pool.answers([item for _, item in batch] for batch in batches)
        for i, both in enumerate(zip(batches, answers, strict=True)):
            yield _block(number, i == len(batches) - 1, batch=pickle.dumps(both, protocol=5))


def _block(part: int, is_last: bool, **held: bytes) -> Block:
    values = {name: np.array([value], object) for name, value in held.items()}
    return {"part": np.array([part]), "is_last": np.array([is_last]), **values}


class Looking:
    """An actor that holds the model."""

    def __init__(self, held: Any) -> None:
        import ray
        import torch

        torch.set_num_threads(1)
        net, settings, model = ray.get(held)
        self.looker = Looker(net, settings, model)

    def __call__(self, block: Block) -> Block:
        """The rows of a batch."""
        items, answers = pickle.loads(block["batch"][0])
        rows = pickle.dumps(self.looker(items, answers))
        return _block(int(block["part"][0]), bool(block["is_last"][0]), rows=rows)


@contextmanager
def _in_order(ray: Any) -> Iterator[None]:
    """Rows come out in the order of what went in, in blocks that stream."""
    context = ray.data.DataContext.get_current()
    kept = context.execution_options.preserve_order, context.enable_progress_bars, context.target_max_block_size
    context.execution_options.preserve_order = True
    context.enable_progress_bars, context.target_max_block_size = False, BLOCK
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars, context.target_max_block_size = kept


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
