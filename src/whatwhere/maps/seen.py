"""What the network says of other versions of an image, masked or changed: many forwards, a bounded number at once."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError
from whatwhere.scores import each
from whatwhere.types import Images, Logits, Score

Batch = int | Literal["auto"]
AUTO_PIXELS = 16 * 224 * 224
"""Of the network's input, that go through it at once where a batch is "auto"; at least one image."""

Read = Literal["probability", "logit"]
"""What a score is taken of: of the class probabilities, or of the logits."""


def scores_of(
    trace: Trace,
    score: Score,
    image: int,
    variants: Callable[[range], Images],
    count: int,
    *,
    read: Read,
    batch: Batch,
) -> Float[Tensor, "n"]:
    """The score of so many versions of one image.

    Args:
        trace: what the network saw.
        score: what is explained.
        image: which of the batch.
        variants: gives the versions of some numbers in 0..count-1, (n d *hw).
        count: n, how many there are.
        read: whether the score is taken of the probabilities or of the logits.
        batch: versions that go through the network at once; "auto" for as many as 16 images of 224 x 224.

    Raises:
        InputError: a batch of less than 1.
    """
    at_once = per_batch(trace.images[0, 0].numel(), AUTO_PIXELS, batch)
    logits = (trace.net.logits(variants(part)) for part in parts(count, at_once))
    found = [score_of_one(trace, score, image, part, read=read) for part in logits]
    return torch.cat(found) if found else trace.logits.detach().new_zeros(0)


def score_of_one(trace: Trace, score: Score, image: int, logits: Logits, *, read: Read) -> Float[Tensor, "n"]:
    """The score of other logits (n k) for one image of the batch; scores may differ from image to image."""
    said = trace.logits.detach()
    rows = said.expand(len(logits), *said.shape).clone()
    rows[:, image] = logits.to(said)
    if read == "probability":
        rows = trace.net.probabilities(rows.flatten(0, 1)).reshape(rows.shape)
    return each(score, rows)[:, image]


def read_off(trace: Trace, score: Score, read: Read) -> Float[Tensor, "b"]:
    """The score of the images themselves."""
    logits = trace.logits.detach()
    return score(trace.net.probabilities(logits) if read == "probability" else logits)


def per_batch(cost: int, budget: int, batch: Batch) -> int:
    """How many go through at once: as asked for, or what the budget pays for.

    Raises:
        InputError: less than 1.
    """
    if batch == "auto":
        return max(1, budget // cost)
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f'a batch is of at least 1, or "auto", got {batch!r}')
    return batch


def parts(count: int, at_once: int) -> Iterator[range]:
    """The numbers 0..count-1, so many at once."""
    return (range(start, min(start + at_once, count)) for start in range(0, count, at_once))
