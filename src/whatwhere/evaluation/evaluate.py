"""A classifier and a data set -> tallies: what it says, and whether where it sees that is true.

photos -> trace -> maps of the true classes -> heat in the protocol's pixels -> Tally, sixty-four images at a time
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.classifier import Classifier, Trace
from whatwhere.datasets.sample import Dataset, Sample
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.evaluation.agreement import agreements
from whatwhere.evaluation.baselines import BASELINES
from whatwhere.evaluation.classification import (
    classification_tally,
    highest,
    map_scores,
    top_hits,
)
from whatwhere.evaluation.faithfulness import (
    brought,
    faithfulness,
    randomized,
    sensitivity,
    similarity_when_randomized,
)
from whatwhere.evaluation.localization import (
    SHARES,
    Overlaps,
    at,
    boxes_tally,
    histogram,
    pixels_tally,
)
from whatwhere.evaluation.protocols import HALF_OPEN, Protocol, find_protocol, region_of
from whatwhere.evaluation.results import KEPT, Evaluation
from whatwhere.evaluation.saliency import saliency
from whatwhere.evaluation.shortcuts import Lies, lies, on_object, shortcuts_tally
from whatwhere.evaluation.tally import Tally, means
from whatwhere.evaluation.trusted import trust_tally
from whatwhere.explanation import THRESHOLD, check_batch, find_method, threshold_of, trust_in
from whatwhere.geometry import Box, Frame
from whatwhere.images import Photo
from whatwhere.maps import Method
from whatwhere.maps.shape import positive
from whatwhere.presets import Preset
from whatwhere.regions.trust import Signals, signals_of
from whatwhere.scores import of_class
from whatwhere.types import Heat, Truth

CHUNK = 64
"""Images that are counted together; where a run is cut into shards, and where it can be taken up again."""


@dataclass(frozen=True)
class Plan:
    """What is measured of what; two evaluations of one plan can be added.

    Attributes:
        methods: by their names.
        protocol: the rules.
        batch: images that go through the network at once.
        baselines: measure them beside.
        faithful: ask the network again about changed images: hundreds of forwards an image and method. Of a preset
            it is the map that is measured, before the picture's edges.
        mapping: which of the classifier's classes the data set's are, where names do not say it.
        notes: plain data for the settings.
    """

    methods: Mapping[str, Method]
    protocol: Protocol = HALF_OPEN
    batch: int = 16
    baselines: bool = True
    faithful: bool = False
    mapping: Mapping[str, int | str] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def plan_of(
    methods: Sequence[str | Method] = ("gradcam",), protocol: str | Protocol = HALF_OPEN, **options: Any
) -> Plan:
    """A plan of methods and a protocol by their names.

    Raises:
        InputError: unknown or repeated ones; a batch of less than 1.
    """
    named = {
        one if isinstance(one, str) else getattr(one, "__name__", repr(one)): find_method(one) for one in methods
    }
    if len(named) != len(methods) or not named:
        raise InputError(f"wanted methods, each once, got {list(methods)}")
    plan = Plan(named, find_protocol(protocol), **options)
    check_batch(plan.batch)
    return plan


def evaluate(net: Classifier, dataset: Dataset, plan: Plan) -> Evaluation:
    """All of a data set; as ``evaluate_each``."""
    parts = evaluate_each(net, dataset, plan)
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def evaluate_each(
    net: Classifier, dataset: Dataset, plan: Plan, *, chunks: Sequence[int] | None = None
) -> Iterator[Evaluation]:
    """Evaluate a data set part by part; whatever parts are done where, and in what order, their sum is the same.

    Every image that shows a class of the classifier is classified; the map of every class that it shows is compared
    with the boxes and masks of that class, where there are any.

    Args:
        net: the classifier.
        dataset: its samples.
        plan: methods and rules.
        chunks: which parts, of CHUNK images each; by default all.

    Raises:
        InputError: the classifier knows none of the classes; the protocol is not for how it sees images.
        UnsupportedError: a method does not apply to it.
    """
    settings = settings_of(net, dataset, plan)
    shuffled = randomized(net) if plan.faithful else None
    for chunk in range(chunks_in(len(dataset))) if chunks is None else chunks:
        samples = list(dataset.samples[chunk * CHUNK : (chunk + 1) * CHUNK])
        part = _Part(net, plan, settings["numbers"], settings["indices"], shuffled)
        for start in range(0, len(samples), plan.batch):
            part.look(samples[start : start + plan.batch])
        yield replace(part.counted(settings), chunks=frozenset([chunk]))


def chunks_in(images: int) -> int:
    """How many parts so many images make."""
    return -(-images // CHUNK)


def settings_of(net: Classifier, dataset: Dataset, plan: Plan) -> dict[str, Any]:
    """What evaluations must have in common to be added.

    Raises:
        InputError: the classifier knows none of the classes; the protocol is not for how it sees images.
    """
    plan.protocol.check(net)
    indices = dataset.indices_in(net.labels, plan.mapping)
    return {
        "model": net.name,
        "data": dataset.name,
        "methods": list(plan.methods),
        "protocol": plan.protocol.name,
        "batch": plan.batch,
        "baselines": list(BASELINES) if plan.baselines else [],
        "faithful": plan.faithful,
        "classes": [dataset.classes[label] for label in indices],
        "numbers": list(indices),
        "labels": [net.labels[index] for index in indices.values()],
        "indices": list(indices.values()),
        "images": len(dataset),
        "thresholds": {name: net.thresholds[name] for name in plan.methods if name in net.thresholds},
        "trusts": {name: net.trusts[name] for name in plan.methods if name in net.trusts},
        "fingerprint": [_fingerprint_of_data(dataset), _fingerprint_of_weights(net)],
        **plan.notes,
    }


def _fingerprint_of_data(dataset: Dataset) -> int:
    """Of what the data set says; masks count by being there."""
    found = 0
    for one in dataset:
        boxes = [(label, [box.to_list() for box in several]) for label, several in sorted(one.boxes.items())]
        found = zlib.crc32(repr((one.name, one.labels, boxes, one.read_truth is None)).encode(), found)
    return found


def _fingerprint_of_weights(net: Classifier) -> int:
    found = zlib.crc32(repr((net.preprocess, getattr(net, "layer", None))).encode())
    heads = [] if net.distilled is None else list(net.distilled.state_dict().values())
    for tensor in [*net.network.state_dict().values(), *heads]:
        found = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy(), found)
    return found


@dataclass
class _Place:
    """An image, and a class that it shows."""

    row: dict[str, Any]
    number: int
    top1: bool
    top5: bool
    boxes: tuple[Box, ...]
    truth: Truth | None
    found: dict[str, "_Found"] = field(default_factory=dict)
    agreements: dict[str, float] = field(default_factory=dict)


@dataclass
class _Found:
    """What a method's map of a class in an image is worth."""

    overlaps: Overlaps | None
    pixels: np.ndarray | None
    lies: Lies
    numbers: dict[str, float]
    signals: Signals | None = None


