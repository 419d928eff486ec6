"""What makes a network look at more than the most telling part: by hand, and only while it is trained."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from whatwhere.classifiers.around import around
from whatwhere.classifiers.zoo import build
from whatwhere.errors import InputError
from whatwhere.images import Preprocess
from whatwhere.maps.shape import unit
from whatwhere.training.aids import AIDS
from whatwhere.training.aids.adl import AttentionBasedDropout
from whatwhere.training.aids.cutmix import CutMix
from whatwhere.training.aids.has import HideAndSeek
from whatwhere.training.aids.spg import taught_by
from whatwhere.training.loop import Fitting, head_parameters, parts_of, rates
from whatwhere.training.objective import loss_of
from whatwhere.training.recipe import Recipe
from whatwhere.training.schedule import factor_at

SIZE = (48, 64)
TARGETS = torch.eye(3)[[0, 2]]
IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def headed_net(**head):
    torch.manual_seed(0)
    network, _ = build(
        "timm/resnet10t", pretrained=False, num_classes=3, head=head, channels=[8, 8, 8, 12], output_stride=16
    )
    return around(network, name="mine", labels=["a", "b", "c"], preprocess=Preprocess(size=SIZE))


def fitting(aid="", net=None, **given):
    net = net or headed_net(**(AIDS[aid].head if aid else {}))
    recipe = replace(Recipe(mode="full", aids=(aid,) if aid else ()), **given)
    return Fitting(net, recipe, torch.zeros(3))


def test_hidden_patches():
    torch.manual_seed(0)
    hidden, targets = HideAndSeek(share=0.5, grids=(4,)).mixed(torch.ones(50, 3, 48, 64), torch.eye(50))
    assert torch.equal(targets, torch.eye(50))
    patches = hidden.unfold(2, 12, 12).unfold(3, 16, 16)  # b 3 4 4 12 16
    assert ((patches == 0).flatten(4).all(4) | (patches == 1).flatten(4).all(4)).all()
    assert (patches == patches[:, :1]).all()
    assert float(hidden.mean()) == pytest.approx(0.5, abs=0.05)
    same, _ = HideAndSeek(grids=(0,)).mixed(IMAGES, TARGETS)
    assert torch.equal(same, IMAGES)


def test_grids_that_do_not_divide_the_image_cover_it():
    torch.manual_seed(0)
    hidden, _ = HideAndSeek(share=1.0, grids=(5,)).mixed(torch.ones(1, 3, 47, 61), TARGETS[:1])
    assert not hidden.any()


def test_pasted_rectangles_share_the_labels():
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, *SIZE), torch.ones(3, *SIZE)])
    for _ in range(10):
        mixed, targets = CutMix(share=1.0).mixed(images, TARGETS)
        shares = mixed.mean((1, 2, 3))  # how much of each image is of the second one
        assert targets.sum(1).tolist() == pytest.approx([1, 1])
        assert targets[:, 2].tolist() == pytest.approx(shares.tolist(), abs=1e-5)
    same, targets = CutMix(share=0.0).mixed(images, TARGETS)
    assert same is images
    assert targets is TARGETS


def test_attention_is_dropped_or_weighed():
    features = torch.tensor([[[[1.0, 9.0, 10.0]], [[1.0, 10.0, 10.0]]]])
    dropping, weighing = AttentionBasedDropout(drop_rate=1.0), AttentionBasedDropout(drop_rate=0.0)
    assert dropping.dropped(features).tolist() == [[[[1, 0, 0]], [[1, 0, 0]]]]
    by_hand = [1 / (1 + math.exp(-mean)) for mean in (1, 9.5, 10)]
    assert weighing.dropped(features)[0, 0, 0].tolist() == pytest.approx(
        [value * share for value, share in zip([1, 9, 10], by_hand, strict=True)]
    )


def test_dropout_of_attention_is_for_training_alone():
    net = headed_net()
    before = net.logits(IMAGES)
    module = fitting("adl", net)
    assert torch.equal(net.logits(IMAGES), before)
    module.train()
    torch.manual_seed(0)
    one = module.network(IMAGES)
    assert not torch.allclose(one, module.network(IMAGES))


def test_branches_learn_the_second_without_the_first():
    module = fitting("acol").eval()
    loss = module.loss(IMAGES, TARGETS)
    network = module.network
    first, second = network.branches(IMAGES, TARGETS.argmax(1))
    by_hand = sum(
        loss_of(network.branch_maps(branch, which).mean((2, 3)), TARGETS, smoothing=0.1)
        for which, branch in enumerate((first, second))
    )
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    with pytest.raises(InputError, match="two branches"):
        AIDS["acol"]().loss(headed_net().network, IMAGES, TARGETS, loss_of)


def test_only_sure_cells_teach():
    logits = torch.zeros(1, 1, 1, 3)
    teacher = torch.tensor([[[[0.0, 0.4, 1.0]]]])
    assert float(taught_by(logits, teacher, 0.1, 0.7)) == pytest.approx(math.log(2))
    logits = torch.tensor([[[[-50.0, 7.0, 50.0]]]])
    assert float(taught_by(logits, teacher, 0.1, 0.7)) == pytest.approx(0, abs=1e-6)
    assert float(taught_by(logits, torch.full((1, 1, 1, 3), 0.4), 0.1, 0.7)) == 0
    assert unit(torch.tensor([[[[2.0, 4.0, 3.0]]]])).flatten().tolist() == [0, 1, 0.5]
    assert unit(torch.full((1, 1, 2, 3), 5.0)).tolist() == torch.zeros(1, 1, 2, 3).tolist()


def test_guidance_teaches_layers_of_its_own():
    module = fitting("spg")
    (aid,) = module.aids
    before = loss_of(module.network.eval()(IMAGES), TARGETS, smoothing=0.1).item()
    assert module.loss(IMAGES, TARGETS).item() > before
    module.loss(IMAGES, TARGETS).backward()
    assert all(parameter.grad is not None for parameter in aid.pixels.parameters())
    names = dict(module.network.named_parameters())
    assert not any("pixels" in name for name in names)


def test_dense_loss_is_of_every_cell():
    module = fitting(loss="dense", smoothing=0.0)
    module.eval()
    maps = module.network.maps(IMAGES)
    by_hand = torch.stack(
        [loss_of(maps[:, :, y, x], TARGETS) for y in range(maps.shape[2]) for x in range(maps.shape[3])]
    )
    assert module.loss(IMAGES, TARGETS).item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_aids_and_dense_loss_need_a_head_of_ours():
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=3, channels=[8, 8, 8, 12])
    own = around(network, name="mine", preprocess=Preprocess(size=SIZE))
    with pytest.raises(InputError, match="head of ours"):
        Fitting(own, Recipe(loss="dense"), torch.zeros(3))


def test_rates_fall_towards_the_input_and_vectors_do_not_decay():
    network = headed_net().network
    groups = rates(network, Recipe(lr=1.0, backbone_lr=0.5, layer_decay=0.8))
    found = {id(p): (group["lr"], group.get("weight_decay")) for group in groups for p in group["params"]}
    assert len(found) == len(list(network.parameters()))
    assert found[id(network.head.linear.weight)] == (1.0, None)
    assert found[id(network.head.linear.bias)] == (1.0, 0.0)
    parts = parts_of(network)
    assert [found[id(part[0])][0] for part in parts] == pytest.approx(
        [0.5 * 0.8**depth for depth in range(11, -1, -1)]
    )
    assert found[id(network.backbone.network.bn1.weight)][1] == 0.0
    inside = {id(p) for part in parts for p in part} | {id(p) for p in head_parameters(network)}
    assert inside == set(found)


def test_the_rate_rises_and_falls():
    factors = [factor_at(step, 4, 24) for step in range(25)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.5)
    assert factors[24] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_frozen_layers_and_normalization(monkeypatch):
    module = fitting(epochs=4, head_epochs=1, frozen=0.5, frozen_norm=0.5)
    wanted = [(12, False), (6, False), (6, True), (6, True)]  # parts that stay, and whether statistics move
    parts = parts_of(module.network)
    for epoch, (stay, moving) in enumerate(wanted):
        monkeypatch.setattr(Fitting, "current_epoch", property(lambda self, epoch=epoch: epoch))
        module.on_train_epoch_start()
        assert [part[0].requires_grad for part in parts] == [False] * stay + [True] * (12 - stay)
        norms = [one for one in module.network.modules() if isinstance(one, nn.BatchNorm2d)]
        assert all(one.training is moving for one in norms)
