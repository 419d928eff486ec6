"""Patches: where in which pictures the units of a grid respond most, in pixels of the original."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.dfl import DflNet
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import DataError, UnsupportedError
from whatwhere.geometry import Box, Frame
from whatwhere.images import Photo
from whatwhere.inspection.receptive import ReceptiveField, effective_field, receptive_field
from whatwhere.types import Images, Size

Units = Callable[[Images], Float[Tensor, "b u y x"]]
"""What each unit says of each cell."""


@dataclass(frozen=True)
class Patch:
    """The cell at which a unit responds most in a picture.

    Attributes:
        image: name of the picture.
        unit: which.
        response: what it says there.
        cell: (row, column) of the grid.
        box: what the cell sees, in pixels of the original; cut at the picture's edges, and empty in padding.
        centre: (x, y) of what it sees, in pixels of the original.
    """

    image: str
    unit: int
    response: float
    cell: tuple[int, int]
    box: Box
    centre: tuple[float, float]


class Best(NamedTuple):
    """What ``best_patches`` finds."""

    patches: list[list[Patch]]
    """Of each unit, the best first; each from another picture."""
    failed: dict[str, str]
    """Pictures that could not be read, and why."""


@dataclass(frozen=True)
class Decision:
    """What a filter bank says of one class in one picture.

    Attributes:
        label: the class.
        probability: that the network gives it.
        streams: what G, P and the side branch add to its logit, at the first scale if there are several.
        patches: of its own filters, the one first that adds most to the logit.
        contributions: what each of these adds.
    """

    label: int
    probability: float
    streams: tuple[float, float, float]
    patches: list[Patch]
    contributions: list[float]


def best_patches(
    net: Classifier,
    dataset: Dataset,
    units: Units,
    field: ReceptiveField,
    *,
    count: int = 4,
    batch: int = 16,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Best:
    """The patches of a data set to which each unit responds most, however many pictures there are.

    Args:
        net: says how a picture becomes its input.
        dataset: its boxes and masks are not read.
        units: of the network, in evaluation mode when it is called.
        field: what the cells of the units' grid see.
        count: patches of each unit, at most; none lies in padding. Of pictures in which a unit says the same, as
            where it saturates, that comes first in which it says more on the mean.
        batch: pictures that go through at once.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        DataError: no picture can be read.
    """
    failed: dict[str, str] = {}
    known: dict[int, tuple[str, Frame]] = {}
    # of each unit the best so far: response, its mean over the picture, cell, picture
    kept = [torch.empty(0, 0, dtype=kind) for kind in (torch.float32, torch.float32, torch.int64, torch.int64)]
    done = columns = 0
    for photos in _batches(_readable(dataset, failed), batch):
        inputs = [net.preprocess(photo) for photo in photos]
        with undisturbed(net.network), torch.no_grad():
            responses = units(_batch(net, [pixels for pixels, _ in inputs])).float().cpu()
        columns = responses.shape[3]
        inside = torch.stack([_in_the_picture(frame, field, (responses.shape[2], columns)) for _, frame in inputs])[
            :, None
        ]
        means = (responses * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        strongest, cells = _strongest(responses, inside)
        known |= {
            done + i: (photo.source, frame) for i, (photo, (_, frame)) in enumerate(zip(photos, inputs, strict=True))
        }
        number = torch.arange(done, done + len(photos)).expand(responses.shape[1], -1)
        found = [strongest.T, means.T, cells.T, number]
        if done:
            found = [torch.cat(pair, 1) for pair in zip(kept, found, strict=True)]
        order = _first(found[0], found[1], count)
        kept = [one.gather(1, order) for one in found]
        known = {one: known[one] for one in set(kept[3].flatten().tolist())}
        done += len(photos)
        seen(done + len(failed), len(dataset))
    if not done:
        raise DataError(f"{dataset.name}: no picture can be read: {next(iter(failed.values()), 'there is none')}")
    rows = zip(*(one.tolist() for one in (kept[0], kept[2], kept[3])), strict=True)
    patches = [
        [
            _patch(*known[picture], unit, value, divmod(place, columns), field)
            for value, place, picture in zip(*own, strict=True)
        ]
        for unit, own in enumerate(rows)
    ]
    return Best(patches, failed)


def _strongest(
    responses: Float[Tensor, "b u y x"], inside: Bool[Tensor, "b 1 y x"]
) -> tuple[Float[Tensor, "b u"], Int[Tensor, "b u"]]:
    """Each unit's largest response in each picture, and its cell.

    Of several cells, as where units saturate, it is the one whose neighbours respond most.
    """
    around = functional.avg_pool2d(responses, 3, 1, 1)
    strongest = responses.masked_fill(~inside, -torch.inf).amax((2, 3), keepdim=True)
    cells = around.masked_fill(~inside | (responses < strongest), -torch.inf).flatten(2).argmax(2)
    return strongest[:, :, 0, 0], cells


def _first(values: Float[Tensor, "u n"], means: Float[Tensor, "u n"], count: int) -> Int[Tensor, "u m"]:
    """Of each row the places of the largest values; of the same ones, those with the larger mean first."""
    order = means.argsort(dim=1, descending=True, stable=True)
    again = values.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, again)[:, :count]


def decisions(
    net: Classifier, photo: Photo, field: ReceptiveField, labels: Sequence[int] | None = None
) -> list[Decision]:
    """What a filter bank says of a picture: for some classes, where their filters respond most and what that adds.

    Args:
        net: around a ``DflNet``.
        photo: a picture.
        field: what the cells see that the filters read.
        labels: the classes; by default the likeliest and the one that follows it.

    Raises:
        UnsupportedError: the network has no filter bank.
    """
    network = bank_of(net)
    pixels, frame = net.preprocess(photo)
    with undisturbed(network), torch.no_grad():
        images = _batch(net, [pixels])
        general, features = network.tapped(images)
        responses = network.bank(features)[0]
        strongest, cells = responses.flatten(1).max(1)
        p, side = network.patches(strongest), network.side(strongest[None])[0]
        logits = torch.stack([w * one for w, one in zip(network.weights, (general[0], p, side), strict=True)])
        whole = network(images) if len(network.scales) > 1 else logits.sum(0)[None]
        probabilities = net.probabilities(whole)[0]
        if labels is None:
            labels = probabilities.argsort(descending=True, stable=True)[:2].tolist()
        found = []
        for label in labels:
            own = range(label * network.filters, (label + 1) * network.filters)
            adds = (
                network.weights[1] * network.patches.weight[label] + network.weights[2] / network.filters
            ) * strongest
            order = sorted(own, key=lambda unit: -float(adds[unit]))
            patches = [
                _patch(
                    photo.source,
                    frame,
                    unit,
                    float(strongest[unit]),
                    divmod(int(cells[unit]), responses.shape[2]),
                    field,
                )
                for unit in order
            ]
            g, bank, average = logits[:, label].tolist()
            said = [float(adds[unit]) for unit in order]
            found.append(Decision(label, float(probabilities[label]), (g, bank, average), patches, said))
    return found


def field_of(net: Classifier, layer: str, dataset: Dataset, pictures: int = 4) -> ReceptiveField:
    """What the cells of a layer see: what they could, or if that is most of a picture, what they do.

    Args:
        net: the classifier.
        layer: as in ``named_modules()`` of its network.
        dataset: of which some pictures show what the cells do see.
        pictures: so many of them.

    Raises:
        UnsupportedError: the layer gives no grid.
        DataError: no picture can be read.
    """
    try:
        field = receptive_field(net.inner, layer, len(net.preprocess.mean))
        if hasattr(net.inner.get_submodule(layer), "sees") or all(
            2 * seen <= side for seen, side in zip(field.size, net.preprocess.size[-2:], strict=True)
        ):
            return field
    except UnsupportedError:
        pass
    failed: dict[str, str] = {}
    photos = next(_batches(_readable(dataset.sampled(8 * pictures), failed), pictures), None)
    if photos is None:
        raise DataError(f"{dataset.name}: no picture can be read: {next(iter(failed.values()), 'there is none')}")
    return effective_field(net.inner, layer, torch.stack([net.preprocess(photo)[0] for photo in photos]))


def bank_of(net: Classifier) -> DflNet:
    """The network of a classifier that has a filter bank.

    Raises:
        UnsupportedError: it has none.
    """
    if not isinstance(net.network, DflNet):
        raise UnsupportedError(
            f"{net.name} has no filter bank; train one: whatwhere train FOLDER --set head.filters=10"
        )
    return net.network


def _patch(
    image: str, frame: Frame, unit: int, response: float, cell: tuple[int, int], field: ReceptiveField
) -> Patch:
    x, y = field.centre(*cell)
    placed = frame.placed
    centre = frame.point_to_original(min(max(x, placed.x0), placed.x1), min(max(y, placed.y0), placed.y1))
    box = frame.to_original(field.window(*cell))
    return Patch(image, unit, response, cell, box if box.area else Box(*centre, *centre), centre)


def _in_the_picture(frame: Frame, field: ReceptiveField, grid: Size) -> Bool[Tensor, "y x"]:
    """The cells whose centre is no padding."""
    placed = frame.placed
    ys = torch.tensor([placed.y0 <= field.centre(row, 0)[1] <= placed.y1 for row in range(grid[0])])
    xs = torch.tensor([placed.x0 <= field.centre(0, column)[0] <= placed.x1 for column in range(grid[1])])
    return ys[:, None] & xs


def _batch(net: Classifier, several: Sequence[Tensor]) -> Images:
    """Inputs as the network takes them."""
    like = next(net.network.parameters(), several[0])
    return torch.stack(list(several)).to(like.device, like.dtype)


def _readable(dataset: Dataset, failed: dict[str, str]) -> Iterator[Photo]:
    for sample in dataset:
        try:
            yield sample.photo()
        except DataError as error:
            failed[sample.name] = str(error)


def _batches(photos: Iterator[Photo], size: int) -> Iterator[list[Photo]]:
    while several := list(islice(photos, size)):
        yield several
