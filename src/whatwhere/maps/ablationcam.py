"""Ablation-CAM: channels weighted by what is lost without them."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import UnsupportedError
from whatwhere.maps.seen import Batch, parts, per_batch, score_of_one, score_of_whole
from whatwhere.maps.weighted import Weighted
from whatwhere.scores import each
from whatwhere.types import Score, Weights

AUTO_VALUES = 2**24
"""Of features or logits, that are held at once where a batch is "auto": 64 MiB."""


@Weighted
def ablationcam(trace: Trace, score: Score, *, batch: Batch = "auto") -> Weights:
    """Ablation-CAM: channels weighted by the share of the score lost without each (Desai & Ramaswamy, WACV 2020).

    Desai, Ramaswamy: Visual Explanations for Deep Convolutional Network via Gradient-free Localization. With ``S_c``
    the score when channel c is set to 0: ``w_c = (S - S_c) / S`` (eq. 3) and ``M = sum_c w_c A_c``; where S is 0, it
    is not divided by. Only what comes after the split is run again, and where the logits are linear in the pooled
    features nothing is: for the logit of class k, ``w_c = w_kc mean(A_c) / S``.

    Args:
        trace: what the network saw.
        score: what is explained.
        batch: ablated channels at once; "auto" for as many as 64 MiB hold.

    Raises:
        InputError: a batch of less than 1.
    """
    try:
        lost = _lost_by_law(trace, score, batch)
    except UnsupportedError:
        lost = _lost_by_tail(trace, score, batch)
    whole = score_of_whole(trace, score)
    return lost / torch.where(whole == 0, 1, whole)[:, None]


def _lost_by_law(trace: Trace, score: Score, batch: Batch) -> Weights:
    weight, _ = trace.net.checked_linear(trace)
    logits, pooled = trace.logits.detach(), trace.features.detach().flatten(2).mean(2)
    whole, at_once = score_of_whole(trace, score), per_batch(logits.numel(), AUTO_VALUES, batch)
    lost = [
        whole
        - each(score, logits - pooled.T[part.start : part.stop, :, None] * weight.T[part.start : part.stop, None])
        for part in parts(pooled.shape[1], at_once)
    ]
    return torch.cat(lost).T


def _lost_by_tail(trace: Trace, score: Score, batch: Batch) -> Weights:
    lost = trace.features.detach().new_zeros(trace.features.shape[:2])
    for i, features in enumerate(trace.features.detach()):
        # from the tail too, whose precision may not be that of the trace
        whole = score_of_one(trace, score, i, trace.tail(features[None], i), read="logit")
        live = features.flatten(1).any(1).nonzero().flatten()
        for part in parts(len(live), per_batch(max(features.numel(), trace.logits.numel()), AUTO_VALUES, batch)):
            channels = live[part.start : part.stop]
            variants = features.expand(len(part), *features.shape).clone()
            variants[torch.arange(len(part)), channels] = 0
            lost[i, channels] = whole - score_of_one(trace, score, i, trace.tail(variants, i), read="logit")
    return lost
