"""Activations before and after normalization, worked out by hand."""

import math

import pytest
import timm
import torch
from scenes import gap_net
from torch import nn

from whatwhere.classifiers.folding import fold_batchnorm
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.inspection.activations import activation_statistics


def test_by_hand():
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.running_mean.fill_(1)
    norm.running_var.fill_(4)
    network = nn.Sequential(nn.ReLU(), norm).train()
    images = torch.tensor([[-3.0, 1, 1], [3, 5, -1]])[None, None]
    (found,) = activation_statistics(network, images)
    # given 0 1 1 3 5 0, it makes (x - 1) / 2 of it: -.5 0 0 1 2 -.5
    assert (found.layer, found.kind) == ("1", "BatchNorm2d")
    assert found.before == pytest.approx((10 / 6, math.sqrt(36 / 6 - 100 / 36), 2 / 6, 0, 5))
    assert found.after == pytest.approx((1 / 3, math.sqrt(5.5 / 6 - 1 / 9), 2 / 6, -0.5, 2))
    assert network.training
    assert norm.training
    assert norm.num_batches_tracked == 0
    assert not norm._forward_hooks


def test_all_kinds_in_the_order_in_which_they_ran():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),
        nn.LocalResponseNorm(3),
        nn.BatchNorm2d(8, track_running_stats=False),
        timm.layers.LayerNorm2d(8),
        nn.Dropout(),
    )
    found = activation_statistics(network, torch.rand(4, 3, 9, 14))
    assert [one.layer for one in found] == ["1", "2", "3", "4", "5"]
    assert found[0].after.mean == pytest.approx(0, abs=1e-5)
    assert found[0].after.std == pytest.approx(1, abs=1e-2)
    assert found[1].before == found[0].after


def test_a_layer_that_runs_twice_and_works_in_place():
    relu = nn.ReLU(inplace=True)
    network = nn.Sequential(nn.Identity(), relu, nn.Flatten(), nn.Linear(2, 2, bias=False), relu)
    network[3].weight.data.copy_(torch.tensor([[1.0, 0], [-1, 0]]))
    (found,) = activation_statistics(network, torch.tensor([[[[3.0, -1]]]]), ["1"])
    # first 3 -1 -> 3 0, then 3 -3 -> 3 0
    assert found.before[:3] == pytest.approx((0.5, math.sqrt(7 - 0.25), 0))
    assert found.after[:3] == pytest.approx((1.5, 1.5, 0.5))


def test_what_a_fold_leaves_is_given_what_the_normalization_made():
    network, images = gap_net(), torch.rand(2, 3, 24, 40)
    folded = fold_batchnorm(network, images)
    (was,) = activation_statistics(network, images)
    assert activation_statistics(folded.network, images) == []
    (now,) = activation_statistics(folded.network, images, folded.folded)
    assert now.kind == "Identity"
    assert now.before == pytest.approx(was.after, abs=1e-4)


def test_what_cannot_be_asked():
    with pytest.raises(InputError, match=r"no layer 'layr'; nearest"):
        activation_statistics(gap_net(), torch.rand(1, 3, 24, 40), ["layr"])

    class Pair(nn.Module):
        def forward(self, x):
            return {"a": x}

    with pytest.raises(UnsupportedError, match="gives no tensor"):
        activation_statistics(nn.Sequential(Pair()), torch.rand(1, 3, 4, 6), ["0"])
