"""Several networks as one: logits and class maps are the means of theirs."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from whatwhere.classifiers.backbones import backbone_of, probe
from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.heads import Head, Headed
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.types import Features, Images

ENSEMBLE = "ensemble"


class Beside(nn.Module):
    """Backbones beside one another, their channels in a row."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Images) -> Features:
        """Features (b c y x), c of all members together."""
        return torch.cat([member(images) for member in self.members], 1)


def together(networks: Sequence[nn.Module], image: Images, classes: int, layers: Sequence[str | None]) -> Headed:
    """The backbones of several networks beside one another, and one linear layer with fresh weights.

    Raises:
        UnsupportedError: their grids differ.
    """
    parts = [backbone_of(deepcopy(network), image, layer) for network, layer in zip(networks, layers, strict=True)]
    beside = Beside([backbone for backbone, _ in parts])
    with undisturbed(beside), torch.no_grad():
        grids = {tuple(member(image).shape[2:]) for member in beside.members}
    if len(grids) > 1:
        raise UnsupportedError(f"the networks of an ensemble have grids of one size, got {sorted(grids)}")
    return Headed(beside, nn.Identity(), Head(sum(channels for _, channels in parts), classes)).eval()


def ensemble(nets: Sequence[Classifier]) -> Classifier:
    """One classifier of several: its logits are the mean of theirs, and so are its class maps. Weights are copied.

    Args:
        nets: of the same labels and preprocessing, logits linear in the mean of the features, grids of one size.

    Raises:
        InputError: less than two, or other labels or preprocessing.
        UnsupportedError: one whose logits are not linear in the mean of its features, or whose grid is another.
    """
    if len(nets) < 2:
        raise InputError(f"an ensemble is of at least two classifiers, got {len(nets)}")
    first = nets[0]
    for net in nets[1:]:
        if list(net.labels) != list(first.labels):
            raise InputError(f"{net.name} and {first.name} have other labels; an ensemble has those of all")
        if (net.preprocess, net.activation) != (first.preprocess, first.activation):
            raise InputError(f"{net.name} and {first.name} take other input; an ensemble looks at the same")
    image = probe(len(first.preprocess.mean), first.preprocess.size, next(first.network.parameters()))
    linears = []
    for net in nets:
        trace = net.trace(image)
        linears.append(net.checked_linear(trace))
    layers = [net.layer if isinstance(net, HookedClassifier) else None for net in nets]
    network = together([net.network for net in nets], image, len(first.labels), layers).to(image)
    network.head.linear.weight.data = torch.cat([one.weight for one in linears], 1)[:, :, None, None] / len(nets)
    bias = torch.stack([one.bias for one in linears]).mean(0)
    network.head.linear.bias = nn.Parameter(bias)
    made = SplitClassifier(network, first.labels, first.preprocess, ENSEMBLE, first.activation)
    members = [
        {"name": net.name, "options": net.options} | ({"layer": layer} if layer else {})
        for net, layer in zip(nets, layers, strict=True)
    ]
    made.options = {"members": members, "size": list(first.preprocess.size)}
    return made
