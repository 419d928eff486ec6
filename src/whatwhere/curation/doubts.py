"""How much each label is to be doubted: what a classifier says of a picture that has not learned from it."""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from whatwhere.errors import extra

FOLDS = 5
STRENGTH = 10.0
"""The inverse of the L2 penalty, on descriptors whose mean square is 1: of 1, 10 and 100 the best for 4 to 30
pictures a class (planted wrong labels in cub60 and in two sets of pets)."""


class Doubts(NamedTuple):
    """What is to be said of the labels of n pictures.

    Attributes:
        doubt: 1 - p(label), in [0, 1]; nan where there is nothing to judge by.
        likelier: the most probable class, be it the label; -1 where there is nothing to judge by.
    """

    doubt: Float[np.ndarray, "n"]
    likelier: Int[np.ndarray, "n"]

    def ranked(self) -> Int[np.ndarray, "n"]:
        """The pictures, most doubted first; those that cannot be judged last."""
        return np.argsort(np.where(np.isnan(self.doubt), -1, self.doubt) * -1, kind="stable")


def doubted(
    descriptors: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n"],
    together: Int[np.ndarray, "n"],
    *,
    seed: int = 0,
) -> Doubts:
    """Doubt by self-confidence out of sample (Northcutt, Jiang, Chuang, Confident Learning, JAIR 2021, section 3).

    The probability of the given label by a logistic regression on the pictures of the other folds; each class is in
    as many folds as it can be. The network's own last layer is not asked, since it may have learned from the wrong
    labels, and descriptors are to be of whole pictures, since a map of the label looks for what speaks for it. A
    class of which all pictures are one cannot be judged, nor can anything where there is one class.

    Args:
        descriptors: features of whole pictures.
        labels: the class of each.
        together: the same number for copies of one picture: what is learned from one would be known of the other.
        seed: of the folds.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with extra("classic", "doubting labels"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold
    found = Doubts(np.full(len(labels), np.nan), np.full(len(labels), -1, dtype=np.int64))
    counts = np.unique(labels, return_counts=True)[1]
    folds = min(FOLDS, len(set(together.tolist())), *counts.max(initial=0, keepdims=True))
    if len(counts) < 2 or folds < 2:
        return found
    centred = _balanced(descriptors)
    cut = StratifiedGroupKFold(int(folds), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        warnings.simplefilter("ignore", ConvergenceWarning)
        for inside, outside in cut.split(centred, labels, together):
            known = np.unique(labels[inside])
            judged = outside[np.isin(labels[outside], known)]
            if len(known) < 2 or not len(judged):
                continue
            model = LogisticRegression(C=STRENGTH, max_iter=1000).fit(centred[inside], labels[inside])
            probabilities = model.predict_proba(centred[judged])
            own = np.searchsorted(model.classes_, labels[judged])
            found.doubt[judged] = 1 - probabilities[np.arange(len(judged)), own]
            found.likelier[judged] = model.classes_[probabilities.argmax(1)]
    return found


def _balanced(descriptors: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Directions from the mean, scaled to a mean square of 1."""
    lengths = np.linalg.norm(descriptors, axis=1, keepdims=True)
    unit = descriptors / np.maximum(lengths, 1e-12)
    centred = unit - unit.mean(0)
    scaled: np.ndarray = centred / max(float(np.sqrt((centred**2).sum(1).mean())), 1e-12)
    return scaled
