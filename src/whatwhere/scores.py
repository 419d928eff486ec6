"""What is explained: logits -> one number an image.

A score is any differentiable function from logits (b k) to (b,). Asking for a class, a contrast of
classes or a probability is a choice of score and not of method. Those that only pick classes and combine them
(``Picking``) can be taken of the probabilities too, which Score-CAM and its like do.
"""

from collections.abc import Sequence
from functools import update_wrapper

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whatwhere.errors import InputError, not_one_an_image
from whatwhere.types import Logits, Score, Scores

Classes = int | Int[Tensor, "n"]
"""One class for all images, or one for each."""


class Picking:
    """A score that picks classes and combines what it finds there: logits, or probabilities in their place."""

    __name__: str

    def __init__(self, score: Score) -> None:
        self.score = score
        update_wrapper(self, score)

    def __call__(self, values: Logits) -> Scores:
        """One number an image, of logits or of probabilities."""
        return self.score(values)


def of_class(index: Classes) -> Score:
    """The logit of a class: one for all images, or one for each.

    Raises:
        InputError: when the score is taken: an index out of range, or not one for each image.
    """
    return Picking(lambda logits: _pick(logits, index))


def of_classes(indices: Sequence[int]) -> Score:
    """The mean logit of several classes, of all terriers say.

    Raises:
        InputError: when the score is taken: an index out of range, or none at all.
    """

    def score(logits: Logits) -> Scores:
        if not indices:
            raise InputError("wanted at least one class, got none")
        return torch.stack([_pick(logits, index) for index in indices]).mean(0)

    return Picking(score)


@Picking
def top_class(logits: Logits) -> Scores:
    """The highest logit of each image: what the network says first."""
    return logits.amax(1)


def contrast(index: Classes, *, others: int = 3, strength: float = 0.6) -> Score:
    """A class against those most like it: what tells them apart (Zhang et al., Finer-CAM, CVPR 2025).

    ``S = y_c - strength * mean(y_d)`` over the ``others`` classes d of the highest logits beside c.

    Raises:
        InputError: when the score is taken: an index out of range, or fewer other classes than wanted.
    """

    def score(logits: Logits) -> Scores:
        if not 1 <= others < logits.shape[1]:
            raise InputError(f"there are 1 to {logits.shape[1] - 1} other classes, got others={others}")
        picked = _pick(logits, index)
        return picked - strength * _without(logits, index).topk(others, dim=1).values.mean(1)

    return Picking(score)


def margin(index: Classes) -> Score:
    """A class's logit above the best of the others: positive where the network says that class.

    Raises:
        InputError: when the score is taken: an index out of range, or only one class.
    """
    return contrast(index, others=1, strength=1.0)


def probability(index: Classes) -> Score:
    """The softmax probability of a class; its gradient fades where the network is sure.

    Raises:
        InputError: when the score is taken: an index out of range, or not one for each image.
    """
    return lambda logits: _pick(logits.softmax(1), index)


def against(score: Score) -> Score:
    """What speaks against a score: of a network with a single logit, for its other class."""
    return Picking(lambda logits: -score(logits)) if isinstance(score, Picking) else lambda logits: -score(logits)


def similarity(embedding: Float[Tensor, "k"]) -> Score:
    """The cosine between what the network gives, taken as an embedding, and another image's.

    Raises:
        InputError: when the score is taken: another length, or an embedding of zeros.
    """

    def score(logits: Logits) -> Scores:
        if embedding.shape != logits.shape[1:] or not embedding.any():
            raise InputError(
                f"wanted an embedding of {logits.shape[1]} numbers, not all 0, got {tuple(embedding.shape)}"
            )
        return torch.cosine_similarity(logits, embedding.to(logits)[None], dim=1)

    return score


def each(score: Score, variants: Float[Tensor, "n b k"]) -> Float[Tensor, "n b"]:
    """The score of every one of n batches of logits; at once where it can be vectorized (``torch.vmap``).

    Raises:
        InputError: the score does not give one number for each image.
    """
    try:
        values: Tensor = torch.vmap(score)(variants.clone())
    except RuntimeError:  # it looks at values, or writes in place
        values = torch.stack([score(logits.clone()) for logits in variants])
    if values.shape != variants.shape[:2]:
        raise not_one_an_image(variants.shape[1], tuple(values.shape[1:]))
    return values


def _pick(values: Logits, index: Classes) -> Scores:
    return values.gather(1, _indices(values, index)[:, None])[:, 0]


def _without(logits: Logits, index: Classes) -> Logits:
    return logits.scatter(1, _indices(logits, index)[:, None], -torch.inf)


def _indices(logits: Logits, index: Classes) -> Int[Tensor, "b"]:
    b, k = logits.shape
    wanted = torch.as_tensor(index, device=logits.device)
    if wanted.ndim == 1 and len(wanted) != b:
        raise InputError(f"one class index for each image: got {len(wanted)} for {b} images")
    if bool((wanted < 0).any() or (wanted >= k).any()):
        raise InputError(f"a class index is in 0..{k - 1}, got {wanted.tolist()}")
    # a tensor made under inference_mode cannot be kept for the gradient
    return (wanted.clone() if wanted.is_inference() else wanted).expand(b)
