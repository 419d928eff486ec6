"""Processes that read. One that dies is replaced; what it held is done again, then by halves to the guilty file."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from whatwhere.annotate.reading import Answer, Failed
from whatwhere.annotate.sources import Item
from whatwhere.errors import WhatWhereError
from whatwhere.images import printable

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How processes begin: from a small one, which holds no locks of ours."""
PATIENCE = 300.0
"""Seconds that one picture may take before its process is given up."""


@dataclass(eq=False)
class _Batch:
    """What was asked for together, and the answers so far."""

    items: Sequence[Item]
    answers: list[Answer | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.items)

    @property
    def is_done(self) -> bool:
        return None not in self.answers


@dataclass(eq=False)
class _Task:
    """A run of a batch's items that goes to one process; how often one has died of it."""

    batch: _Batch
    start: int
    stop: int
    deaths: int = 0

    @property
    def items(self) -> Sequence[Item]:
        return self.batch.items[self.start : self.stop]


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    is_ready: bool = False
    task: _Task | None = None
    since: float = 0.0


class Workers:
    """So many processes that run the same function; a context manager that ends them."""

    def __init__(self, read: Callable[[Item], Answer], count: int) -> None:
        """Starts them.

        Args:
            read: what can be pickled, and answers for any item.
            count: of processes.
        """
        self.read, self.count = read, count
        self._context: Any = multiprocessing.get_context(START)
        if START == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._workers.append(self._started())
        self.deaths = 0
        """Processes that had to be replaced."""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End them, at work or not."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
        self._workers = []

    def answers(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Answer]]:
        """What was read, batch by batch, in their order; so many are under way as there are processes, and two more.

        Raises:
            WhatWhereError: processes cannot start here.
        """
        given = iter(batches)
        under_way: deque[_Batch] = deque()
        to_do: deque[_Task] = deque()
        while True:
            while len(under_way) < self.count + 2 and (items := next(given, None)) is not None:
                batch = _Batch(items)
                under_way.append(batch)
                if items:
                    to_do.append(_Task(batch, 0, len(items)))
            self._assign(to_do)
            if not under_way:
                return
            if under_way[0].is_done:
                yield [one for one in under_way.popleft().answers if one is not None]
            else:
                self._attend(to_do)

    def _assign(self, to_do: deque[_Task]) -> None:
        for worker in self._workers:
            if not to_do:
                return
            if worker.task is None:
                worker.task, worker.since = to_do.popleft(), time.monotonic()
                with suppress(OSError):  # one that has died is seen to when it is attended to
                    worker.pipe.send(list(worker.task.items))

    def _attend(self, to_do: deque[_Task]) -> None:
        """Wait until a process has answered or died."""
        busy = [worker for worker in self._workers if worker.task is not None]
        found = set(wait([worker.pipe for worker in busy], timeout=1.0))
        for worker in busy:
            assert worker.task is not None
            if worker.pipe in found:
                try:
                    self._take(worker)
                    continue
                except (EOFError, OSError):
                    pass
            elif time.monotonic() - worker.since < PATIENCE * len(worker.task.items):
                continue
            self._bury(worker, to_do)

    def _take(self, worker: _Worker) -> None:
        said = worker.pipe.recv()
        if said == "ready":
            worker.is_ready = True
            return
        if isinstance(said, WhatWhereError):
            raise said
        task = worker.task
        assert task is not None
        task.batch.answers[task.start : task.stop] = said
        worker.task = None

    def _bury(self, worker: _Worker, to_do: deque[_Task]) -> None:
        """Put another process in the place of a dead one, and what it held in front of what is to be done."""
        worker.process.kill()
        worker.process.join()
        code, task = worker.process.exitcode, worker.task
        if not worker.is_ready:
            raise WhatWhereError(
                f"the processes that read pictures cannot start here: one ended with code {code} at once"
            )
        self.deaths += 1
        worker.pipe.close()
        worker.process.close()
        place = self._workers.index(worker)
        del self._workers[place]
        self._workers.insert(place, self._started())
        assert task is not None
        task.deaths += 1
        if task.deaths == 1 and task.start == 0 and task.stop == len(task.batch.items):
            to_do.appendleft(task)
        elif task.stop - task.start == 1:
            (item,) = task.items
            task.batch.answers[task.start] = Failed(
                f"{printable(item.name)}: reading it ends the process: {_why(code)}"
            )
        else:
            middle = (task.start + task.stop) // 2
            to_do.appendleft(_Task(task.batch, middle, task.stop))
            to_do.appendleft(_Task(task.batch, task.start, middle))

    def _started(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        # what a fork would keep open when the parent has gone
        not_its = [ours, *(worker.pipe for worker in self._workers)] if START == "fork" else []
        process = self._context.Process(target=_work, args=(theirs, self.read, not_its), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _why(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _work(pipe: Connection, read: Callable[[Item], Answer], not_its: Sequence[Connection]) -> None:
    """The life of a process: items in, answers out, until nobody asks any more."""
    import torch

    for other in not_its:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    torch.set_num_threads(1)
    try:
        pipe.send("ready")
        while True:
            pipe.send([read(item) for item in pipe.recv()])
    except WhatWhereError as error:
        pipe.send(error)
    except (EOFError, OSError):  # the parent has gone
        os._exit(0)