class _Part:
    """Images of one chunk, until they are counted."""

    def __init__(
        self, net: Classifier, plan: Plan, labels: list[int], indices: list[int], shuffled: Classifier | None
    ) -> None:
        self.net, self.plan, self.shuffled = net, plan, shuffled
        self.thresholds = {name: threshold_of(net.thresholds, method) for name, method in plan.methods.items()}
        self.labels = labels
        self.classes = {label: number for number, label in enumerate(labels)}
        self.indices = np.array(indices)
        self.names: list[str] = []
        self.probabilities: list[np.ndarray] = []
        self.shown: list[np.ndarray] = []
        self.by_maps: list[np.ndarray] = []
        self.places: list[_Place] = []
        self.failed: dict[str, str] = {}
        self.left_out = 0

    def look(self, samples: Sequence[Sample]) -> None:
        """One batch through the network."""
        seen: list[tuple[Sample, Photo, Tensor, Frame]] = []
        wanted = [one for one in samples if not one.labels or any(label in self.classes for label in one.labels)]
        self.left_out += len(samples) - len(wanted)
        for sample in wanted:
            try:
                photo = sample.photo()
                seen.append((sample, photo, *self.net.preprocess(photo)))
            except DataError as error:
                self.failed[sample.name] = str(error)
        if not seen:
            return
        trace = self.net.trace(torch.stack([image for _, _, image, _ in seen]).to(self.net.device))
        logits = trace.logits.detach()
        probabilities = self.net.probabilities(logits).cpu().numpy()
        scores = self._scores_by_maps(trace)
        places: list[list[_Place]] = []
        for i, (sample, photo, _, _) in enumerate(seen):
            places.append([])
            if not bool(logits[i].isfinite().all()):
                self.failed[sample.name] = f"{sample.name}: {self.net.name} gives nan or infinite logits"
                continue
            shown = np.zeros(len(self.indices), dtype=bool)
            shown[[self.classes[label] for label in sample.labels if label in self.classes]] = True
            try:
                places[i] = [
                    self._place(sample, photo, label, probabilities[i]) for label in np.flatnonzero(shown).tolist()
                ]
            except DataError as error:
                self.failed[sample.name] = str(error)
                continue
            self.names.append(sample.name)
            self.probabilities.append(probabilities[i])
            self.shown.append(shown)
            if scores is not None:
                self.by_maps.append(scores[i])
        for slot in range(max(map(len, places), default=0)):
            self._where(trace, [(photo.pixels, frame) for _, photo, _, frame in seen], places, slot)
        self.places += [place for several in places for place in several]

    def _scores_by_maps(self, trace: Trace) -> Float[np.ndarray, "b k"] | None:
        try:
            maps = self.net.class_maps(trace)
        except UnsupportedError:
            return None
        linear = self.net.linear(trace.features.shape[1])
        assert linear is not None
        return map_scores(maps, linear.bias, self.net.activation).detach().cpu().numpy()

    def _place(self, sample: Sample, photo: Photo, number: int, probabilities: np.ndarray) -> _Place:
        label, index = self.labels[number], int(self.indices[number])
        truth = sample.truth(label, photo.size)
        boxes = sample.boxes_of(label, truth)
        if truth is None and boxes:
            truth = region_of(boxes, photo.size)
        (order,) = highest(probabilities[None], 5)
        row = {
            "name": sample.name,
            "class": number,
            "predicted": int(order[0]),
            "label": self.net.labels[int(order[0])],
            "probability": round(float(probabilities[index]), 6),
            "confidence": round(float(probabilities[order[0]]), 6),
            "where": {},
        }
        return _Place(row, number, bool(order[0] == index), index in order.tolist(), boxes, truth)

    def _where(
        self, trace: Trace, pictures: list[tuple[np.ndarray, Frame]], places: list[list[_Place]], slot: int
    ) -> None:
        """The maps of every image's class number ``slot``; images that show fewer repeat their last one, unread."""
        known = [several[min(slot, len(several) - 1)].number if several else 0 for several in places]
        targets = self.indices[known]
        score = of_class(torch.from_numpy(targets).to(trace.logits.device))
        inside = [i for i, several in enumerate(places) if slot < len(several)]
        maps: dict[str, Tensor] = {}
        looks: dict[str, list[Tensor]] = {}
        for name, method in self.plan.methods.items():
            found, several = method.seen(trace, score) if isinstance(method, Preset) else (method(trace, score), [])
            maps[name], looks[name] = found.detach(), [positive(look.detach()).cpu() for look in several]
        protocol = self.plan.protocol
        for i in inside:
            pixels, frame = pictures[i]
            heats = {name: protocol.heat(_finite(several[i]), frame) for name, several in maps.items()}
            for name, method in self.plan.methods.items():
                if isinstance(method, Preset) and method.refine:
                    heats[name] = method.refine(heats[name], protocol.pixels(pixels))
            self._compare(
                heats, {name: [_finite(look[i]) for look in looks[name]] for name in looks}, places[i][slot], frame
            )
        size = (trace.images.shape[2], trace.images.shape[3])
        for name, own in maps.items() if self.shuffled is not None else ():
            for i, heat in zip(inside, brought(own[inside], size), strict=True):
                numbers = self._asked_again(name, trace.images[i], heat, int(targets[i]))
                places[i][slot].found[name].numbers |= numbers

    def _compare(
        self, heats: dict[str, Heat], looks: dict[str, list[np.ndarray]], place: _Place, frame: Frame
    ) -> None:
        protocol = self.plan.protocol
        place.agreements = agreements(heats)
        for name in BASELINES if self.plan.baselines else ():
            heats[name] = BASELINES[name](protocol.size(frame.original), place.row["name"])
        truth = None if place.truth is None else protocol.truth(place.truth)
        area = None if truth is None else on_object(truth)
        for name, heat in heats.items():
            place.found[name] = found = self._compared(heat, place, truth, area, frame)
            if found.overlaps and name in self.plan.methods:
                found.signals = signals_of(heat, self.thresholds[name], place.row["confidence"], looks[name])
            place.row["where"][name] = _noted(found, self.thresholds.get(name, THRESHOLD))
        place.truth = None  # of the size of the picture, and no longer needed

    def _compared(self, heat: Heat, place: _Place, truth: Truth | None, area: float | None, frame: Frame) -> _Found:
        protocol = self.plan.protocol
        name, levels = place.row["name"], protocol.levels(heat)
        numbers = {} if truth is None else saliency(heat, truth)
        return _Found(
            protocol.overlaps(heat, levels, place.boxes, frame.original, name) if place.boxes else None,
            None if truth is None else histogram(levels, truth),
            lies(heat, numbers.get("energy"), area),
            numbers,
        )

    def _asked_again(self, name: str, image: Tensor, heat: Tensor, label: int) -> dict[str, float]:
        assert self.shuffled is not None
        method = self.plan.methods[name]
        (same,) = similarity_when_randomized(self.net, self.shuffled, image[None], label, method)
        return {
            **faithfulness(self.net, image, heat, label),
            "sensitivity": sensitivity(self.net, image, label, method),
            "CC when randomized": same,
        }

    def counted(self, settings: dict[str, Any]) -> Evaluation:
        """The tallies of what was looked at."""
        tally = Tally()
        if self.names:
            shown = np.stack(self.shown)
            tally += classification_tally(self.names, np.stack(self.probabilities), shown, self.indices).called(
                "what"
            )
            if self.by_maps:
                tally += self._by_maps(shown).called("by maps")
        for method in (*self.plan.methods, *(BASELINES if self.plan.baselines else ())):
            tally += self._of_method(method).called(method)
        tally += _means(self.places, [place.agreements for place in self.places]).called("agreement")
        rows = tuple(place.row for place in self.places)
        return Evaluation(settings, tally, rows, self.failed, self.left_out)

    def _by_maps(self, shown: np.ndarray) -> Tally:
        hits = top_hits(np.stack(self.by_maps), shown, self.indices)
        known = shown.any(1)
        values = {"map-scored top-1": hits[:, 0], "map-scored top-5": hits.any(1)}
        return means(self.names, {name: np.where(known, hit, np.nan) for name, hit in values.items()})

    def _of_method(self, method: str) -> Tally:
        places = [place for place in self.places if method in place.found]
        found = [place.found[method] for place in places]
        tally = _means(places, [one.numbers for one in found])
        if boxed := [(place, one.overlaps) for place, one in zip(places, found, strict=True) if one.overlaps]:
            tally += boxes_tally(
                [place.row["name"] for place, _ in boxed],
                [overlaps for _, overlaps in boxed],
                np.array([place.top1 for place, _ in boxed]),
                np.array([place.top5 for place, _ in boxed]),
            )
            if method in self.plan.methods:
                trusting, share = trust_in(self.net, self.plan.methods[method]), at(self.thresholds[method])
                seen = [(place, one) for place, one in zip(places, found, strict=True) if one.overlaps]
                tally += trust_tally(
                    [place.row["name"] for place, _ in seen],
                    np.array([trusting(one.signals) if one.signals else 0.0 for _, one in seen]),
                    np.array([one.overlaps.largest[share] >= 0.5 for _, one in seen if one.overlaps]),
                )
        if masked := [
            (place, one.pixels) for place, one in zip(places, found, strict=True) if one.pixels is not None
        ]:
            tally += pixels_tally([place.row["name"] for place, _ in masked], [pixels for _, pixels in masked])
        where = shortcuts_tally([place.number for place in places], [one.lies for one in found], len(self.indices))
        return tally + where.called("shortcuts")


def _means(places: Sequence[_Place], numbers: Sequence[Mapping[str, float]]) -> Tally:
    keys = dict.fromkeys(key for one in numbers for key in one)
    values = {key: np.array([one.get(key, np.nan) for one in numbers]) for key in keys}
    return means([place.row["name"] for place in places], values)


def _finite(map: Tensor) -> np.ndarray:
    """A map with nan in it shows nothing."""
    return torch.where(map.isfinite().all(), map, 0).cpu().numpy()


def _noted(found: _Found, threshold: float) -> dict[str, Any]:
    notes: dict[str, Any] = {key: round(value, 6) for key, value in found.numbers.items() if key in NOTED}
    if found.overlaps:
        kept = np.round(found.overlaps.largest[:: len(SHARES) // KEPT] * 255).astype(np.uint8)
        notes["iou"] = kept.tobytes().hex()
        if found.signals:
            notes["signals"] = [round(one, 6) for one in found.signals]
            notes["right"] = bool(found.overlaps.largest[at(threshold)] >= 0.5)
    return notes


NOTED = ("energy", "pointing")
"""Of the numbers of an image, those that tables of images have."""
