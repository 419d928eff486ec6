"""A network without its last layer, and with another one: what fine-tuning and conversion begin with."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import Conv2dSame  # type: ignore[attr-defined]
from torch import Tensor, nn

from whatwhere.classifiers.acol import AdversarialBranches
from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.heads import Head, Headed, convolution
from whatwhere.classifiers.hooked import find_layer
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths
from whatwhere.classifiers.split import has_halves
from whatwhere.errors import InputError, UnsupportedError, nearest
from whatwhere.types import Extent, Features, Images, Size


class Grid(nn.Module):
    """The features of a network that splits by itself, as a grid (b c y x) whatever its own layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.widths = normalized_widths(network)

    def forward(self, images: Images) -> Features:
        """Features (b c y x)."""
        return as_grid(first_tensor(self.network.forward_features(images)), tuple(images.shape[2:]), self.widths)[0]  # type: ignore[operator]


class Reached(Exception):  # noqa: N818
    """The layer has run; what comes after it need not."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        self.layer, self.output = layer, output


def stop(module: nn.Module, given: Any, output: Any) -> None:
    """A forward hook: the layer's output is all that is wanted."""
    raise Reached(module, output)


class Until(nn.Module):
    """The features that a layer of a network gives, as a grid (b c y x); what comes after it is let go."""

    def __init__(self, network: nn.Module, layer: str, image: Images) -> None:
        super().__init__()
        self.network, self.layer, self.widths = network, layer, normalized_widths(network)
        network.get_submodule(layer).register_forward_hook(stop)
        used: set[nn.Module] = set()
        with ExitStack() as hooks, undisturbed(network), torch.no_grad():
            for module in network.modules():
                hooks.enter_context(module.register_forward_pre_hook(lambda module, given: used.add(module)))
            self(image)
        for name, module in list(network.named_modules()):
            if (
                module not in used
                and not used.intersection(module.modules())
                and any(True for _ in module.parameters())
            ):
                network.set_submodule(name, nn.Identity())

    def forward(self, images: Images) -> Features:
        """Features (b c y x)."""
        try:
            self.network(images)
        except Reached as reached:
            if reached.layer is not self.network.get_submodule(self.layer):
                raise  # somebody else waits for it
            return as_grid(first_tensor(reached.output), tuple(images.shape[2:]), self.widths)[0]
        raise UnsupportedError(f"{type(self.network).__name__}: the layer to cut after did not run")


def backbone_of(network: nn.Module, image: Images, layer: str | None = None) -> tuple[nn.Module, int]:
    """What finds, without what decides; and how many channels it gives. It is made of the network, which it changes.

    Args:
        network: gives logits.
        image: (1 d h w), anything that is not constant.
        layer: cut after this one; by default where the network splits by itself, or the last grid.

    Raises:
        UnsupportedError: there is no grid of features, or the network cannot be cut there.
    """
    splits = layer is None and has_halves(network)
    backbone = Grid(network) if splits else Until(network, layer or find_layer(network, image), image)
    with undisturbed(backbone), torch.no_grad():
        try:
            features = backbone(image)
        except NoGridError as error:
            raise UnsupportedError(f"{type(network).__name__} gives no grid of features: {error}") from None
    return backbone, features.shape[1]


