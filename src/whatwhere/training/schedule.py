"""How it steps, how fast, and what is kept of it: optimizer, rate, and the moving average of the weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from whatwhere.training.recipe import Recipe


def optimizer_of(groups: Sequence[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over groups of parameters."""
    own: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **own)
    return torch.optim.AdamW(groups, **own)


def factor_at(step: int, rise: int, total: int) -> float:
    """Of the highest rate: up along a line in ``rise`` steps, down along a half cosine (Loshchilov & Hutter 2017)."""
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def follow(average: nn.Module, network: nn.Module, done: int, factor: float) -> None:
    """Bring an exponential moving average of a network's weights up to its next step, in place.

    Args:
        average: of the same make.
        network: after the step.
        done: steps so far; early on it is their plain mean, so that it does not stay where it began.
        factor: what is kept of the average.
    """
    keep = min(factor, done / (done + 10))
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs.to(mine), 1 - keep)
            else:
                mine.copy_(theirs)
