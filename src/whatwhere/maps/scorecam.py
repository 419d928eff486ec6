"""Score-CAM: channels weighted by what the network says of the image seen through them; smoothed, integrated."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError
from whatwhere.maps.seen import Batch, Read, score_of_one, scores_seen_through, varying
from whatwhere.maps.shape import unit, upsample
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Extent, Maps, Score, Weights

Weighting = Literal["probability", "increase", "softmax"]
Mask = Callable[[Maps, Int[Tensor, "n"]], Float[Tensor, "n *hw"]]
"""Channels brought to the input's size, and the number of each one's sample -> what the image is multiplied by."""


@Weighted
def scorecam(trace: Trace, score: Score, *, weighting: Weighting = "probability", batch: Batch = "auto") -> Weights:
    """Score-CAM: channels weighted by what the network says of the image seen through each (Wang et al., CVPRW 2020).

    Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu: Score-Weighted Visual Explanations for Convolutional Neural
    Networks. With ``H_c = unit(upsample(A_c))`` and the image ``x`` as the network takes it, so that what is masked
    becomes the mean colour where that is subtracted, ``w_c`` is read off ``x * H_c`` and ``M = sum_c w_c A_c``.
    Constant channels are left out.

    Args:
        trace: what the network saw.
        score: what is explained. Scores that pick classes (``whatwhere.scores.Picking``) are taken of the
            probabilities, any other as it is, of the logits.
        weighting: "probability", as in the authors' code: the score of ``x * H_c``; "increase", as in the paper's
            definition: less the score of an image of zeros; "softmax", as in the paper's algorithm and torchcam: of
            the logits, through a softmax over the channels.
        batch: masked images that go through the network at once; "auto" for as many as 16 of 224 x 224.

    Raises:
        InputError: no such weighting, or a batch of less than 1.
    """
    return _weights(trace, score, lambda channels, _: unit(channels), 1, weighting, batch, "scorecam")


@Weighted
def sscam(
    trace: Trace,
    score: Score,
    *,
    samples: int = 10,
    noise: float = 2.0,
    seed: int = 0,
    weighting: Weighting = "probability",
    batch: Batch = "auto",
) -> Weights:
    """SS-CAM: Score-CAM with noise on the channels, averaged (Wang, Naidu, Michael, Kundu 2020).

    SS-CAM, Smoothed Score-CAM for Sharper Visual Feature Localization; its first variant. ``w_c`` is the mean over
    the samples of what Score-CAM reads through ``H_c = unit(upsample(A_c) + e)``, with normal noise ``e`` on each
    pixel.

    Args:
        trace: what the network saw.
        score: what is explained.
        samples: forwards for each channel.
        noise: standard deviation, in units of the features.
        seed: of the noise, which is the same for every channel and image.
        weighting: as of ``scorecam``.
        batch: as of ``scorecam``.

    Raises:
        InputError: as ``scorecam``; no samples, or negative noise.
    """
    if not noise >= 0:
        raise InputError(f"noise is at least 0, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(max(samples, 1), *trace.images.shape[2:], generator=generator).to(trace.features) * noise
    return _weights(
        trace,
        score,
        lambda channels, sample: unit(channels + drawn[sample]),
        samples,
        weighting,
        batch,
        ("sscam", noise, seed),
    )


@Weighted
def iscam(
    trace: Trace, score: Score, *, samples: int = 10, weighting: Weighting = "probability", batch: Batch = "auto"
) -> Weights:
    """IS-CAM: Score-CAM with its masks integrated from nothing to all (Naidu et al. 2020).

    Naidu, Ghosh, Maurya, Nayak, Kundu: IS-CAM, Integrated Score-CAM for axiomatic-based explanations. ``w_c`` is the
    mean over i = 1..n of what Score-CAM reads through ``i / n H_c``. (torchcam sums the shares up as it goes, and
    means the same with one sample.)

    Args:
        trace: what the network saw.
        score: what is explained.
        samples: n, forwards for each channel.
        weighting: as of ``scorecam``.
        batch: as of ``scorecam``.

    Raises:
        InputError: as ``scorecam``; no samples.
    """
    return _weights(
        trace,
        score,
        lambda channels, sample: torch.einsum("n...,n->n...", unit(channels), ((sample + 1) / samples).to(channels)),
        samples,
        weighting,
        batch,
        "iscam",
    )


def _weights(
    trace: Trace, score: Score, mask: Mask, samples: int, weighting: Weighting, batch: Batch, key: Hashable
) -> Weights:
    if weighting not in get_args(Weighting):
        raise InputError(f"weighting is one of {', '.join(get_args(Weighting))}, got {weighting!r}")
    if samples < 1:
        raise InputError(f"wanted at least 1 sample, got {samples}")
    size = tuple(trace.images.shape[2:])
    read: Read = "logit" if weighting == "softmax" else "probability"
    weights = trace.features.detach().new_zeros(trace.features.shape[:2])
    if weighting == "increase":
        black = trace.net.logits(trace.images[:1] * 0)
    for i, features in enumerate(trace.features.detach()):
        live = varying(features)
        masks, count = partial(_masks, features[live], mask, samples, size), len(live) * samples
        seen = partial(scores_seen_through, trace, score, i, read=read, batch=batch)
        values = seen(masks, count, key=(key, samples)).reshape(len(live), samples).mean(1)
        if weighting == "increase":
            values = values - score_of_one(trace, score, i, black, read=read)
        weights[i, live] = values.softmax(0) if weighting == "softmax" else values
    return weights


def _masks(
    channels: Float[Tensor, "c *yx"], mask: Mask, samples: int, size: Extent, part: range
) -> Float[Tensor, "n *hw"]:
    """Of some of the channels, each with every sample in turn."""
    numbers = torch.arange(part.start, part.stop, device=channels.device)
    return mask(upsample(channels[numbers // samples], size), numbers % samples)
