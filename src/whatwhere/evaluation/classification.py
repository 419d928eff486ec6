"""What: accuracy, average precision, confusion and calibration, for one class an image or several."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whatwhere.classifiers.classifier import Activation
from whatwhere.evaluation.tally import ONE, Measure, Tally, mean_of, means, measure, weighted, weights

BINS = 15
"""Of confidence, for the calibration error."""
LEVELS = 512
"""Of log-odds between -REACH and REACH, by which images are ranked for the average precision."""
REACH = 20.0


def classification_tally(
    names: Sequence[str],
    probabilities: Float[np.ndarray, "n k"],
    truth: Bool[np.ndarray, "n d"],
    classes: Int[np.ndarray, "d"],
) -> Tally:
    """Count what a classifier says of images.

    Args:
        names: of the images.
        probabilities: of its classes.
        truth: which of the data set's classes each image shows.
        classes: which of the classifier's they are.

    Returns:
        ``top-1``, ``top-5`` (the most probable class, or one of five, is among those shown; of images that show any),
        ``right`` (d) and ``shown`` (d) images of each class, ``confusion`` (d k) of images with one class,
        ``ranked`` (2 d levels) images by how probable each class is, without it and with it, and ``confidence``
        (rows 3 bins) of images that show any: how many, how many right, sum of confidences.
    """
    n, k = probabilities.shape
    correct = top_hits(probabilities, truth, classes)
    top = highest(probabilities, 1)
    known = truth.any(1)
    first = correct[:, 0]
    several = {"top-1": first, "top-5": correct.any(1)}
    tally = means(names, {name: np.where(known, hit, np.nan) for name, hit in several.items()})

    confidence = probabilities[np.arange(n), top[:, 0]]
    bins = np.zeros((n, 3, BINS), dtype=np.int64)
    at = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins[np.arange(n), :, at] = np.stack([np.ones(n), first, np.round(confidence * ONE)], 1)
    bins[~known] = 0

    alone = truth.sum(1) == 1
    d = len(classes)
    confusion = np.bincount(truth[alone].argmax(1) * k + top[alone, 0], minlength=d * k).reshape(d, k)
    found = top[:, :1] == classes
    return tally + Tally(
        {
            "shown": truth.sum(0),
            "right": (truth & found).sum(0),
            "confusion": confusion.astype(np.int32),
            "ranked": _ranked(probabilities[:, classes], truth).astype(np.int32),
            "confidence": weighted(weights(names), bins),
        }
    )


def top_hits(
    scores: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, "n d"], classes: Int[np.ndarray, "d"]
) -> Bool[np.ndarray, "n top"]:
    """Whether the class of the highest score, of the second, ..., of the fifth is among those shown."""
    shows = np.zeros(scores.shape, dtype=bool)
    images, numbers = np.nonzero(truth)
    shows[images, classes[numbers]] = True
    hits: np.ndarray = np.take_along_axis(shows, highest(scores, 5), 1)
    return hits


def highest(scores: Float[np.ndarray, "n k"], count: int) -> Int[np.ndarray, "n top"]:
    """The classes of the highest scores, the highest first; fewer where there are not so many."""
    return torch.from_numpy(scores).topk(min(count, scores.shape[1])).indices.numpy()


def map_scores(
    maps: Float[Tensor, "b k *yx"], bias: Float[Tensor, "k"], activation: Activation, share: float = 0.2
) -> Float[Tensor, "b k"]:
    """Classes by their maps: the sum of a class's confidences over the cells of its region.

    A cell's confidences are those of the classifier if the cell were all that it sees: softmax, or sigmoid, over the
    class maps and the bias. A class's region is where its map is above a share of its positive maximum.

    Args:
        maps: plain CAM of every class.
        bias: of the last linear layer.
        activation: of the classifier.
        share: of the maximum.
    """
    flat = maps.flatten(2)
    cells = flat + bias[:, None]
    confidence = cells.softmax(1) if activation == "softmax" else cells.sigmoid()
    region = flat > share * flat.amax(2, keepdim=True).clamp(min=0)
    return (confidence * region).sum(2)


def _ranked(probabilities: Float[np.ndarray, "n d"], truth: Bool[np.ndarray, "n d"]) -> Int[np.ndarray, "2 d levels"]:
    d = truth.shape[1]
    p = probabilities.astype(np.float64).clip(1e-12, 1 - 1e-12)
    odds = np.log(p) - np.log1p(-p)
    level = ((odds + REACH) * (LEVELS / 2 / REACH)).clip(0, LEVELS - 1).astype(np.int64)
    places = (truth * d + np.arange(d)) * LEVELS + level
    return np.bincount(places.ravel(), minlength=2 * d * LEVELS).reshape(2, d, LEVELS)


def average_precision(tally: Tally) -> Float[np.ndarray, "d"]:
    """Of each class, over images ranked by its probability: the mean precision at those that show it.

    Images whose log-odds fall into one of LEVELS bins are one rank; nan where no image shows the class.
    """
    without, shown = (part[:, ::-1].cumsum(1) for part in tally["ranked"].astype(np.int64))
    precision = shown / np.maximum(shown + without, 1)
    recall = np.divide(shown, shown[:, -1:], out=np.full(shown.shape, np.nan), where=shown[:, -1:] > 0)
    area: np.ndarray = (precision * np.diff(recall, prepend=0, axis=1)).sum(1)
    return area


def classification_result(tally: Tally) -> dict[str, Measure]:
    """Top-1 and top-5 accuracy, their mean over classes, mean average precision, expected calibration error.

    The calibration error (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3) is over 15 bins of
    equal width. The means over classes have no interval.
    """
    if "shown" not in tally:
        return {}
    found = {name: one for name in ("top-1", "top-5") if (one := mean_of(tally, name)) is not None}
    shown = tally["shown"]
    if shown.any():
        recall = (tally["right"] / np.maximum(shown, 1))[shown > 0].mean()
        precision = np.nanmean(average_precision(tally))
        nan = float("nan")
        found["mean per class"] = Measure(float(recall), nan, nan)
        found["mAP"] = Measure(float(precision), nan, nan)
        count, right, confidence = tally["confidence"].transpose(1, 0, 2)
        gaps = np.abs(right - confidence / ONE).sum(1) / np.maximum(count.sum(1), 1)
        found["calibration error"] = measure(gaps)
    return found


def confused(tally: Tally, classes: Int[np.ndarray, "d"], count: int = 10) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: class of the data set, class of the classifier, images."""
    wrong = tally["confusion"].astype(np.int64)
    wrong[np.arange(len(classes)), classes] = 0
    order = np.argsort(-wrong.ravel(), kind="stable")[:count]
    pairs = [(*divmod(int(place), wrong.shape[1]), int(wrong.ravel()[place])) for place in order]
    return [pair for pair in pairs if pair[2]]
