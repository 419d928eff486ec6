"""The last layer on frozen features: against scikit-learn, by law, and what is kept of it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from whatwhere.classifiers.around import around
from whatwhere.classifiers.zoo import build
from whatwhere.images import Preprocess
from whatwhere.training.data import split_data
from whatwhere.training.light import FOLDS, deciding, features_of, fit_last_layer
from whatwhere.training.objective import dense_loss, loss_of, measured, prior_of
from whatwhere.training.recipe import Recipe

SIZE = (48, 64)


def small(classes=3, activation="softmax", **head):
    torch.manual_seed(0)
    options = {"channels": [8, 8, 8, 12], "output_stride": 8} | ({"head": head} if head else {})
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=classes, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    labels = [f"class {i}" for i in range(classes)]
    plain = Preprocess(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    return around(network, name="timm/resnet10t", labels=labels, preprocess=plain, activation=activation)


def test_losses_by_hand():
    logits, targets = torch.tensor([[0.0, np.log(3.0)]], dtype=torch.float32), torch.tensor([[1.0, 0.0]])
    assert float(loss_of(logits, targets)) == pytest.approx(np.log(4))
    assert float(loss_of(logits, targets, smoothing=0.2)) == pytest.approx(0.9 * np.log(4) + 0.1 * np.log(4 / 3))
    several = -np.log(0.5) - np.log(0.25)
    assert float(loss_of(logits, targets, "sigmoid")) == pytest.approx(several / 2)
    maps = torch.tensor([[[[0.0, 0.0]], [[0.0, np.log(3.0)]]]], dtype=torch.float32)
    assert float(dense_loss(maps, targets)) == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_priors_by_hand():
    targets = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert prior_of(targets)[:2].exp().tolist() == pytest.approx([0.75, 0.25])
    assert prior_of(targets, "sigmoid").tolist() == [0, 0, 0]


def test_measured_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [4.0, 5.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert measured(logits, targets) == 0.5
    # of the first class, images 3 0 2 1 in this order: hits at 2 and 4; of the second 3 1 0 2: hits at 1 and 4
    assert measured(logits, targets, "sigmoid") == pytest.approx(((1 / 2 + 2 / 4) / 2 + (1 + 2 / 4) / 2) / 2)


def test_logistic_regression_is_scikit_learn_s(figures):
    net, pictures = small(), split_data(figures, Recipe()).train
    features, targets = features_of(net, pictures), pictures.targets()
    decay = 1e-3
    fit_last_layer(net, features, targets, decay=decay, adjustment=0.0)
    flat = features.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    scaled = (centred / centred.square().sum(1).mean().sqrt()).numpy()
    labels = targets.argmax(1).repeat_interleave(2).numpy()
    theirs = LogisticRegression(C=1 / (decay * len(labels)), tol=1e-10, max_iter=5000).fit(scaled, labels)
    with torch.no_grad():
        mine = deciding(net.network)(features.flatten(0, 1)).softmax(1)
    assert mine.numpy() == pytest.approx(theirs.predict_proba(scaled), abs=2e-3)


def test_the_network_says_what_was_fitted(figures):
    net, pictures = small(), split_data(figures, Recipe()).train
    features = features_of(net, pictures)
    choice = fit_last_layer(net, features, pictures.targets())
    images = torch.stack([net.preprocess(pictures.photo(index))[0] for index in range(len(pictures))])
    with torch.no_grad():
        assert torch.allclose(net.logits(images), deciding(net.network)(features[:, 0]), atol=1e-4)
    assert choice.accuracy > 0.6
    assert measured(net.logits(images), pictures.targets()) > 0.9


@pytest.mark.parametrize(
    "head",
    [
        {"pool": "lse", "order": "linear-pool"},
        {"pool": "max", "order": "linear-pool"},
        {"pool": "noisy-or", "order": "linear-pool"},
        {"pool": "attention"},
        {"scaled": True},
        {"pool": "topk", "order": "linear-pool", "scaled": True},
        {"pool": "max"},
    ],
    ids=str,
)
def test_any_head_is_fitted_to_what_it_reads(head, figures):
    net, pictures = small(**head), split_data(figures, Recipe()).train
    images = torch.stack([net.preprocess(pictures.photo(index))[0] for index in range(len(pictures))])
    before = float(loss_of(net.logits(images), pictures.targets()))
    fit_last_layer(net, features_of(net, pictures), pictures.targets(), decay=1e-4)
    after = float(loss_of(net.logits(images), pictures.targets()))
    assert after < 0.7 * before


def test_rare_classes_are_made_up_for():
    """Two overlapping clouds, one of them rare: without the prior it is hardly ever said."""
    draw = torch.Generator().manual_seed(0)
    clouds = [torch.randn(count, 2, 12, generator=draw) * 2 + shift for count, shift in [(200, 0.0), (10, 0.5)]]
    features = torch.cat(clouds)
    targets = torch.eye(2)[[0] * 200 + [1] * 10]
    fresh = torch.randn(400, 12, generator=draw) * 2 + 0.5
    said = []
    for adjustment in (0.0, 1.0):
        net = small(classes=2)
        fit_last_layer(net, features, targets, decay=1e-2, adjustment=adjustment)
        with torch.no_grad():
            said.append(float((deciding(net.network)(fresh).argmax(1) == 1).float().mean()))
    assert said[0] < 0.3
    assert said[1] > said[0] + 0.3


def test_classes_that_do_not_exclude_one_another():
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (80, 3), generator=draw).float()
    features = torch.randn(80, 2, 12, generator=draw) * 0.3
    features[:, :, :3] += targets[:, None] * 2
    net = small(activation="sigmoid")
    fit_last_layer(net, features, targets)
    with torch.no_grad():
        logits = deciding(net.network)(features[:, 0])
    assert ((logits > 0) == (targets > 0)).float().mean() > 0.98


def test_folds_spread_each_class():
    from whatwhere.training.light import _folds

    labels = torch.tensor([0] * 11 + [1] * 5 + [2])
    folds = _folds(labels, seed=0)
    for label, count in ((0, 11), (1, 5)):
        sizes = torch.bincount(folds[labels == label], minlength=FOLDS)
        assert int(sizes.max() - sizes.min()) <= 1
        assert int(sizes.sum()) == count
    assert not torch.equal(folds, _folds(labels, seed=1))


def test_features_are_kept_and_taken_only_where_they_fit(figures, tmp_path):
    net, pictures = small(), split_data(figures, Recipe()).train
    calls = []
    net.network.register_forward_hook(lambda *_: calls.append(1))
    kept = tmp_path / "features.safetensors"
    first = features_of(net, pictures, kept)
    done = len(calls)
    assert torch.equal(features_of(net, pictures, kept), first)
    assert len(calls) == done
    with torch.no_grad():  # the deciding layer is not what features depend on
        deciding(net.network).weight.add_(1)
    features_of(net, pictures, kept)
    assert len(calls) == done
    with torch.no_grad():
        net.network.conv1[0].weight.mul_(1.5)
    assert not torch.equal(features_of(net, pictures, kept), first)
    assert len(calls) > done
    kept.write_bytes(kept.read_bytes()[:-100])
    assert features_of(net, pictures, kept).shape == first.shape
