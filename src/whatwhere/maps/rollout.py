"""Attention rollout: the layers' attention, multiplied up."""

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.attention import Attention, attended, patches
from whatwhere.classifiers.classifier import Trace, full_precision, widened
from whatwhere.types import Maps, Score


def rollout(trace: Trace, score: Score) -> Maps:
    """Attention rollout: how much of each patch arrives where the head reads, the same for every class.

    Abnar, Zuidema: Quantifying Attention Flow in Transformers (ACL 2020). With ``W_l`` the attention of layer l,
    averaged over its heads, ``A_l = 0.5 W_l + 0.5 I``, its rows brought to sum 1, and the rollout is
    ``A_L ... A_2 A_1``. The map is the mean of the rows that the head reads: the class token's, or those of all
    tokens that are pooled; its columns are the patches, without class and register tokens. The score is not read.

    The network runs once more; one (b n n) matrix is kept, however many layers there are.

    Args:
        trace: what the network saw; where it was split does not matter.
        score: not read; the map is the same for every class.

    Raises:
        UnsupportedError: the network is no transformer in which every token attends to every token.
    """
    rolled, rows = rolled_out(trace)
    with full_precision(rolled):
        return patches((rows[:, None] @ rolled)[:, 0], trace.net, (trace.images.shape[-2], trace.images.shape[-1]))


def rolled_out(trace: Trace) -> tuple[Float[Tensor, "b n n"], Float[Tensor, "b n"]]:
    """The rollout of all tokens into all tokens, and how much the head reads of each: both have rows of sum 1.

    Raises:
        UnsupportedError: the network is no transformer in which every token attends to every token.
    """
    rolled: Tensor | None = None

    def multiply(attention: Attention) -> None:
        nonlocal rolled
        with torch.no_grad(), full_precision(attention):
            layer = widened(attention).mean(1) / 2
            layer.diagonal(dim1=1, dim2=2).add_(0.5)
            layer /= layer.sum(2, keepdim=True)
            rolled = layer if rolled is None else layer @ rolled

    seen = attended(trace.net, trace.images, multiply)
    assert rolled is not None
    read = seen.read.to(rolled)
    return rolled, read / read.sum(1, keepdim=True)
