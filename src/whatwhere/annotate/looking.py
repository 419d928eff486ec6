"""Reads -> rows: the network, on the fastest engine at hand, the maps and the regions. This is what holds a model."""

import copy
import hashlib
import importlib.util
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from whatwhere.annotate.reading import Answer, Failed, Read, seen_as
from whatwhere.annotate.rows import Row, failed_row, rows_of
from whatwhere.annotate.sources import Item
from whatwhere.classifiers.classifier import Backend, Classifier
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.onnxfile import OnnxClassifier
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.explanation import Explanation, check_batch, explain_inputs, find_method, threshold_of
from whatwhere.geometry import Frame
from whatwhere.regions.threshold import Threshold, parsed
from whatwhere.types import Logits

Runs = Literal["torch", "onnxruntime", "openvino"]
"""What runs the network."""
SEVERAL = 0.5
"""Probability from which a class is there, of a classifier that knows any number of them in a picture."""
SMALL = 2000
"""Pictures, below which compiling takes longer than it gains."""


@dataclass(frozen=True)
class Settings:
    """All that decides what rows say, as plain data; part of ``run.json``.

    Attributes:
        method: name of a map method.
        threshold: of the map, as ``explain`` takes it.
        classes: indices of those that are asked for; all where there are none.
        batch: pictures that go through the network at once.
        backend: what runs the network.
        trust: weights and bias of what the boxes are trusted; None where nobody has measured it of this model.
    """

    method: str
    threshold: float | str
    classes: tuple[int, ...]
    batch: int
    backend: Runs
    trust: tuple[float, ...] | None = None


def settings_for(
    net: Classifier,
    *,
    method: str | None = None,
    threshold: Threshold | None = None,
    classes: Sequence[int | str] = (),
    batch: int = 16,
    backend: str | None = None,
    images: int = SMALL,
) -> Settings:
    """What is not told is chosen: the plain map where it is exact, and the fastest engine that gives it.

    Args:
        net: the classifier, not compiled.
        method: a name in METHODS; by default "cam" where the logits are linear in the pooled features, where
            Grad-CAM is the same map but for its scale, and "gradcam" elsewhere.
        threshold: of the map; by default what the model was calibrated to.
        classes: names or indices of those that are asked for.
        batch: pictures that go through the network at once.
        backend: torch, onnxruntime or openvino.
        images: how many there are to do.

    Raises:
        InputError: no such method, class, threshold or backend.
        UnsupportedError: the method does not apply to the network, or the engine does not run it.
    """
    check_batch(batch)
    if backend is not None and backend not in get_args(Runs):
        raise InputError(f"what runs the network is one of {', '.join(get_args(Runs))}, got {backend!r}")
    name, thresholds, trusts = method, net.thresholds, net.trusts
    noise = torch.randn(1, len(net.preprocess.mean), *net.preprocess.size).to(net.device)
    is_linear = True
    try:
        net.checked_linear(net.trace(noise))
    except UnsupportedError:
        is_linear = False
    if name is None:
        name = "cam" if is_linear else "gradcam"
        if "cam" not in thresholds:  # Grad-CAM's is the same map, but for its scale
            thresholds = {"cam": thresholds["gradcam"], **thresholds} if "gradcam" in thresholds else thresholds
            trusts = {"cam": trusts["gradcam"], **trusts} if "gradcam" in trusts else trusts
    find_method(name)
    told = next((one for one in get_args(Runs) if one == backend), None)
    chosen: Runs = told or _fastest(net, name if is_linear else "", images)
    return Settings(
        method=name,
        threshold=parsed(threshold_of(thresholds, name) if threshold is None else threshold),
        classes=tuple(dict.fromkeys(net.labels.find(one) for one in classes)),
        batch=batch,
        backend=chosen,
        trust=trusts.get(name),
    )


def _fastest(net: Classifier, method: str, images: int) -> Runs:
    """ONNX Runtime, else OpenVINO, for class maps out of the graph on a CPU; torch for all else."""
    if method != "cam" or net.device.type != "cpu" or images < SMALL or isinstance(net, OnnxClassifier):
        return "torch"
    for backend in ("onnxruntime", "openvino"):
        if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", backend)):
            return backend
    return "torch"