def headed(network: nn.Module, image: Images, classes: int, **head: Any) -> Headed | DflNet:
    """A network with a head of ours in place of its own.

    Args:
        network: gives logits; its own last layers are let go.
        image: (1 d h w), anything that is not constant.
        classes: k.
        head: as ``Head`` takes it; ``units`` for a 3 x 3 convolution of so many before it; ``branches=2`` for those
            of Adversarial Complementary Learning; ``filters`` for a bank of so many a class beside it,
            ``tap`` for the layer that they read, ``weights`` of the streams and ``scales``, as ``DflNet`` takes them.

    Raises:
        InputError: no such option of a head.
        UnsupportedError: the network has no grid of features, or cannot be cut there.
    """
    bank = {name: head.pop(name) for name in ("filters", "tap", "weights", "scales") if name in head}
    if bank:
        if head.get("branches", 1) != 1:
            raise InputError("a filter bank stands beside a head of one branch")
        general, tap = headed(network, image, classes, **head), bank.pop("tap", None)
        assert isinstance(general, Headed)
        inner = dict(general.backbone.network.named_modules())  # type: ignore[union-attr]
        if tap is not None and tap not in inner:
            raise InputError(f"tap: the network has no layer {tap!r}; nearest: {nearest(str(tap), inner)}")
        read = f"network.{tap}" if tap else tap_of(general.backbone, image)
        return DflNet(general, f"backbone.{read}", image, **bank)
    backbone, channels = backbone_of(network, image)
    if isinstance(backbone, Grid) and hasattr(network, "reset_classifier"):
        network.reset_classifier(0)  # type: ignore[operator]
    options = dict(head)
    units, branches = options.pop("units", 0), options.pop("branches", 1)
    if branches not in {1, 2} or (branches == 2 and options):
        raise InputError(f"a head has 1 branch, or 2 with no options but units; got {head}")
    if branches == 2:
        return AdversarialBranches(backbone, channels, classes, units or 1024)
    neck = convolution(channels, units) if units else nn.Identity()
    try:
        return Headed(backbone, neck, Head(units or channels, classes, **options))
    except TypeError as error:
        raise InputError(
            f"a head takes pool, order, dropout, scaled, units and branches, got {', '.join(head)}: {error}"
        ) from None


_LAYERS = (nn.Linear, nn.Conv2d)


def last_layer(network: nn.Module) -> str:
    """The name of the last layer with weights that multiply, or "" if there is none."""
    return next((name for name, one in reversed(list(network.named_modules())) if isinstance(one, _LAYERS)), "")


def renewed(network: nn.Module, classes: int) -> nn.Module:
    """The same network with a fresh last layer for so many classes; it is changed in place.

    Raises:
        UnsupportedError: no last layer is found.
    """
    if isinstance(network, Headed):
        raise UnsupportedError("a head of ours is built anew with headed(...)")
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(classes)  # type: ignore[operator]
        return network
    name = last_layer(network)
    old = network.get_submodule(name)
    new: nn.Module | None = None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1) and old.groups == 1:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
    if new is not None and name:
        network.set_submodule(name, new.to(next(network.parameters()).device))
        return network
    raise UnsupportedError(f"{type(network).__name__}: found no last linear layer to renew; use a head of ours")


def probe(channels: int, size: Extent, like: Tensor | None = None) -> Images:
    """An image of noise (1 d h w), always the same, to see what a network does with it.

    Args:
        channels: d.
        size: (h, w) or (z, h, w).
        like: of whose device, and of whose dtype if it is a floating-point one.
    """
    noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    if like is None:
        return noise
    return noise.to(like) if like.is_floating_point() else noise.to(like.device)


class Block(NamedTuple):
    """What the whole signal passes: a layer of the trunk."""

    name: str
    channels: int
    grid: Size


