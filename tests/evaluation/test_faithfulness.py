"""Faithfulness on networks of which it is known where they look; agreement beside scikit-image."""

import math

import numpy as np
import pytest
import torch
from scenes import plain, red_net
from torch import nn

import whatwhere
from whatwhere.evaluation.agreement import agreement, agreements, ssim, stretched
from whatwhere.evaluation.faithfulness import (
    area,
    drop_and_increase,
    faithfulness,
    imputed,
    randomized,
    road,
    sensitivity,
    similarity_when_randomized,
)
from whatwhere.maps import METHODS

SIZE = (12, 20)


@pytest.fixture
def red():
    return whatwhere.load(red_net(), preprocess=plain(SIZE))


def spot():
    """A red square on blue, and the map that shows it."""
    image = torch.zeros(3, *SIZE)
    image[2] = 0.5
    image[:, 3:9, 4:12] = torch.tensor([1.0, 0, 0])[:, None, None]
    heat = torch.zeros(SIZE)
    heat[3:9, 4:12] = 1
    return image, heat


def logit_gap(red_share, blue_share):
    return 3 * (red_share - blue_share)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_drop_and_increase_by_hand(red):
    image, heat = spot()
    share = 48 / 240
    before, through = sigmoid(logit_gap(share, 0.5 * (1 - share))), sigmoid(logit_gap(share, 0))
    found = drop_and_increase(red, image, heat, 1)
    assert through > before
    assert found == {"average drop": 0, "average increase": 1}
    wrong = drop_and_increase(red, image, 1 - heat, 1)
    after = sigmoid(logit_gap(0, 0.5 * (1 - share)))
    assert wrong["average drop"] == pytest.approx((before - after) / before, abs=1e-6)
    assert wrong["average increase"] == 0


def test_deletion_by_hand(red):
    image, heat = spot()
    # the logit falls evenly while red goes, then rises evenly while blue goes
    share = 48 / 240
    shares = np.arange(101) / 100
    gone = np.floor(shares * 240 + 0.9999) / 240
    red_left, blue_left = np.maximum(share - gone, 0), 0.5 * np.minimum(1 - share, 1 - gone)
    curve = 1 / (1 + np.exp(-3 * (red_left - blue_left)))
    assert area(red, heat, image, torch.zeros_like(image), 1) == pytest.approx(np.trapezoid(curve, shares), abs=2e-3)


def test_right_maps_do_better_than_wrong_ones(red):
    image, heat = spot()
    right, wrong = faithfulness(red, image, heat, 1), faithfulness(red, image, 1 - heat, 1)
    assert right["insertion"] > wrong["insertion"]
    assert right["deletion"] < wrong["deletion"]
    assert right["ROAD most"] < wrong["ROAD most"]
    assert right["ROAD least"] > wrong["ROAD least"]
    assert road(red, image, heat, 1) == right["ROAD most"]


def test_imputed_pixels_are_the_mean_of_their_neighbours():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 9, 13, generator=generator, dtype=torch.float64)
    missing = torch.rand(3, 9, 13, generator=generator) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    filled = imputed(image, missing, noise=0.0)
    weights = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64)[None, None] / 12
    for one, holes in zip(filled, missing, strict=True):
        assert torch.equal(one[:, ~holes], image[:, ~holes])
        padded = nn.functional.conv2d(one[:, None], weights, padding=1)[:, 0]
        there = nn.functional.conv2d(torch.ones(1, 1, 9, 13, dtype=torch.float64), weights, padding=1)[0, 0]
        assert torch.allclose((padded / there)[:, holes], one[:, holes], atol=1e-4)


def test_imputing_a_single_pixel_by_hand():
    image = torch.arange(15.0).reshape(1, 3, 5)
    missing = torch.zeros(1, 3, 5, dtype=torch.bool)
    missing[0, 1, 2] = True
    filled = imputed(image, missing, noise=0.0)
    assert filled[0, 0, 1, 2] == pytest.approx(7)
    all_gone = imputed(image, torch.ones(1, 3, 5, dtype=torch.bool), noise=0.0)
    assert not all_gone.any()
    assert imputed(image, missing)[0, 0, 1, 2] == pytest.approx(7, abs=0.1)
    assert torch.equal(imputed(image, missing), imputed(image, missing))


def test_sensitivity(red):
    image, _ = spot()
    calm = sensitivity(red, image, 1, METHODS["gradcam"], noise=0.0)
    assert calm == 0
    stirred = [sensitivity(red, image, 1, METHODS["gradcam"], noise=noise) for noise in (0.01, 0.1)]
    assert 0 < stirred[0] < stirred[1]


def test_sanity(net, photos):
    images = torch.stack([net.preprocess(whatwhere.open_photo(photo))[0] for photo in photos[:2]])
    before = {name: parameter.clone() for name, parameter in net.network.named_parameters()}
    shuffled = randomized(net)
    assert all(torch.equal(before[name], parameter) for name, parameter in net.network.named_parameters())
    gradcam = similarity_when_randomized(net, shuffled, images, 285, METHODS["gradcam"])
    same = similarity_when_randomized(net, net, images, 285, METHODS["gradcam"])
    assert same == pytest.approx([1, 1])
    assert max(map(abs, gradcam)) < 0.7


def test_agreement_with_itself_whatever_the_scale():
    heat = np.random.default_rng(0).random((30, 41)).astype(np.float32)
    found = agreement(heat, 7 * heat + 2)
    assert found["CC"] == pytest.approx(1)
    assert found["SSIM"] == pytest.approx(1, abs=1e-5)
    assert found["IoU"] == 1
    assert found["KL"] == pytest.approx(0, abs=1e-5)
    other = agreement(heat, heat[::-1])
    assert abs(other["CC"]) < 0.2
    assert other["KL"] > 0.05
    assert set(agreements({"a": heat, "b": heat, "c": heat})) == {
        f"{pair}/{key}" for pair in ("a~b", "a~c", "b~c") for key in ("KL", "CC", "SSIM", "IoU")
    }


def test_agreement_with_nothing():
    heat = np.random.default_rng(0).random((30, 41)).astype(np.float32)
    nothing = np.zeros_like(heat)
    assert agreement(heat, nothing)["CC"] == 0
    assert agreement(heat, nothing)["IoU"] == 0
    assert agreement(nothing, nothing)["IoU"] == 1


def test_stretching():
    heat = np.linspace(3, 5, 101).reshape(1, 101)
    found = stretched(heat)
    assert (found[0, :2] == 0).all()
    assert (found[0, -2:] == 1).all()
    assert found[0, 50] == pytest.approx(0.5)
    small = np.zeros((20, 30))
    small[3, 4] = 2
    assert stretched(small).max() == 1
    assert not stretched(np.full((5, 7), 3.0)).any()


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(0)
    one = generator.random((40, 53))
    for other in (one, one + generator.normal(0, 0.1, one.shape), generator.random(one.shape)):
        theirs = metrics.structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        assert ssim(one, other) == pytest.approx(theirs, abs=1e-3)
