"""The work on one machine: processes that read, threads that look, parts in order, bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import torch

from whatwhere.annotate.listing import Listing
from whatwhere.annotate.looking import Looker
from whatwhere.annotate.reading import Reader
from whatwhere.annotate.rows import Row
from whatwhere.annotate.sources import Item
from whatwhere.annotate.workers import Workers

MOST = 16
"""Threads that look at once; each holds the activations of a batch."""
Batch = list[tuple[int, Item]]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches_of(listing: Listing, number: int, size: int) -> list[Batch]:
    """A part's pictures as they go through the network together; of the list alone, never of who does it."""
    items = listing.items(number)
    return [items[start : start + size] for start in range(0, len(items), size)]


def annotate_parts(
    listing: Listing,
    parts: Iterable[int],
    reader: Reader,
    looker: Callable[[], Looker],
    *,
    batch: int,
    workers: int,
    watch: Callable[[list[Row]], None],
) -> Generator[tuple[int, list[Row]], None, None]:
    """The rows of each part, in order.

    Args:
        listing: the pictures.
        parts: numbers of those to do.
        reader: what the processes run.
        looker: makes what the threads run, while the processes start.
        batch: pictures that go through the network at once.
        workers: processes.
        watch: is told every batch's rows.
    """
    order: deque[tuple[int, Batch, bool]] = deque()

    def asked() -> Iterator[list[Item]]:
        for number in parts:
            several = batches_of(listing, number, batch)
            for i, one in enumerate(several):
                order.append((number, one, i == len(several) - 1))
                yield [item for _, item in one]

    with (
        Workers(reader, workers) as pool,
        _one_thread_each(looker) as (look, threads),
        ThreadPoolExecutor(threads) as looking,
    ):
        under_way: deque[tuple[int, bool, Future[list[Row]]]] = deque()
        rows: list[Row] = []

        def gathered(most: int) -> Iterator[tuple[int, list[Row]]]:
            nonlocal rows
            while len(under_way) > most:
                number, is_last, future = under_way.popleft()
                found = future.result()
                watch(found)
                rows += found
                if is_last:
                    yield number, rows
                    rows = []

        try:
            for answers in pool.answers(asked()):
                number, items, is_last = order.popleft()
                under_way.append((number, is_last, looking.submit(look, items, answers)))
                yield from gathered(threads + 1)
            yield from gathered(0)
        finally:
            for _, _, future in under_way:
                future.cancel()


@contextmanager
def _one_thread_each(looker: Callable[[], Looker]) -> Iterator[tuple[Looker, int]]:
    """The looker, and how many threads look: as many as there are cores, where its engine lets them."""
    threads, of_opencv = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        look = looker()
        if not look.is_many:
            torch.set_num_threads(threads)
        yield look, min(threads, cores(), MOST) if look.is_many else 1
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(of_opencv)
