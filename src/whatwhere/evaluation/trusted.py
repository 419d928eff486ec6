"""Whether boxes that are trusted are right: trust against overlap, counted."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from whatwhere.evaluation.tally import Measure, Tally, measure, weighted, weights

LEVELS = 1000
"""Of trust, from 0 to 1; boxes of one level are trusted alike."""


def trust_tally(names: Sequence[str], trust: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> Tally:
    """Count boxes by how far they are trusted, ``trust`` (rows 2 levels): those that are wrong, and those right.

    Args:
        names: of the images.
        trust: of each one's box, from 0 to 1.
        right: whether its IoU with a true one is at least .5.
    """
    counts = np.zeros((len(names), 2, LEVELS), dtype=np.int64)
    counts[np.arange(len(names)), right.astype(int), np.minimum((trust * LEVELS).astype(int), LEVELS - 1)] = 1
    return Tally({"trust": weighted(weights(names), counts)})


def trust_result(tally: Tally) -> dict[str, Measure]:
    """How well trust tells right boxes from wrong ones.

    "trust ROC AUC" is the chance that a right box is trusted more than a wrong one, equal levels counting half, and
    nan without both; "trusted half" the share of right boxes in the more trusted half, where a level that the half
    cuts through counts by its share.
    """
    wrong, right = tally["trust"].transpose(1, 0, 2).astype(np.float64)
    below = wrong.cumsum(1) - wrong / 2
    pairs = wrong.sum(1) * right.sum(1)
    area = np.divide((right * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    both = (wrong + right)[:, ::-1]
    half = both.sum(1, keepdims=True) / 2
    taken = (half - (both.cumsum(1) - both)).clip(0, both)
    share = np.divide(right[:, ::-1], both, out=np.zeros_like(both), where=both > 0)
    top = np.divide((taken * share).sum(1), half[:, 0], out=np.full(len(half), np.nan), where=half[:, 0] > 0)
    return {"trust ROC AUC": measure(area), "trusted half": measure(top)}
