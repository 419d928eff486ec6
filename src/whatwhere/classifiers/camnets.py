"""The networks of Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (section 3.1).

AlexNet without what follows conv5, VGG16 without what follows conv5-3, GoogLeNet without what follows inception4e: a
grid of 13 x 13 or 14 x 14 for 224 x 224 pixels. Then a 3 x 3 convolution of 1024 units, the mean over the grid, and
one linear layer; the twins with the largest in place of the mean are those that the paper compares with.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from whatwhere.classifiers.heads import Head, Headed, Pool, convolution

UNITS = 1024


class Base(NamedTuple):
    """Where a network is cut, and what it gives there."""

    name: str
    """As torchvision has it."""
    cut: Callable[[nn.Module], list[nn.Module]]
    channels: int


def _until_inception4e(network: nn.Module) -> list[nn.Module]:
    names = [name for name, _ in network.named_children()]
    return [network.get_submodule(name) for name in names[: names.index("inception4e") + 1]]


BASES = {
    "alexnet": Base("alexnet", lambda network: list(network.features)[:12], 256),  # type: ignore[arg-type]
    "vgg16": Base("vgg16", lambda network: list(network.features)[:30], 512),  # type: ignore[arg-type]
    "googlenet": Base("googlenet", _until_inception4e, 832),
}
POOLS: dict[str, Pool] = {"gap": "mean", "gmp": "max"}
NAMES = tuple(f"{base}-{pool}" for base in BASES for pool in POOLS)


def cam_network(name: str, base: nn.Module, classes: int) -> Headed:
    """One of ``NAMES`` on torchvision's network of that base, whose layers it takes."""
    which, _, pool = name.partition("-")
    backbone = nn.Sequential(*BASES[which].cut(base))
    return Headed(backbone, convolution(BASES[which].channels, UNITS), Head(UNITS, classes, pool=POOLS[pool]))
