"""Questions that wait together are looked at together, by one thread: torch's modules are one thread's at a time."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whatwhere.classifiers.classifier import Classifier
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
        self, nets: Mapping[str, Classifier], *, batch: int = 16, on_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        """Starts the thread.

        Args:
            nets: the classifiers, by the names that clients use.
            batch: pictures that go through a network at once, at most.
            on_batch: told how many there were, before each batch.
        """
        self.nets, self._batch, self._on_batch = dict(nets), batch, on_batch
        self._split: OrderedDict[tuple[str, str], Classifier] = OrderedDict()
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether questions are taken and answered."""
        return self._thread.is_alive() and not self._closing

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
        return future

    def close(self) -> None:
        """Take no more, answer those that wait, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            live = [one for one in batch if one.future.set_running_or_notify_cancel()]
            for one in live:
                if time.monotonic() > one.until:
                    one.future.set_exception(TimeoutError())
            live = [one for one in live if not one.future.done()]
            if live:
                self._on_batch(len(live))
                self._answer(live)
            del batch, live  # pictures are not kept while nobody asks

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

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            found = self._explained(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for one in batch:  # one of them is at fault: find it
                self._answer([one])
            return
        for one, answer in zip(batch, found, strict=True):
            threshold = one.asked.threshold
            one.future.set_result(
                answer if threshold is None else [replace(each, threshold=threshold) for each in answer]
            )

    def _explained(self, batch: list[_Waiting]) -> list[list[Explanation]]:
        asked = batch[0].asked
        net = self._net(asked.model, asked.layer)

        def choose(logits: Logits) -> list[list[int]]:
            return [classes_of(one.asked.target, net.labels, row) for one, row in zip(batch, logits, strict=True)]

        inputs = torch.stack([one.input for one in batch])
        photos, frames = [one.photo for one in batch], [one.frame for one in batch]
        return explain_inputs(net, inputs, frames, photos, choose, asked.method)

    def _net(self, model: str, layer: str | None) -> Classifier:
        if layer is None:
            return self.nets[model]
        key = model, layer
        if key not in self._split:
            self._split[key] = self.nets[model].at(layer)
            if len(self._split) > KEPT_LAYERS:
                self._split.popitem(last=False)
        self._split.move_to_end(key)
        return self._split[key]


def _key(one: _Waiting) -> tuple[str, str | None, str, int]:
    return one.asked.model, one.asked.layer, one.asked.method, one.asked.count
