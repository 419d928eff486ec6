"""What is explained: logits -> one number an image.

A score is any differentiable function from logits (b k) to (b,). Asking for a class, a contrast of
classes or a probability is a choice of score and not of method.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from whatwhere.errors import InputError
from whatwhere.types import Logits, Score, Scores


def of_class(index: int | Int[Tensor, "b"]) -> Score:
    """The logit of a class: one for all images, or one for each.

    Raises:
        InputError: when the score is taken: an index out of range, or not one for each image.
    """

    def score(logits: Logits) -> Scores:
        b, k = logits.shape
        wanted = torch.as_tensor(index, device=logits.device)
        if wanted.ndim == 1 and len(wanted) != b:
            raise InputError(f"one class index for each image: got {len(wanted)} for {b} images")
        if bool((wanted < 0).any() or (wanted >= k).any()):
            raise InputError(f"a class index is in 0..{k - 1}, got {wanted.tolist()}")
        return logits.gather(1, wanted.expand(b)[:, None])[:, 0]

    return score


def top_class(logits: Logits) -> Scores:
    """The highest logit of each image: what the network says first."""
    return logits.amax(1)
