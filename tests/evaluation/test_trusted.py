"""Trust against overlap: numbers by hand, and scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from whatwhere.evaluation.trusted import LEVELS, trust_result, trust_tally


def named(count: int) -> list[str]:
    return [f"{i}.jpg" for i in range(count)]


def test_by_hand():
    """Right are .9 and .4, wrong .6 and .4: of four pairs .9 wins two, and .4 half of one."""
    tally = trust_tally(named(4), np.array([0.9, 0.4, 0.6, 0.4]), np.array([True, True, False, False]))
    found = trust_result(tally)
    assert found["trust ROC AUC"].value == pytest.approx(2.5 / 4)
    assert found["trusted half"].value == pytest.approx(1 / 2)  # .9 and .6
    odd = trust_tally(named(3), np.array([0.9, 0.4, 0.4]), np.array([True, True, False]))
    assert trust_result(odd)["trusted half"].value == pytest.approx((1 + 0.5 / 2) / 1.5)


def test_is_the_area_under_the_curve():
    draw = np.random.default_rng(0)
    trust, right = np.floor(draw.random(300) * LEVELS) / LEVELS + 1e-6, draw.random(300) < 0.7
    found = trust_result(trust_tally(named(300), trust, right))
    assert found["trust ROC AUC"].value == pytest.approx(roc_auc_score(right, trust))
    assert found["trust ROC AUC"].low < 0.5 < found["trust ROC AUC"].high
    order = np.argsort(-trust)
    assert found["trusted half"].value == pytest.approx(right[order[:150]].mean(), abs=0.01)


def test_adds():
    trust, right = np.linspace(0, 1, 7), np.arange(7) % 3 == 0
    parts = [trust_tally(named(7)[part], trust[part], right[part]) for part in (slice(0, 3), slice(3, 7))]
    assert (parts[0] + parts[1]).same(trust_tally(named(7), trust, right))


def test_without_both_kinds_there_is_no_area():
    found = trust_result(trust_tally(named(2), np.array([0.2, 0.9]), np.array([True, True])))
    assert np.isnan(found["trust ROC AUC"].value)
    assert found["trusted half"].value == 1
