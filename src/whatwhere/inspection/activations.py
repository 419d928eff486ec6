"""Activations before and after normalization layers, in numbers."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.layouts import NoGridError, first_tensor
from whatwhere.errors import InputError, UnsupportedError, nearest
from whatwhere.types import Images


class Spread(NamedTuple):
    """How values are spread, over images, channels and cells; all nan where there are none."""

    mean: float
    std: float
    zeros: float
    """Share of values that are exactly 0, in [0, 1]: behind a ReLU, of the units that are off."""
    low: float
    high: float


@dataclass(frozen=True)
class Activations:
    """What a layer was given and what it made of it.

    Attributes:
        layer: its name, as in ``named_modules()``.
        kind: its class.
        before: of its input.
        after: of its output.
    """

    layer: str
    kind: str
    before: Spread
    after: Spread


def activation_statistics(
    network: nn.Module, images: Images, layers: Sequence[str] | None = None
) -> list[Activations]:
    """How activations are spread before and after layers, in the order in which these ran first.

    Args:
        network: looks at the images in evaluation mode, once; it stays as it is.
        images: (b d *hw), preprocessed.
        layers: as in ``named_modules()``; by default all that normalize: batch, layer, group, instance and local
            response normalization. With those that were folded, what is left in their places can be looked at.

    Raises:
        InputError: no such layer.
        UnsupportedError: a layer gives no tensor.
    """
    named = {name: module for name, module in network.named_modules() if name}
    unknown = [name for name in layers or () if name not in named]
    if unknown:
        raise InputError(f"there is no layer {unknown[0]!r}; nearest: {nearest(unknown[0], named)}")
    wanted = [name for name, module in named.items() if _normalizes(module)] if layers is None else layers
    sums: dict[str, tuple[_Sum, _Sum]] = {}
    kept: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, given: Any) -> None:
        # a layer may work in place
        kept[module] = first_tensor(given).detach().clone()

    def after(name: str) -> Any:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            one, other = sums.setdefault(name, (_Sum(), _Sum()))
            one.add(kept.pop(module))
            other.add(first_tensor(output).detach())

        return note

    with ExitStack() as hooks, undisturbed(network), torch.no_grad():
        for name in wanted:
            hooks.enter_context(named[name].register_forward_pre_hook(before))
            hooks.enter_context(named[name].register_forward_hook(after(name)))
        try:
            network(images)
        except NoGridError as error:
            raise UnsupportedError(f"{type(network).__name__}: one of the layers gives no tensor: {error}") from None
    return [
        Activations(name, type(named[name]).__name__, one.spread(), other.spread())
        for name, (one, other) in sums.items()
    ]


def _normalizes(module: nn.Module) -> bool:
    """Whether a layer normalizes, told by what such layers have, timm's and frozen ones among them."""
    marks = ("running_var", "normalized_shape", "num_groups")
    return isinstance(module, nn.LocalResponseNorm) or any(hasattr(module, mark) for mark in marks)


class _Sum:
    """Sums of the values of a layer that may run several times."""

    def __init__(self) -> None:
        self.count = self.zeros = 0
        self.total = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        if values.numel():
            wide = values.double()
            self.count += values.numel()
            self.zeros += int((values == 0).sum())
            self.total += float(wide.sum())
            self.squares += float(wide.square().sum())
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def spread(self) -> Spread:
        if not self.count:
            return Spread(*[math.nan] * 5)
        mean = self.total / self.count
        std = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        return Spread(mean, std, self.zeros / self.count, self.low, self.high)
