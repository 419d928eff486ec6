"""Trust: what boxes do while the threshold moves, and a logistic regression that begins somewhere."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from whatwhere.errors import InputError
from whatwhere.regions.trust import HIGHER, LOWER, SPREAD, Signals, Trust, fitted, signals_of


def steps(*levels: float) -> np.ndarray:
    """Nested rectangles of rising heat, (12 20), each a pixel smaller on every side."""
    heat = np.zeros((12, 20), np.float32)
    for depth, level in enumerate(levels):
        heat[1 + depth : 11 - depth, 1 + depth : 19 - depth] = level
    return heat


def test_signals_by_hand():
    """Of rectangles of 18 x 10, 16 x 8, 14 x 6 and 12 x 4 the two outer ones have heat .32."""
    heat = steps(0.32, 0.32, 0.72, 1.0)
    seen = signals_of(heat, 0.5, 0.5)
    assert seen.confidence == pytest.approx(np.log(0.5))
    assert seen.agreement == 1
    wider, narrower = 14 * 6 / (18 * 10), 12 * 4 / (14 * 6)
    level = 0.32  # the highest heat outside the mask; thresholds between that and .5 give the same mask
    lower = [wider if level * one < 0.32 else 1 for one in LOWER]
    higher = [narrower if level * one >= 0.72 else 1 for one in HIGHER]
    assert seen.lower == pytest.approx(np.mean(lower))
    assert seen.higher == pytest.approx(np.mean(higher))
    assert signals_of(heat, 0.4, 0.5) == seen  # the same mask
    above = signals_of(heat, 0.75, 0.9)
    assert above.confidence == pytest.approx(np.log(0.9))
    assert above.lower == pytest.approx(narrower)  # from .36 to .65 it is the box of 14 x 6
    assert above.higher == 1


def test_looks_agree_by_the_boxes_of_any_two():
    """Above half of their own maxima: 8 x 8, the same on a grid twice as fine, and its upper half."""
    one = np.zeros((12, 20), np.float32)
    one[2:10, 4:12] = 3
    two, half = np.kron(one, np.ones((2, 2), np.float32)), one.copy()
    half[6:10] = 0
    heat = steps(1.0)
    assert signals_of(heat, 0.3, 1.0, [one, two]).agreement > 0.95
    assert signals_of(heat, 0.3, 1.0, [one, half]).agreement == pytest.approx(0.5, abs=0.04)
    assert signals_of(heat, 0.3, 1.0, [one, one, half]).agreement == pytest.approx((1 + 0.5 + 0.5) / 3, abs=0.03)
    assert signals_of(heat, 0.3, 1.0, [one, np.zeros_like(one)]).agreement == 0


def test_a_box_of_one_flat_region_stays():
    seen = signals_of(steps(1.0), 0.3, 1.0)
    assert seen == (0, 1, 1, 1)
    assert np.isfinite(signals_of(steps(1.0), 0.3, 0.0).confidence)
    assert signals_of(np.zeros((5, 7), np.float32), 0.3, 0.9) is None


def test_every_second_pixel_is_as_good():
    small = steps(0.2, 0.5, 0.8, 1.0)
    large = np.kron(small, np.ones((30, 30), np.float32))
    for one, other in zip(signals_of(small, 0.4, 0.3), signals_of(large, 0.4, 0.3), strict=True):
        assert one == pytest.approx(other, abs=0.05)


@pytest.mark.parametrize("threshold", ["otsu", "p80"])
def test_other_thresholds_have_signals_too(threshold):
    seen = signals_of(steps(0.2, 0.5, 0.8, 1.0), threshold, 0.3)
    assert 0 < seen.lower <= 1
    assert 0 < seen.higher <= 1


def test_trust_is_logistic():
    trust = Trust((0.5, 1.0, -2.0, 3.0), 0.25)
    assert trust(Signals(-2.0, 0.5, 0.75, 1.0)) == pytest.approx(1 / (1 + np.exp(-(-1 + 0.5 - 1.5 + 3 + 0.25))))


def drawn(count: int):
    draw = np.random.default_rng(3)
    signals = [Signals(*row) for row in np.column_stack([draw.normal(-1, 1, count), draw.random((count, 3))])]
    chance = [Trust((0.4, 1.0, 3.0, 2.0), -2.5)(one) for one in signals]
    return signals, draw.random(count) < chance


def test_a_fit_is_a_logistic_regression():
    signals, right = drawn(400)
    found = fitted(signals, right, Trust((0.0, 0.0, 0.0, 0.0), 0.0), strength=1.0)
    scaled = np.array(signals) / SPREAD
    peer = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled, right)
    np.testing.assert_allclose(np.array(found.weights) * SPREAD, peer.coef_[0], rtol=1e-4, atol=1e-5)
    assert found.bias == pytest.approx(peer.intercept_[0], rel=1e-4)


def test_little_to_go_by_changes_little():
    begun = Trust((0.3, 2.0, 5.0, 1.0), -4.0)
    signals, right = drawn(400)
    few, many = fitted(signals[:6], right[:6], begun), fitted(signals, right, begun)
    assert 0 < right[:6].sum() < 6

    def away(one: Trust) -> float:
        return float(np.linalg.norm((np.array(one.weights) - begun.weights) * SPREAD))

    assert away(few) < away(many)
    held = fitted(signals, right, begun, strength=1e9)
    np.testing.assert_allclose(held.weights, begun.weights, atol=1e-4)


def test_a_fit_separates_what_can_be_separated():
    signals = [Signals(0.0, 0.5, one / 20, 1.0) for one in range(20)]
    found = fitted(signals, np.arange(20) >= 10, Trust((0.0, 0.0, 0.0, 0.0), 0.0))
    chances = [found(one) for one in signals]
    assert chances == sorted(chances)
    assert chances[0] < 0.5 < chances[-1]


def test_a_fit_wants_both_kinds():
    signals, right = drawn(5)
    begun = Trust((0.0, 0.0, 0.0, 0.0), 0.0)
    with pytest.raises(InputError, match="3 for 5"):
        fitted(signals, right[:3], begun)
    with pytest.raises(InputError, match="5 right of 5"):
        fitted(signals, np.ones(5, bool), begun)
