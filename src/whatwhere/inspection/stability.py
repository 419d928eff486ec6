"""Does a classifier still say the same, and see it at the same place of the object, when the picture changes?

photo -> base view and views (views.py) -> traces -> class, probability and map of each, compared with the base's
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample

from whatwhere.classifiers.classifier import Classifier
from whatwhere.datasets.sample import Sample
from whatwhere.errors import DataError, InputError
from whatwhere.explanation import check_batch, find_method
from whatwhere.geometry import Box
from whatwhere.images import Photo, Source, open_photo, printable
from whatwhere.inspection.views import TRANSFORMS, Family, Transform, checked, families, in_base
from whatwhere.maps import Method
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class
from whatwhere.types import Images, Logits, Maps

VARIES = 1e-5
"""Of a map's range: what varies by less is constant."""


@dataclass(frozen=True)
class Row:
    """What a transform does, on the mean over pictures. Of the numbers with "not defined" that is nan.

    Attributes:
        transform: kind, strength and direction.
        consistency: share of pictures of which the network says the same class, of the transformed view and of the
            base view (classification consistency, Zhang 2019, section 4.1).
        change: how much the probability of the base view's class changes, without its sign (mean absolute change,
            Azulay & Weiss 2019, section 2).
        equivariance: Pearson's correlation of the transformed view's map with the base view's map transformed, both
            of the base view's class, over the pixels that both views see. 0 where one of them is constant there, not
            defined where both are; 1 where maps are equivariant.
        follows: of the change that the transform would make to an equivariant map, the share that takes place: the
            slope of a regression of ``map of the view - map`` on ``map transformed - map`` over all pixels that both
            views see. 1 where maps go with what they show, 0 where they stay where they are; about a half where they
            have nothing to do with each other. Of a smooth map and a small shift it is the displacement over the
            true one (Lucas & Kanade 1981); unlike the displacement of a centre of mass, it does not hang on what
            comes into view. Not defined for light, and for constant maps.
    """

    transform: Transform
    consistency: float
    change: float
    equivariance: float
    follows: float


@dataclass(frozen=True)
class Stability:
    """How far a classifier's classes are invariant and its maps equivariant.

    Attributes:
        model: name of the classifier.
        method: name of the map method.
        images: how many pictures were measured.
        rows: one a transform.
        failed: pictures that could not be measured, and why.
    """

    model: str
    method: str
    images: int
    rows: tuple[Row, ...]
    failed: dict[str, str]


def stability(
    net: Classifier,
    images: Iterable[Source | Photo | Sample],
    *,
    transforms: Sequence[Transform] = TRANSFORMS,
    method: str | Method = "gradcam",
    batch: int = 16,
    seen: Callable[[int], None] = lambda done: None,
) -> Stability:
    """Measure how a classifier's classes and maps change with a picture that is shifted, resized, turned or lit.

    A map is its positive part, as in ``Explanation``, of the class that the network says of the base view. How views
    are made is said in ``inspection/views.py``. Memory is bounded by the batch and by one picture's rendering.

    Args:
        net: any that takes photos.
        images: pictures; a data set too.
        transforms: what is done to them. Shifts of more than half of the input's shorter side are left out.
        method: a name in ``whatwhere.METHODS``, or a function (trace, score) -> maps (b y x).
        batch: views that go through the network at once.
        seen: called with how many pictures have been looked at.

    Raises:
        DataError: no picture can be measured.
        InputError: an unknown method, no such transform, a network that takes no photos, a batch of less than 1.
        UnsupportedError: the method does not apply to the network.
    """
    check_batch(batch)
    function = find_method(method)
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    h, w = net.preprocess.frame((1, 1)).network
    wanted = checked(transforms, (h, w))
    failed: dict[str, str] = {}
    total, defined, measured = torch.zeros(len(wanted), 5), torch.zeros(len(wanted), 5), 0
    for done, image in enumerate(images, 1):
        called = _name(image, done)
        try:
            photo, found = _opened(image, called), dict[Transform, Tensor]()
            for family in families(net.preprocess, photo, wanted):
                found |= _measured(net, family, function, batch, called)
        except DataError as error:
            failed[called] = str(error)
        else:
            numbers = torch.stack([found[one] for one in wanted])
            total, defined, measured = total + numbers.nan_to_num(), defined + ~numbers.isnan(), measured + 1
        seen(done)
    if not measured:
        raise DataError(f"no picture can be measured: {next(iter(failed.values()), 'there is none')}")
    means = total / defined  # nan where there is nothing defined
    slopes = means[:, 3] / means[:, 4]
    values = torch.cat([means[:, :3], slopes[:, None]], 1).tolist()
    rows = tuple(Row(one, *numbers) for one, numbers in zip(wanted, values, strict=True))
    return Stability(net.name, name, measured, rows, failed)


