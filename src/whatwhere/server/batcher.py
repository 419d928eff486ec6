"""Questions that wait together are looked at together, by a few threads: each has networks of its own."""

import copy
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.folding import folded
from whatwhere.errors import WhatWhereError
from whatwhere.explanation import Explanation, classes_of, explain_inputs
from whatwhere.geometry import Frame
from whatwhere.images import Photo
from whatwhere.server.asked import Asked
from whatwhere.types import Logits

KEPT_LAYERS = 8
"""Classifiers split at layers that clients named, kept for the next question."""


class ClosedError(WhatWhereError):
    """The batcher takes no more questions."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    asked: Asked
    photo: Photo
    input: Tensor
    frame: Frame
    future: "Future[list[Explanation]]"
    until: float


class Batcher:
    """Answers questions in batches of one model, layer, method and number of classes, oldest first."""

    def __init__(
        self,
        nets: Mapping[str, Classifier],
        *,
        batch: int = 16,
        at_once: int = 1,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Starts the threads. They look on folded networks, and on whole ones where a layer is named.

        Args:
            nets: the classifiers, by the names that clients use.
            batch: pictures that go through a network at once, at most.
            at_once: batches that are looked at at once, each on its share of torch's threads.
            on_batch: told how many there were, before each batch.
        """
        self.nets, self._batch, self._on_batch = dict(nets), batch, on_batch
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing, self._busy, self._most = False, 0, torch.get_num_threads()
        # copied before anybody looks: a network that looks has hooks of that look
        own = self.nets, {name: folded(net) for name, net in self.nets.items()}
        several = [own, *(copy.deepcopy(own) for _ in range(at_once - 1))]
        self._threads = [threading.Thread(target=self._run, args=[_Networks(*one)], daemon=True) for one in several]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether questions are taken and answered."""
        return all(thread.is_alive() for thread in self._threads) and not self._closing

    @property
    def waiting(self) -> int:
        """Questions in the queue."""
        return len(self._waiting)

    def submit(self, asked: Asked, photo: Photo, seconds: float) -> "Future[list[Explanation]]":
        """Queue a question; it is dropped unseen where nobody looks at it in time, or its future is cancelled.

        Args:
            asked: what of it.
            photo: the picture.
            seconds: how long it may wait.

        Raises:
            ClosedError: the batcher is closed.
        """
        tensor, frame = self.nets[asked.model].preprocess(photo)
        future: Future[list[Explanation]] = Future()
        with self._changed:
            if self._closing:
                raise ClosedError("this server is stopping")
            self._waiting.append(_Waiting(asked, photo, tensor, frame, future, time.monotonic() + seconds))
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: "Future[list[Explanation]]") -> None:
        """A question that was given up leaves the queue, and its picture with it."""
        if future.cancelled():
            with self._changed:
                self._waiting = deque(one for one in self._waiting if one.future is not future)

    def close(self) -> None:
        """Take no more, answer those that wait, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, own: "_Networks") -> None:
        while batch := self._next():
            live = _in_time(batch)
            if live:
                self._on_batch(len(live))
                with self._share():
                    self._answer(live, own)
            del batch, live  # pictures are not kept while nobody asks

    @contextmanager
    def _share(self) -> Iterator[None]:
        """Torch's threads, shared among those that look now."""
        with self._changed:
            self._busy += 1
            busy = self._busy
        if len(self._threads) > 1:
            torch.set_num_threads(max(1, self._most // busy))  # of this thread
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1

    def _next(self) -> list[_Waiting]:
        """The oldest question and those that go with it; nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            taken: list[_Waiting] = []
            left: deque[_Waiting] = deque()
            for one in self._waiting:
                fits = not taken or _key(one) == _key(taken[0])
                (taken if fits and len(taken) < self._batch else left).append(one)
            self._waiting = left
            return taken

    def _answer(self, batch: list[_Waiting], own: "_Networks") -> None:
        try:
            found = self._explained(batch, own)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for one in batch:  # one of them is at fault: find it
                self._answer([one], own)
            return
        for one, answer in zip(batch, found, strict=True):
            threshold = one.asked.threshold
            one.future.set_result(
                answer if threshold is None else [replace(each, threshold=threshold) for each in answer]
            )

    def _explained(self, batch: list[_Waiting], own: "_Networks") -> list[list[Explanation]]:
        asked = batch[0].asked
        net = own.of(asked.model, asked.layer)

        def choose(logits: Logits) -> list[list[int]]:
            return [classes_of(one.asked.target, net.labels, row) for one, row in zip(batch, logits, strict=True)]

        inputs = torch.stack([one.input for one in batch])
        photos, frames = [one.photo for one in batch], [one.frame for one in batch]
        return explain_inputs(net, inputs, frames, photos, choose, asked.method)


class _Networks:
    """The classifiers of one thread: torch's modules are one thread's at a time."""

    def __init__(self, whole: Mapping[str, Classifier], lean: Mapping[str, Classifier]) -> None:
        self._whole, self._lean = whole, lean
        self._split: OrderedDict[tuple[str, str], Classifier] = OrderedDict()

    def of(self, model: str, layer: str | None) -> Classifier:
        if layer is None:
            return self._lean[model]
        key = model, layer
        if key not in self._split:
            self._split[key] = self._whole[model].at(layer)
            if len(self._split) > KEPT_LAYERS:
                self._split.popitem(last=False)
        self._split.move_to_end(key)
        return self._split[key]


def _in_time(batch: list[_Waiting]) -> list[_Waiting]:
    """Those that somebody still waits for; the others are told."""
    live = [one for one in batch if one.future.set_running_or_notify_cancel()]
    for one in live:
        if time.monotonic() > one.until:
            one.future.set_exception(TimeoutError())
    return [one for one in live if not one.future.done()]


def _key(one: _Waiting) -> tuple[str, str | None, str, int]:
    return one.asked.model, one.asked.layer, one.asked.method, one.asked.count
