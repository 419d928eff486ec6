"""Units as words: the channels of the last grid as a dictionary in which each class is written.

After Bau, Zhou, Khosla, Oliva, Torralba: Network Dissection, CVPR 2017 (a unit is shown by what it responds to most),
and Zhou et al., CVPR 2016, section 5 (a class by the units with the largest weights).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.layouts import NoGridError, first_tensor
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import UnsupportedError
from whatwhere.inspection.patches import Patch, best_patches, field_of
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.scores import of_class
from whatwhere.types import Images


@dataclass(frozen=True)
class Word:
    """A unit, as one of those that a class is written in.

    Attributes:
        unit: which channel of the grid.
        weight: what its mean over the grid adds to the class's logit, times its standard deviation over the data.
    """

    unit: int
    weight: float


@dataclass(frozen=True)
class Dictionary:
    """What ``dictionary`` finds.

    Attributes:
        layer: whose grid it is.
        field: what its cells see.
        patches: of each unit the best, as ``best_patches`` gives them.
        words: of each class the units with the largest weights, the largest first.
        failed: pictures that could not be read, and why.
    """

    layer: str
    field: ReceptiveField
    patches: list[list[Patch]]
    words: dict[int, list[Word]]
    failed: dict[str, str]


def dictionary(
    net: Classifier,
    dataset: Dataset,
    labels: Sequence[int],
    *,
    words: int = 5,
    count: int = 4,
    batch: int = 16,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Dictionary:
    """For each unit of the last grid its best patches over a data set, and for each class its units.

    A unit's weight is that of the last linear layer, or where the logits are not linear in the pooled features, the
    gradient of the class's logit, summed over the grid and averaged over images (Selvaraju et al. 2017, eq. 1). It is
    multiplied by how much the unit's mean varies over the data, as standardized coefficients are, since units of a
    network differ much in how loud they are.

    Args:
        net: split where the units are.
        dataset: its labels, boxes and masks are not read.
        labels: the classes.
        words: units of each class.
        count: patches of each unit.
        batch: pictures that go through at once.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        DataError: no picture can be read.
        UnsupportedError: the split is after no module of the network.
    """
    said: list[Tensor] = []
    slopes: list[Tensor] = []

    def units(images: Images) -> Float[Tensor, "b u y x"]:
        trace = net.trace(images)
        said.append(trace.features.detach().flatten(2).mean(2).double())
        try:
            slope = net.checked_linear(trace).weight[list(labels)]
        except UnsupportedError:
            gradients = [trace.gradient(of_class(label)).flatten(2).sum(2).mean(0) for label in labels]
            slope = torch.stack(gradients)
        slopes.append(slope.double() * len(images))
        return trace.features.detach()

    layer = layer_of(net)
    field = field_of(net, layer, dataset)
    best = best_patches(net, dataset, units, field, count=count, batch=batch, seen=seen)
    means = torch.cat(said)
    weights = torch.stack(slopes).sum(0) / len(means) * means.std(0, correction=0)
    order = weights.argsort(dim=1, descending=True, stable=True)[:, :words]
    written = {
        label: [Word(int(unit), float(own[unit])) for unit in chosen]
        for label, own, chosen in zip(labels, weights, order, strict=True)
    }
    return Dictionary(layer, field, best.patches, written, best.failed)


def layer_of(net: Classifier) -> str:
    """The last module that gives the features at which a classifier is split.

    Raises:
        UnsupportedError: none does.
    """
    if isinstance(net, HookedClassifier):
        return net.layer
    image = probe(len(net.preprocess.mean), net.preprocess.size, next(net.inner.parameters(), None))
    features, found = net.trace(image).features.detach(), ""
    with ExitStack() as hooks, undisturbed(net.inner), torch.no_grad():
        for name, module in net.inner.named_modules():

            def note(module: Any, given: Any, output: Any, name: str = name) -> None:
                nonlocal found
                try:
                    grid = first_tensor(output)
                except NoGridError:
                    return
                if torch.equal(grid, features):
                    found = name

            if name:
                hooks.enter_context(module.register_forward_hook(note))
        net.inner(image)
    if not found:
        raise UnsupportedError(f"{net.name} is split after no module of its own; split it with at(layer)")
    return found
