"""Normalization and pooling as a choice, so that their effect can be measured."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from timm.layers import BlurPool2d, GroupNorm, GroupNorm1  # type: ignore[attr-defined]
from torch import nn

from whatwhere.errors import InputError

Norm = Literal["batch", "layer", "group", "none"]


GROUP = 16
"""Channels that are normalized together: the best of Wu & He's table 3."""


def norm_of(name: str) -> Callable[[int], nn.Module]:
    """A layer that normalizes so many channels.

    Batch: Ioffe & Szegedy 2015; layer, over all channels and cells of an image: Ba et al. 2016; group, of
    ``GROUP`` channels, or of as many as divide both: Wu & He 2018.

    Raises:
        InputError: no such one.
    """
    if name not in get_args(Norm):
        raise InputError(f"a normalization is one of {', '.join(get_args(Norm))}, got {name!r}")
    norms: dict[str, Any] = {
        "batch": nn.BatchNorm2d,
        "layer": GroupNorm1,
        "group": _groups,
        "none": nn.Identity,
    }
    return norms[name]  # type: ignore[no-any-return]


def _groups(channels: int, **options: Any) -> nn.Module:
    return GroupNorm(channels, num_groups=channels // math.gcd(channels, GROUP), **options)


def pool_of(channels: int, antialias: bool) -> nn.Module:
    """The largest of 2 x 2; or at every place, blurred before every second is taken (Zhang, ICML 2019, eq. 6)."""
    if not antialias:
        return nn.MaxPool2d(2)
    return nn.Sequential(nn.MaxPool2d(2, stride=1), BlurPool2d(channels, stride=2))


def for_timm(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a timm network, with ``norm`` and ``antialias`` in its own words."""
    found = dict(options)
    if "norm" in found:
        found["norm_layer"] = norm_of(found.pop("norm"))
    if found.pop("antialias", False):
        found["aa_layer"] = BlurPool2d
    return found
