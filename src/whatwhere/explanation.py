"""The road: image -> what and where.

photo -> pixels + Frame -> images (b c h w) -> trace -> score -> map (b y x)
      -> positive, unit, to_original, refine: heat (H W) -> mask -> components -> Box
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.labels import Labels
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.geometry import Box, Frame
from whatwhere.images import MAX_PIXELS, Photo, Source, open_photo
from whatwhere.maps import METHODS, Method
from whatwhere.maps.shape import positive, to_original, unit
from whatwhere.presets import PRESETS, Preset, Refine, find_preset
from whatwhere.regions import rle
from whatwhere.regions.components import components
from whatwhere.regions.threshold import Threshold, mask_of, parsed
from whatwhere.regions.trust import Trust, signals_of
from whatwhere.scores import of_class
from whatwhere.types import Heat, Images, Logits, Mask, Pixels, Size

THRESHOLD = 0.25
"""A share of the maximum, for maps whose threshold nobody has measured."""

TRUST = PRESETS["fast"].trust
"""What boxes of methods are trusted, of which nobody has measured it."""

Target = int | str | Sequence[int | str]
"""A class by index or name, "top5" for the five most probable, or several of these."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What the classifier says of an image, where it sees that, and how sure it is. It knows no files.

    Attributes:
        source: what the image is called.
        pixels: (H W 3) the original image.
        index: of the class that is explained.
        label: its name.
        probability: the classifier's, in [0, 1].
        logit: the classifier's, before that.
        method: name of the map method.
        map: (y x) evidence for the class, raw and signed, one value a cell of the feature grid.
        frame: how the original lies in the network's input.
        threshold: what makes heat a mask.
        confidence: the highest probability of any class.
        looks: (y x) maps of single looks, where a preset has made the map of several.
        refine: heat and pixels -> a sharper heat, where a preset has that.
        trusting: what is seen of a box -> how far it is to be trusted.
    """

    source: str
    pixels: Pixels
    index: int
    label: str
    probability: float
    logit: float
    method: str
    map: Float[np.ndarray, "y x"]
    frame: Frame
    threshold: Threshold
    confidence: float
    looks: tuple[np.ndarray, ...] = ()
    refine: Refine | None = None
    trusting: Trust = TRUST

    @property
    def size(self) -> Size:
        """(H, W) of the original image."""
        return self.frame.original

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """One for each connected part of the mask, in original pixels, largest part first."""
        return components(self.mask).boxes

    @property
    def box(self) -> Box | None:
        """Around the largest component; None where nothing speaks for the class."""
        return self.boxes[0] if self.boxes else None

    @cached_property
    def heat(self) -> Heat:
        """(H W) in [0, 1]: the positive part of the map, in pixels of the original image, and refined by a preset."""
        unitary = unit(positive(torch.from_numpy(self.map)[None]))
        heat = to_original(unitary, self.frame)[0].numpy()
        return self.refine(heat, self.pixels) if self.refine else heat

    @cached_property
    def mask(self) -> Mask:
        """(H W): the pixels of all regions."""
        return mask_of(self.heat, self.threshold)

    @cached_property
    def trust(self) -> float:
        """The chance, in [0, 1], that the box's IoU with a true one of the class is at least .5; 0 without a box."""
        seen = signals_of(self.heat, self.threshold, self.confidence, self.looks)
        return 0.0 if seen is None else self.trusting(seen)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, as ``reports/explanation.schema.json`` describes it."""
        return {
            "source": self.source,
            "width": self.size[1],
            "height": self.size[0],
            "class_index": self.index,
            "label": self.label,
            "probability": self.probability,
            "logit": self.logit,
            "method": self.method,
            "threshold": self.threshold,
            "seen": self.frame.seen.to_list(),
            "trust": self.trust,
            "box": self.box.to_list() if self.box else None,
            "boxes": [box.to_list() for box in self.boxes],
            "mask": rle.encode(self.mask),
        }


@overload
def explain(  # type: ignore[overload-overlap]
    net: Classifier,
    images: Source | Photo,
    *,
    target: Target = ...,
    method: str | Method = ...,
    preset: str | None = ...,
    threshold: Threshold | None = ...,
) -> list[Explanation]: ...
@overload
def explain(
    net: Classifier,
    images: Sequence[Source | Photo],
    *,
    target: Target = ...,
    targets: Sequence[Target] | None = ...,
    method: str | Method = ...,
    preset: str | None = ...,
    threshold: Threshold | None = ...,
    batch: int = ...,
) -> list[list[Explanation]]: ...
def explain(
    net: Classifier,
    images: Source | Photo | Sequence[Source | Photo],
    *,
    target: Target = "top1",
    targets: Sequence[Target] | None = None,
    method: str | Method = "gradcam",
    preset: str | None = None,
    threshold: Threshold | None = None,
    batch: int = 16,
) -> list[Explanation] | list[list[Explanation]]:
    """Say what is in an image and where.

    Args:
        net: from ``whatwhere.load``.
        images: one image or several: paths, PIL images, uint8 arrays (H W), (H W 3) or (H W 4).
        target: what to explain, the same for every image: a class by index or name, "top5", or several.
        targets: instead of ``target``, something else for each image.
        method: a name in ``whatwhere.METHODS`` or ``whatwhere.PRESETS``, or a function
            (trace, score) -> maps (b y x).
        preset: instead of ``method``, how sharp and at what cost: "fast", "balanced" or "best".
        threshold: on the heat: a fraction of its maximum, "otsu", or "p90" for a percentile. By default what the
            classifier was calibrated to for the method, or the preset's own, or .25, which gave the best boxes on
            240 boxed photographs of Imagenette (embedded classifier, Grad-CAM).
        batch: images that go through the network at once.

    Returns:
        For one image, its explanations, one a target; for several, such a list for each.

    Raises:
        DataError: an image cannot be read, or the network gives nan for it; names which.
        InputError: an unknown class, method or preset (with the three nearest names), or as many targets as there
            are not images.
        UnsupportedError: the method does not apply to the network; names one that does.
    """
    method = find_preset(preset) if preset is not None else method
    if not isinstance(images, Sequence) or isinstance(images, str):
        if targets is not None:
            raise InputError("targets are for several images; one image takes target=...")
        return _explain_batch(net, [open_photo(images)], [target], method, threshold)[0]
    if targets is not None and len(targets) != len(images):
        raise InputError(f"one target for each image: got {len(targets)} for {len(images)} images")
    check_batch(batch)
    wanted = [target] * len(images) if targets is None else list(targets)
    found: list[list[Explanation]] = []
    for start in range(0, len(images), batch):
        photos = [_named(image, start + offset) for offset, image in enumerate(images[start : start + batch])]
        found += _explain_batch(net, photos, wanted[start : start + batch], method, threshold)
    return found


def explain_each(
    net: Classifier,
    images: Iterable[Source | Photo],
    *,
    target: Target = "top1",
    method: str | Method = "gradcam",
    preset: str | None = None,
    threshold: Threshold | None = None,
    batch: int = 16,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[list[Explanation] | DataError]:
    """As ``explain``, for any number of images, in order; one that cannot be used gives its error and no stop.

    Only one batch is held at a time.
    """
    check_batch(batch)
    given = enumerate(images)
    method = find_preset(preset) if preset is not None else method
    options: dict[str, Any] = {"target": target, "method": method, "threshold": threshold}
    while part := [_opened(image, number, max_pixels) for number, image in islice(given, batch)]:
        photos = [one for one in part if isinstance(one, Photo)]
        try:
            found: Iterator[list[Explanation] | DataError] = iter(explain(net, photos, batch=batch, **options))
        except DataError:  # one of them is at fault: find it
            found = (_one_or_error(net, photo, options) for photo in photos)
        results = [one if isinstance(one, DataError) else next(found) for one in part]
        del part, photos, found
        while results:
            yield results.pop(0)


def check_batch(batch: int) -> None:
    """Refuse a batch without images.

    Raises:
        InputError: it is of less than 1.
    """
    if batch < 1:
        raise InputError(f"a batch is of at least 1 image, got {batch}")


def _opened(image: Source | Photo, number: int, max_pixels: int) -> Photo | DataError:
    try:
        return _named(image, number, max_pixels)
    except DataError as error:
        return error
    except InputError as error:  # an array of another kind
        return DataError(str(error))


def _one_or_error(net: Classifier, photo: Photo, options: dict[str, Any]) -> list[Explanation] | DataError:
    try:
        return explain(net, photo, **options)
    except DataError as error:
        return error


def _named(image: Source | Photo, number: int, max_pixels: int = MAX_PIXELS) -> Photo:
    """Pixels have no name of their own; messages call them by their place in the list."""
    name = f"image {number}" if isinstance(image, np.ndarray | Image.Image) else None
    return open_photo(image, name=name, max_pixels=max_pixels)


def _explain_batch(
    net: Classifier, photos: list[Photo], targets: list[Target], method: str | Method, threshold: Threshold | None
) -> list[list[Explanation]]:
    if not photos:
        return []
    inputs, frames = zip(*(net.preprocess(photo) for photo in photos), strict=True)

    def choose(logits: Logits) -> list[list[int]]:
        return [classes_of(target, net.labels, row) for target, row in zip(targets, logits, strict=True)]

    return explain_inputs(net, torch.stack(inputs), list(frames), photos, choose, method, threshold)


def explain_inputs(
    net: Classifier,
    inputs: Images,
    frames: list[Frame],
    photos: list[Photo],
    choose: Callable[[Logits], list[list[int]]],
    method: str | Method = "gradcam",
    threshold: Threshold | None = None,
) -> list[list[Explanation]]:
    """As ``explain`` for one batch, of photos that are prepared already.

    Args:
        net: the classifier.
        inputs: (b d h w), what ``net.preprocess`` made of the photos, on any device.
        frames: how each lies in its input.
        photos: what the explanations are of.
        choose: from the logits (b k), the indices of the classes to explain in each, one at least.
        method: as of ``explain``.
        threshold: as of ``explain``.

    Raises:
        DataError: the network gives nan for one of them; names which.
        InputError: an unknown method.
        UnsupportedError: the method does not apply to the network.
    """
    function = find_method(method)
    name = _name_of(method)
    # a wrong one is said before any work
    threshold = parsed(threshold_of(net.thresholds, method) if threshold is None else threshold)
    preset, trusting = function if isinstance(function, Preset) else None, trust_in(net, method)
    trace = net.trace(inputs.to(net.device))
    logits = trace.logits.detach()
    _refuse_nan(logits, photos, f"{net.name} gives nan or infinite logits")
    probabilities = net.probabilities(logits).cpu()
    classes = choose(logits)
    maps, looks = [], []
    for slot in range(max(map(len, classes))):
        # images with fewer targets repeat their last one; it is not read
        indices = torch.tensor([row[min(slot, len(row) - 1)] for row in classes], device=logits.device)
        found, several = preset.seen(trace, of_class(indices)) if preset else (function(trace, of_class(indices)), [])
        maps.append(found.detach().cpu())
        looks.append([positive(look.detach()).cpu() for look in several])
        _refuse_nan(maps[-1], photos, f"{name} gives nan or infinite values on {net.name}")
    return [
        [
            Explanation(
                source=photo.source,
                pixels=photo.pixels,
                index=index,
                label=net.labels[index],
                probability=float(probabilities[i, index]),
                logit=float(logits[i, index]),
                method=name,
                map=maps[slot][i].numpy(),
                frame=frames[i],
                threshold=threshold,
                confidence=float(probabilities[i].max()),
                looks=tuple(look[i].numpy() for look in looks[slot]),
                refine=preset.refine if preset else None,
                trusting=trusting,
            )
            for slot, index in enumerate(classes[i])
        ]
        for i, photo in enumerate(photos)
    ]


def find_method(method: str | Method) -> Method:
    """A method by its name in ``METHODS`` or ``PRESETS``; functions pass through.

    Raises:
        InputError: no such method; names the three nearest.
    """
    if not isinstance(method, str):
        return method
    known = METHODS | PRESETS
    if method not in known:
        raise InputError(f"no method is called {method!r}; nearest: {nearest(method, known)}")
    return known[method]


def threshold_of(thresholds: Mapping[str, float], method: str | Method) -> float:
    """What makes a method's heat a mask: what a classifier was calibrated to, or a preset's own, or ``THRESHOLD``."""
    function = find_method(method)
    own = function.threshold if isinstance(function, Preset) else THRESHOLD
    return thresholds.get(_name_of(method), own)


def trust_in(net: Classifier, method: str | Method) -> Trust:
    """What a method's boxes are trusted: as the classifier was calibrated, or as a preset's own are, or ``TRUST``."""
    if (known := net.trusts.get(_name_of(method))) is not None:
        confidence, lower, higher, agreement, bias = known
        return Trust((confidence, lower, higher, agreement), bias)
    function = find_method(method)
    return function.trust if isinstance(function, Preset) else TRUST


def _name_of(method: str | Method) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def classes_of(target: Target, labels: Labels, logits: Float[Tensor, "k"]) -> list[int]:
    """The class indices that a target means for one image.

    Raises:
        InputError: no such class, or "top0", or nothing at all.
    """
    if isinstance(target, Sequence) and not isinstance(target, str):
        if not target:
            raise InputError("a target is a class, or several, got an empty list")
        return [index for one in target for index in classes_of(one, labels, logits)]
    top = re.fullmatch(r"top(\d+)", str(target))
    if top and target not in labels:
        if int(top[1]) < 1:
            raise InputError(f"the most probable classes are top1, top2, ..., got {target!r}")
        return logits.topk(min(int(top[1]), len(labels))).indices.tolist()
    return [labels.find(target)]


def _refuse_nan(values: Tensor, photos: list[Photo], what: str) -> None:
    bad = (~values.isfinite()).flatten(1).any(1)
    if bad.any():
        named = ", ".join(photo.source for photo, is_bad in zip(photos, bad.tolist(), strict=True) if is_bad)
        raise DataError(f"{named}: {what}")