class Looker:
    """A model that makes rows of what was read. It may be asked from several threads at once."""

    def __init__(self, net: Classifier, settings: Settings, digest: str, kept: Path | None = None) -> None:
        """Compiles the network where the settings say so.

        Args:
            net: the classifier, not compiled.
            settings: of the run.
            digest: of the classifier, by ``digest_of_model``.
            kept: a file for the compiled graph, so that a run that goes on need not make it again.

        Raises:
            UnsupportedError: the engine does not run this network.
        """
        self.settings, self.digest = settings, digest
        backend: Backend | None = None if settings.backend == "torch" else settings.backend
        self._net = copy.copy(net) if backend is None else net.compiled(backend, kept=kept)
        if settings.trust is not None:
            self._net.trusts = self._net.trusts | {settings.method: settings.trust}
        self._own = threading.local()

    @property
    def is_many(self) -> bool:
        """Whether threads look at once, each of them alone: what comes out then does not depend on their number.

        OpenVINO takes one batch at a time, on all threads, and so does a GPU.
        """
        return self.settings.backend == "onnxruntime" or self._is_copied

    @property
    def _is_copied(self) -> bool:
        return self.settings.backend == "torch" and self._net.device.type == "cpu"

    @property
    def net(self) -> Classifier:
        """The classifier of this thread: torch's modules are one thread's at a time, so each has its copy."""
        if not self._is_copied:
            return self._net
        if not hasattr(self._own, "net"):
            self._own.net = copy.deepcopy(self._net)
        found: Classifier = self._own.net
        return found

    def __call__(self, items: Sequence[tuple[int, Item]], answers: Sequence[Answer]) -> list[Row]:
        """The rows of a batch, in order.

        Args:
            items: the pictures, each with its number in the source.
            answers: what was read of each.
        """
        read = [i for i, answer in enumerate(answers) if isinstance(answer, Read)]
        try:
            seen: Sequence[list[Explanation] | Failed] = self._seen([items[i][1] for i in read], _reads(answers))
        except DataError:  # one of them is at fault: find it
            seen = [self._seen_alone(items[i][1], answers[i]) for i in read]
        found, rows = dict(zip(read, seen, strict=True)), []
        for i, ((image, item), answer) in enumerate(zip(items, answers, strict=True)):
            one = found.get(i, answer)
            if isinstance(answer, Read) and isinstance(one, list):
                rows += rows_of(image, item, answer.digest, one, self.digest)
            elif isinstance(one, Failed):
                rows.append(failed_row(image, item, one, self.settings.method, self.digest))
        return rows

    def _seen(self, items: Sequence[Item], reads: Sequence[Read]) -> list[list[Explanation]]:
        if not reads:
            return []
        preprocess = self.net.preprocess
        frames: list[Frame] = [preprocess.frame(one.size) for one in reads]
        inputs = torch.stack([preprocess.normalized(one.resized, f) for one, f in zip(reads, frames, strict=True)])
        photos = [seen_as(item, one) for item, one in zip(items, reads, strict=True)]
        settings = self.settings
        return explain_inputs(self.net, inputs, frames, photos, self._chosen, settings.method, settings.threshold)

    def _seen_alone(self, item: Item, answer: Answer) -> list[Explanation] | Failed:
        assert isinstance(answer, Read)
        try:
            return self._seen([item], [answer])[0]
        except DataError as error:
            return Failed(str(error), answer.digest)

    def _chosen(self, logits: Logits) -> list[list[int]]:
        """The most probable class, of those asked for; of a classifier that knows several, all that are there."""
        wanted = torch.tensor(self.settings.classes or range(logits.shape[1]), device=logits.device)
        some = logits[:, wanted]
        first, there = some.argmax(1, keepdim=True), torch.zeros_like(some, dtype=torch.bool)
        if self.net.activation == "sigmoid":
            there = some.sigmoid() >= SEVERAL
        there = there.scatter(1, first, True)
        return [wanted[row].tolist() for row in there]


def _reads(answers: Sequence[Answer]) -> list[Read]:
    return [answer for answer in answers if isinstance(answer, Read)]


def digest_of_model(net: Classifier) -> str:
    """What tells one model from another: weights, labels, preprocessing, where it is split."""
    told = {
        "labels": list(net.labels),
        "preprocess": asdict(net.preprocess),
        "activation": net.activation,
        "name": net.name,
        "options": net.options,
        "layer": net.layer if isinstance(net, HookedClassifier) else None,
    }
    found = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    state = net.network.state_dict()
    if net.distilled is not None:
        state |= {f"distilled.{name}": tensor for name, tensor in net.distilled.state_dict().items()}
    for name, tensor in sorted(state.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()
