"""Accuracy, average precision, calibration, confusion: by hand and beside scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch

from whatwhere.evaluation.classification import (
    average_precision,
    classification_result,
    classification_tally,
    confused,
    map_scores,
)
from whatwhere.evaluation.tally import Tally, mean_of, means


def probabilities(seed, n=200, k=6):
    logits = np.random.default_rng(seed).normal(0, 2, (n, k))
    odds = np.exp(logits)
    return odds / odds.sum(1, keepdims=True)


def names(n):
    return [f"image {number}" for number in range(n)]


def test_by_hand():
    said = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    truth = np.eye(3, dtype=bool)[[0, 1, 1, 2]]
    tally = classification_tally(names(4), said, truth, np.arange(3))
    result = classification_result(tally)
    assert result["top-1"].value == 0.75
    assert result["top-5"].value == 1
    assert tally["shown"].tolist() == [1, 2, 1]
    assert tally["right"].tolist() == [1, 1, 1]
    assert result["mean per class"].value == pytest.approx((1 + 0.5 + 1) / 3)
    assert confused(tally, np.arange(3)) == [(1, 0, 1)]
    # bins of .7, .5, .6 and .6: |1 - .7| + |1 - .5| + |1 - 1.2|, over four images
    assert result["calibration error"].value == pytest.approx((0.3 + 0.5 + 0.2) / 4)
    # class 1: ranked .5 (it), .3 and .3 (one of them it), .2
    assert average_precision(tally)[1] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(tally)[0] == 1


def test_a_classifier_may_have_more_classes():
    said = np.array([[0.1, 0.6, 0.2, 0.1], [0.5, 0.1, 0.1, 0.3]])
    truth = np.array([[True, False], [False, True]])
    tally = classification_tally(names(2), said, truth, np.array([1, 3]))
    assert classification_result(tally)["top-1"].value == 0.5
    assert confused(tally, np.array([1, 3])) == [(1, 0, 1)]


def test_two_classes_of_the_data_set_may_be_one_of_the_classifiers():
    said = np.array([[0.1, 0.9], [0.2, 0.8]])
    truth = np.array([[True, False], [False, True]])
    tally = classification_tally(names(2), said, truth, np.array([1, 1]))
    assert classification_result(tally)["top-1"].value == 1
    assert tally["right"].tolist() == [1, 1]


def test_average_precision_is_scikit_learns_up_to_the_levels():
    metrics = pytest.importorskip("sklearn.metrics")
    said = probabilities(0)
    truth = np.random.default_rng(1).random(said.shape) < 0.3
    tally = classification_tally(names(len(said)), said, truth, np.arange(6))
    theirs = metrics.average_precision_score(truth, said, average=None)
    assert np.allclose(average_precision(tally), theirs, atol=0.01)
    assert classification_result(tally)["mAP"].value == pytest.approx(theirs.mean(), abs=0.005)


def test_calibration_error_is_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    said = probabilities(2)
    labels = np.random.default_rng(3).integers(0, 6, len(said))
    tally = classification_tally(names(len(said)), said, np.eye(6, dtype=bool)[labels], np.arange(6))
    theirs = classification.multiclass_calibration_error(torch.tensor(said), torch.tensor(labels), 6, n_bins=15)
    assert classification_result(tally)["calibration error"].value == pytest.approx(float(theirs), abs=1e-5)


def test_images_that_show_nothing_rank_but_are_not_right_or_wrong():
    said = probabilities(4, n=3)
    truth = np.zeros((3, 6), dtype=bool)
    truth[0, said[0].argmax()] = True
    tally = classification_tally(names(3), said, truth, np.arange(6))
    top1 = mean_of(tally, "top-1")
    assert top1 is not None
    assert top1.value == 1
    assert tally["top-1.count"][0] == 1
    assert tally["ranked"].sum() == 18
    assert tally["confidence"][0, 0].sum() == 1


def test_halves_make_the_whole():
    said = probabilities(5, n=9)
    truth = np.eye(6, dtype=bool)[np.arange(9) % 6]
    whole = classification_tally(names(9), said, truth, np.arange(6))
    first = classification_tally(names(9)[:4], said[:4], truth[:4], np.arange(6))
    second = classification_tally(names(9)[4:], said[4:], truth[4:], np.arange(6))
    assert (second + first).same(whole)
    assert (Tally() + whole).same(whole)


def test_classes_by_their_maps():
    # class 0 in one hot cell, class 1 weakly everywhere
    maps = torch.tensor([[[[4.0, 0, 0]], [[1.0, 1, 1]]]])
    scores = map_scores(maps, torch.zeros(2), "softmax")
    first = np.exp(4) / (np.exp(4) + np.e)
    second = np.e / (np.exp(4) + np.e) + 2 * np.e / (1 + np.e)
    assert torch.allclose(scores, torch.tensor([[first, second]], dtype=torch.float32))


def test_means_leave_out_nan_and_add_to_the_last_bit():
    values = np.random.default_rng(0).random(10)
    values[3] = np.nan
    whole = means(names(10), {"x": values})
    parts = means(names(10)[5:], {"x": values[5:]}) + means(names(10)[:5], {"x": values[:5]})
    assert whole.same(parts)
    found = mean_of(whole, "x")
    assert found is not None
    assert found.value == pytest.approx(np.nanmean(values))
    assert found.low < found.value < found.high
    assert mean_of(whole, "y") is None
