"""What the network says of other versions of an image, masked or changed: many forwards, a bounded number at once."""

import operator
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError
from whatwhere.scores import Picking, each
from whatwhere.types import Images, Logits, Score, Scores

Batch = int | Literal["auto"]
AUTO_PIXELS = 16 * 224 * 224
"""Of the network's input, that go through it at once where a batch is "auto"; at least one image."""
KEPT_BYTES = 2**26
"""Of logits, that a method leaves with a trace, so that several scores share its forwards."""

Read = Literal["probability", "logit"]
"""What a score is taken of: of the class probabilities, or of the logits."""
Masks = Callable[[range], Float[Tensor, "n *hw"]]
"""Gives the masks of some numbers, in the size of the network's input."""


def scores_seen_through(
    trace: Trace, score: Score, image: int, masks: Masks, count: int, *, read: Read, batch: Batch, key: Hashable
) -> Float[Tensor, "n"]:
    """The score of one image multiplied by so many masks; as ``scores_of``."""
    variants = partial(_masked, trace.images[image], masks)
    return scores_of(trace, score, image, variants, count, read=read, batch=batch, key=key)


def scores_of(
    trace: Trace,
    score: Score,
    image: int,
    variants: Callable[[range], Images],
    count: int,
    *,
    read: Read,
    batch: Batch,
    key: Hashable,
) -> Float[Tensor, "n"]:
    """The score of so many versions of one image; the network is asked once a trace, for all scores.

    Args:
        trace: what the network saw.
        score: what is explained.
        image: which of the batch.
        variants: gives the versions of some numbers in 0..count-1, (n d *hw).
        count: n, how many there are.
        read: whether a score that only picks classes is taken of the probabilities; others are taken of the logits.
        batch: versions that go through the network at once; "auto" for as many as 16 images of 224 x 224.
        key: names the versions, among all that are made of this image.

    Raises:
        InputError: a batch of less than 1; the score does not give one number for each image.
    """
    at_once = per_batch(trace.images[0, 0].numel(), AUTO_PIXELS, batch)
    if not count:
        return trace.logits.detach().new_zeros(0)
    kept = trace.asked.get((key, image))
    answers = (trace.net.logits(variants(part)) for part in parts(count, at_once))
    if kept is None and count * trace.logits.nbytes <= KEPT_BYTES:
        kept = trace.asked[key, image] = torch.cat(list(answers))
    chunks = answers if kept is None else torch.split(kept, at_once)
    return torch.cat([score_of_one(trace, score, image, logits, read=read) for logits in chunks])


def score_of_one(trace: Trace, score: Score, image: int, logits: Logits, *, read: Read) -> Float[Tensor, "n"]:
    """The score of other logits (n k) for one image of the batch; scores may differ from image to image."""
    said = trace.logits.detach()
    rows = said.expand(len(logits), *said.shape).clone()
    rows[:, image] = logits.to(said)
    if read == "probability" and isinstance(score, Picking):
        rows = trace.net.probabilities(rows.flatten(0, 1)).reshape(rows.shape)
    return each(score, rows)[:, image]


def score_of_whole(trace: Trace, score: Score) -> Scores:
    """The score of the images as they are, without gradients."""
    return each(score, trace.logits.detach()[None])[0]


def varying(channels: Float[Tensor, "c *yx"]) -> Int[Tensor, "n"]:
    """The numbers of the channels that are not constant; through the others there is nothing to see."""
    flat = channels.flatten(1)
    return (flat.amax(1) > flat.amin(1)).nonzero().flatten()


def per_batch(cost: int, budget: int, batch: Batch) -> int:
    """How many go through at once: as asked for, or what the budget pays for.

    Raises:
        InputError: less than 1.
    """
    if batch == "auto":
        return max(1, budget // cost)
    try:
        number = operator.index(batch)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f'a batch is of at least 1, or "auto", got {batch!r}')
    return number


def parts(count: int, at_once: int) -> Iterator[range]:
    """The numbers 0..count-1, so many at once."""
    return (range(start, min(start + at_once, count)) for start in range(0, count, at_once))


def _masked(image: Float[Tensor, "d *hw"], masks: Masks, part: range) -> Images:
    return image * masks(part).to(image)[:, None]
