"""A data set -> what each picture looks like to a network: its features pooled where it looks, and over all of it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from whatwhere.classifiers.classifier import Classifier, Trace
from whatwhere.datasets.sample import Dataset, Sample
from whatwhere.errors import DataError, InputError
from whatwhere.explanation import find_method, threshold_of
from whatwhere.geometry import Box, Frame
from whatwhere.images import Photo
from whatwhere.maps import Method
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.regions.components import components
from whatwhere.regions.threshold import mask_of
from whatwhere.scores import of_class
from whatwhere.types import Maps, Size

SIDE = 64
"""Pixels of the small grey pictures."""


@dataclass(frozen=True, eq=False)
class Pooled:
    """Pictures (p), and the classes that each of them shows as entries (n): one for each picture and class.

    Attributes:
        samples: the pictures that could be read.
        whole: features averaged over the picture, whatever it shows.
        small: the picture in grey, squashed to ``SIDE`` x ``SIDE``.
        digests: of its pixels.
        pictures: of each entry, which picture.
        labels: of each entry, which class of the data set.
        where: features averaged with the map of the class as weights.
        boxes: around what the map shows, in pixels of the original; None where it shows nothing.
        classes: of the data set.
        unknown: those of which the classifier has none of the same name; their maps are of what it says first.
        failed: pictures that could not be used, and why.
    """

    samples: tuple[Sample, ...]
    whole: Float[np.ndarray, "p c"]
    small: UInt8[np.ndarray, "p s s"]
    digests: tuple[str, ...]
    pictures: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    where: Float[np.ndarray, "n c"]
    boxes: tuple[Box | None, ...]
    classes: tuple[str, ...]
    unknown: tuple[str, ...]
    failed: Mapping[str, str]


def pooled(
    net: Classifier,
    dataset: Dataset,
    *,
    method: str | Method = "gradcam",
    mapping: Mapping[str, int | str] | None = None,
    batch: int = 16,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Pooled:
    """Look at every picture once: ``sum_yx m F_c / sum_yx m`` of features F, with m the positive map of its class.

    Where the classifier does not have the class, the map is of the class that it says first: what it finds most
    telling in the picture is seldom its background. A map that is nowhere positive weighs all cells alike. Padding
    never counts. One batch of pictures is held at a time; 8 c + 4096 bytes are kept of a picture with one class.

    Args:
        net: the classifier; its classes need not be the data set's.
        dataset: its boxes and masks are not read.
        method: a map method, by name or as a function.
        mapping: which of the classifier's classes the data set's are, where names do not say it.
        batch: pictures that go through at once.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        DataError: no picture can be used.
        InputError: no such method, or classes in ``mapping`` that are not there.
        UnsupportedError: the method does not apply to the network.
    """
    look, share = find_method(method), threshold_of(net.thresholds, method)
    known: dict[int, int] = {}
    if mapping:
        known = dataset.indices_in(net.labels, mapping)
    else:
        with suppress(InputError):  # the classifier knows none of them
            known = dataset.indices_in(net.labels)
    failed: dict[str, str] = {}
    parts: list[_Part] = []
    samples, count = iter(dataset), 0
    while several := list(islice(samples, batch)):
        if part := _looked(net, several, look, share, known, failed):
            parts.append(part)
        count += len(several)
        seen(count, len(dataset))
    if not parts:
        raise DataError(f"{dataset.name}: no picture can be used: {next(iter(failed.values()), 'there is none')}")
    sizes = np.cumsum([0, *(len(part.samples) for part in parts)])
    shown = {label for sample in dataset for label in sample.labels}
    return Pooled(
        samples=tuple(sample for part in parts for sample in part.samples),
        whole=np.concatenate([part.whole for part in parts]),
        small=np.concatenate([part.small for part in parts]),
        digests=tuple(digest for part in parts for digest in part.digests),
        pictures=np.concatenate([part.pictures + start for part, start in zip(parts, sizes, strict=False)]),
        labels=np.concatenate([part.labels for part in parts]),
        where=np.concatenate([part.where for part in parts]),
        boxes=tuple(box for part in parts for box in part.boxes),
        classes=dataset.classes,
        unknown=tuple(one for label, one in enumerate(dataset.classes) if label in shown and label not in known),
        failed=failed,
    )


class _Part(NamedTuple):
    """What ``Pooled`` has, of one batch."""

    samples: list[Sample]
    whole: np.ndarray
    small: np.ndarray
    digests: list[str]
    pictures: np.ndarray
    labels: np.ndarray
    where: np.ndarray
    boxes: list[Box | None]


def _looked(
    net: Classifier,
    several: Sequence[Sample],
    look: Method,
    share: float,
    known: Mapping[int, int],
    failed: dict[str, str],
) -> _Part | None:
    opened: list[tuple[Sample, Photo, Tensor, Frame]] = []
    for sample in several:
        try:
            photo = sample.photo()
            opened.append((sample, photo, *net.preprocess(photo)))
        except DataError as error:
            failed[sample.name] = str(error)
    if not opened:
        return None
    trace = net.trace(torch.stack([pixels for *_, pixels, _ in opened]).to(net.device))
    features = trace.features.detach()
    grid = (features.shape[2], features.shape[3])
    covered = torch.stack([_covered(frame, grid) for *_, frame in opened]).to(features)
    good = (features.flatten(1).isfinite().all(1) & trace.logits.isfinite().all(1)).tolist()
    for (sample, *_), fine in zip(opened, good, strict=True):
        if not fine:
            failed[sample.name] = f"{sample.name}: {net.name} gives nan or infinite values"
    kept = [i for i, fine in enumerate(good) if fine]
    if not kept:
        return None
    place = {i: number for number, i in enumerate(kept)}
    pictures, labels, where, boxes = list[int](), list[int](), list[Tensor](), list[Box | None]()
    for slot in range(max(len(sample.labels) for sample, *_ in opened)):
        inside = [i for i in kept if slot < len(opened[i][0].labels)]
        # of pictures that show fewer classes the map is made, and not read
        own = [known.get(s.labels[slot] if slot < len(s.labels) else -1, -1) for s, *_ in opened]
        weights = _weights(trace, look, torch.tensor(own), covered)
        means = _mean(features, weights, covered)
        for i in inside:
            pictures.append(place[i])
            labels.append(opened[i][0].labels[slot])
            where.append(means[i])
            boxes.append(_box(weights[i : i + 1], opened[i][3], share))
    small = [cv2.cvtColor(opened[i][1].pixels, cv2.COLOR_RGB2GRAY) for i in kept]
    return _Part(
        [opened[i][0] for i in kept],
        _mean(features, covered, covered)[kept].float().cpu().numpy(),
        np.stack([cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for one in small]),
        [_digest(opened[i][1]) for i in kept],
        np.array(pictures, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        torch.stack(where).float().cpu().numpy() if where else np.zeros((0, features.shape[1]), np.float32),
        boxes,
    )


def _weights(trace: Trace, look: Method, known: Int[Tensor, "b"], covered: Maps) -> Maps:
    """The positive maps of some classes, or where -1 stands of those that the network says first; padding is 0."""
    known = known.to(trace.logits.device)
    indices = torch.where(known < 0, trace.logits.detach().nan_to_num().argmax(1), known)
    maps = positive(look(trace, of_class(indices)).detach())
    # some methods draw on a finer grid than the features'
    maps = functional.adaptive_avg_pool2d(maps[:, None], (covered.shape[1], covered.shape[2]))[:, 0] * covered
    return torch.where(maps.isfinite().flatten(1).all(1)[:, None, None], maps, 0)


def _mean(features: Float[Tensor, "b c y x"], weights: Maps, instead: Maps) -> Float[Tensor, "b c"]:
    """Features averaged with weights, or with others where those are all 0."""
    nothing = (weights.amax((1, 2)) <= 0)[:, None, None]
    weights = torch.where(nothing, instead, weights / weights.amax((1, 2), keepdim=True).clamp(min=1e-30))
    return torch.einsum("bcyx,byx->bc", features, weights / weights.sum((1, 2), keepdim=True))


def _covered(frame: Frame, grid: Size) -> Float[Tensor, "y x"]:
    """The share of each cell that is no padding."""
    (h, w), placed = frame.network, frame.placed
    shares = []
    for cells, side, start, stop in ((grid[0], h, placed.y0, placed.y1), (grid[1], w, placed.x0, placed.x1)):
        edges = (torch.arange(cells + 1) * (side / cells)).clamp(start, stop)
        shares.append(edges.diff() * (cells / side))
    return shares[0][:, None] * shares[1]


def _box(weights: Float[Tensor, "1 y x"], frame: Frame, share: float) -> Box | None:
    heat = upsample(unit(weights), frame.network)[0].float().cpu().numpy()
    found = components(mask_of(heat, share)).boxes
    return frame.to_original(found[0]) if found else None


def _digest(photo: Photo) -> str:
    return hashlib.sha1(repr(photo.size).encode() + photo.pixels.tobytes()).hexdigest()