def trunk_of(backbone: nn.Module, image: Images) -> list[Block]:
    """The blocks of a backbone that give grids, shallow to deep, by their names as in ``named_modules()``.

    Where a row of several blocks makes more than one step of the grid, those in the row.

    Args:
        backbone: images -> features (b c y x).
        image: (1 d h w).
    """
    grids: dict[nn.Module, list[tuple[int, Size]]] = {}
    ratio = image.shape[3] / image.shape[2]

    def note(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            channels, y, x = output.shape[1:]
            if abs(x - ratio * y) <= max(1.0, ratio):
                grids.setdefault(module, []).append((channels, (y, x)))

    with ExitStack() as hooks, undisturbed(backbone), torch.no_grad():
        for module in backbone.modules():  # before the hook that stops, where there is one
            hooks.enter_context(module.register_forward_hook(note, prepend=True))
        backbone(image)

    def blocks(parent: nn.Module, name: str) -> Iterator[Block]:
        children = [(f"{name}.{key}" if name else key, child) for key, child in parent.named_children()]
        for path, child in children:
            sizes = {size for inner in child.modules() for _, size in grids.get(inner, ())}
            if len(grids.get(child, ())) == 1 and (len(sizes) <= 2 or not isinstance(child, nn.Sequential)):
                yield Block(path, *grids[child][0])
            elif len(sizes) > 1:
                yield from blocks(child, path)

    return list(blocks(backbone, ""))


def stages_of(backbone: nn.Module, image: Images) -> list[str]:
    """The last block before each step of the grid, and the last of all, shallow to deep.

    Args:
        backbone: images -> features (b c y x).
        image: (1 d h w).

    Raises:
        UnsupportedError: it has no blocks that give grids of two sizes.
    """
    last = {block.grid: block.name for block in trunk_of(backbone, image)}
    if len(last) < 2:
        raise UnsupportedError("the network has no blocks that give grids of two sizes; give the aid its layers")
    return list(last.values())


NARROW = 256
"""Channels below which a block has too few for filters to tell patches of many classes apart."""


def tap_of(backbone: nn.Module, image: Images) -> str:
    """Where filters read: the last block of the last stage but one, conv4_3 of VGG or the third stage of a ResNet.

    Where that is narrow, as in networks of inverted residuals, the next block that is not, of the last stage perhaps.

    Raises:
        UnsupportedError: there is none.
    """
    pools = nn.MaxPool2d | nn.AvgPool2d
    trunk = [one for one in trunk_of(backbone, image) if not isinstance(backbone.get_submodule(one.name), pools)]
    last = {block.grid: number for number, block in enumerate(trunk)}
    if len(last) < 2:
        raise UnsupportedError("the network has no grids of two sizes; say with tap which layer filters read")
    chosen = list(last.values())[-2]
    for block in trunk[chosen:]:
        # a bare convolution still waits for what is behind it
        if block.channels >= NARROW and not isinstance(backbone.get_submodule(block.name), nn.Conv2d):
            return block.name
    return trunk[chosen].name


def dilate(backbone: nn.Module, image: Images, stride: int) -> None:
    """Take the steps out of a backbone that make its cells wider than so many pixels, and dilate what follows them.

    A layer behind steps that are gone looks as far apart as they were long, so the values at the old places are those
    of before (Yu & Koltun 2016; Chen et al., DeepLab, 2018, section 3.1). It is changed in place.

    Args:
        backbone: images -> features (b c y x).
        image: (1 d h w).
        stride: pixels a cell.

    Raises:
        InputError: not a power of two times finer than the backbone's own.
        UnsupportedError: an average is pooled where steps have to go.
    """
    # of a size that every step divides
    h, w = (-(-side // 64) * 64 for side in image.shape[2:])
    image = image.new_zeros(1, image.shape[1], h, w)
    before: dict[Any, tuple[int, ...]] = {}

    def note(module: nn.Module, given: Any) -> None:
        before[module] = tuple(given[0].shape[2:])

    with ExitStack() as hooks, undisturbed(backbone), torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                hooks.enter_context(module.register_forward_pre_hook(note))
        own = round(h / backbone(image).shape[2])
    if stride < 1 or own % stride or (own // stride) & (own // stride - 1):
        raise InputError(f"a stride is {own}, {own // 2}, {own // 4}, ... for this network, got {stride}")
    for layer, size in before.items():
        factor = round(image.shape[2] / size[0]) // stride
        if factor < 1 or (factor == 1 and max(_pair(layer.stride)) == 1):
            continue
        if isinstance(layer, nn.AvgPool2d):
            raise UnsupportedError("an average pool cannot be dilated; use a stride that leaves it as it is")
        if isinstance(layer, Conv2dSame):
            _pad_as_before(layer, size, factor)
        elif not isinstance(layer.padding, str):
            layer.padding = tuple(factor * one for one in _pair(layer.padding))
        layer.stride = (1, 1)
        layer.dilation = tuple(factor * one for one in _pair(layer.dilation))


def _pad_as_before(layer: Any, size: tuple[int, ...], factor: int) -> None:
    """Of a layer that pads by the size of its input, and more at the end: as it did with its steps."""
    pads: list[int] = []
    for cells, kernel, step in zip(size, layer.kernel_size, layer.stride, strict=True):
        start = max((-(-cells // step) - 1) * step + kernel - cells, 0) // 2
        pads = [start * factor, (kernel - 1 - start) * factor, *pads]  # the last axis comes first
    layer.__class__ = nn.Conv2d
    layer.padding = (0, 0)
    layer.register_forward_pre_hook(partial(_padded, pads))


def _padded(pads: list[int], module: nn.Module, given: tuple[Tensor]) -> Tensor:
    return nn.functional.pad(given[0], pads)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