def _name(image: Source | Photo | Sample, number: int) -> str:
    """What to call a picture; pixels have no name of their own."""
    if isinstance(image, Sample):
        return image.name
    if isinstance(image, Photo):
        return image.source
    return printable(image) if isinstance(image, str | os.PathLike) else f"image {number}"


def _opened(image: Source | Photo | Sample, name: str) -> Photo:
    try:
        return image.photo() if isinstance(image, Sample) else open_photo(image, name=name)
    except InputError as error:  # an array of another kind
        raise DataError(str(error)) from error


def _measured(net: Classifier, family: Family, method: Method, batch: int, name: str) -> dict[Transform, Tensor]:
    """Of each view of a picture the numbers of ``Row``, the last as numerator and denominator, (5)."""
    size = family.base.shape[1], family.base.shape[2]
    logits, base = _looked(net, family.base[None], method, None, name)
    index, said, stays = int(logits.argmax()), _said(logits), upsample(base, size)
    probability = net.probabilities(logits)[0, index]
    found: dict[Transform, Tensor] = {}
    while part := list(islice(family.views, batch)):
        logits, maps = _looked(net, torch.stack([view.pixels for view in part]), method, index, name)
        points = torch.stack([in_base(view.to_base, size) for view in part])
        now, goes, both = upsample(maps, size), _transformed(base, points), _within(points, family.seen)
        numbers = (
            (_said(logits) == said).double(),
            (net.probabilities(logits)[:, index] - probability).abs().double(),
            correlation(now, goes, both),
            *_regressed(now - stays, goes - stays, both),
        )
        found |= {view.transform: row for view, row in zip(part, torch.stack(numbers, 1), strict=True)}
    return found


def _looked(net: Classifier, images: Images, method: Method, index: int | None, name: str) -> tuple[Logits, Maps]:
    """Logits, and maps in [0, 1], of a class or else of the likeliest of the first image; on the CPU."""
    trace = net.trace(images.to(net.device))
    logits = trace.logits.detach().cpu()
    if not logits.isfinite().all():
        raise DataError(f"{name}: {net.name} gives nan or infinite logits")
    maps = method(trace, of_class(int(logits[0].argmax()) if index is None else index)).detach().cpu()
    if not maps.isfinite().all():
        raise DataError(f"{name}: the map of {net.name} has nan or infinite values")
    return logits, unit(positive(maps.double()))


def _said(logits: Logits) -> Int[Tensor, "b"]:
    """The likeliest class of each image; of a single one whether it is there."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _transformed(base: Maps, points: Float[Tensor, "n h w 2"]) -> Float[Tensor, "n h w"]:
    """What the base view's map has at points of it, (x, y) in pixels; as ``upsample`` gives it at its pixels."""
    h, w = points.shape[1:3]
    grid = 2 * points / points.new_tensor([w, h]) - 1
    maps = base.expand(len(points), *base.shape[1:])[:, None]
    return grid_sample(maps, grid, "bilinear", "border", align_corners=False)[:, 0]


def _within(points: Float[Tensor, "n h w 2"], box: Box) -> Bool[Tensor, "n h w"]:
    x, y = points.unbind(3)
    return (x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)


def correlation(
    one: Float[Tensor, "n h w"], other: Float[Tensor, "n h w"], where: Bool[Tensor, "n h w"]
) -> Float[Tensor, "n"]:
    """Pearson's, of maps in [0, 1] over some of their pixels: 0 where one is constant there, nan where both are."""
    (a, vary), (b, varies) = _deviations(one, where), _deviations(other, where)
    spread = (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()
    found = torch.where(vary & varies, (a * b).sum((1, 2)) / spread, 0)
    return found.masked_fill(~vary & ~varies, torch.nan)


def _regressed(
    change: Float[Tensor, "n h w"], expected: Float[Tensor, "n h w"], where: Bool[Tensor, "n h w"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Numerator and denominator of the slope of what changes on what should; 0 where nothing should."""
    (a, _), (b, varies) = _deviations(change, where), _deviations(expected, where)
    b = b * varies[:, None, None]
    return (a * b).mean((1, 2)), b.square().mean((1, 2))


def _deviations(
    maps: Float[Tensor, "n h w"], where: Bool[Tensor, "n h w"]
) -> tuple[Float[Tensor, "n h w"], Bool[Tensor, "n"]]:
    """How far maps are from their means over some of their pixels, 0 elsewhere; and which of them vary there."""
    pixels = where.sum((1, 2), keepdim=True).clamp(min=1)
    found = (maps - (maps * where).sum((1, 2), keepdim=True) / pixels) * where
    return found, found.abs().amax((1, 2)) > VARIES
