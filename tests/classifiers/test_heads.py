"""Pools, heads, conversions and networks of ours: by hand, by law, and there and back."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import whatwhere
from whatwhere.classifiers.acol import ERASED
from whatwhere.classifiers.around import around
from whatwhere.classifiers.backbones import dilate, stages_of
from whatwhere.classifiers.convert import dense, pooled, to_convolution, to_linear
from whatwhere.classifiers.ensemble import ensemble
from whatwhere.classifiers.heads import POOLS, Attention, Head
from whatwhere.classifiers.zoo import build
from whatwhere.errors import InputError, UnsupportedError

SIZE = (64, 96)
SMALL = {"channels": [8, 8, 8, 16]}


def made(name, classes=3, size=SIZE, seed=0, **options):
    """A network by name with random weights that say something, and the classifier around it."""
    torch.manual_seed(seed)
    network, preprocess = build(name, pretrained=False, num_classes=classes, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.3, 0.9)
    preprocess = replace(
        preprocess, size=size, interpolation="bicubic", crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    net = around(network, name=name, labels=[f"class {i}" for i in range(classes)], preprocess=preprocess)
    net.options = options
    return net


IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_pools_by_hand():
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 3.0, 4.0]]]])
    assert POOLS["mean"](maps).item() == 2
    assert POOLS["max"](maps).item() == 4
    assert POOLS["topk"](maps).item() == 4  # a fifth of five cells
    by_hand = math.log(sum(math.exp(4 * x) for x in range(5)) / 5) / 4
    assert POOLS["lse"](maps).item() == pytest.approx(by_hand, abs=1e-6)
    none = math.prod(1 - 1 / (1 + math.exp(-x)) for x in range(5))
    assert POOLS["noisy-or"](maps).item() == pytest.approx(math.log((1 - none) / none), abs=1e-5)


def test_noisy_or_of_hopeless_cells_is_a_number():
    maps = torch.full((1, 1, 2, 3), -200.0, requires_grad=True)
    pooled_maps = POOLS["noisy-or"](maps)
    (gradient,) = torch.autograd.grad(pooled_maps.sum(), maps)
    assert pooled_maps.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("pool", ["mean", "max", "lse", "topk"])
def test_a_pool_of_a_constant_is_that_constant(pool):
    assert POOLS[pool](torch.full((2, 3, 4, 7), -1.5)).numpy() == pytest.approx(np.full((2, 3), -1.5), abs=1e-6)


def test_log_sum_exp_lies_between_mean_and_max():
    maps = torch.randn(4, 3, 5, 7)
    middle = POOLS["lse"](maps)
    assert (POOLS["mean"](maps) <= middle).all()
    assert (middle <= POOLS["max"](maps)).all()


def test_attention_weights_by_hand():
    attention = Attention(2, width=1)
    with torch.no_grad():
        attention.value.weight.copy_(torch.tensor([1.0, 0.0])[None, :, None, None])
        attention.gate.weight.copy_(torch.tensor([0.0, 1.0])[None, :, None, None])
        for bias in (attention.value.bias, attention.gate.bias):
            bias.zero_()
        attention.weight.weight.fill_(2.0)
    features = torch.tensor([[[[1.0, -1.0]], [[0.5, 2.0]]]])
    scores = [2 * math.tanh(a) / (1 + math.exp(-b)) for a, b in [(1, 0.5), (-1, 2)]]
    by_hand = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    assert attention(features).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_mean_is_the_same_in_both_orders():
    torch.manual_seed(0)
    head, features = Head(6, 4), torch.randn(2, 6, 3, 5)
    before = head(features)
    head.order = "linear-pool"
    assert torch.allclose(before, head(features), atol=1e-6)


def test_the_largest_before_and_behind_differ():
    torch.manual_seed(0)
    head, features = Head(6, 4, pool="max"), torch.randn(2, 6, 3, 5)
    before = head(features)
    assert torch.allclose(
        before, features.amax((2, 3)) @ head.linear.weight[:, :, 0, 0].T + head.linear.bias, atol=1e-6
    )
    head.order = "linear-pool"
    assert torch.allclose(head(features), head.maps(features).amax((2, 3)), atol=1e-6)
    assert not torch.allclose(before, head(features), atol=1e-2)


def test_scale_and_offset_of_a_class_map():
    torch.manual_seed(0)
    head, features = Head(6, 4, scaled=True), torch.randn(2, 6, 3, 5)
    maps = head.maps(features) - head.linear.bias[:, None, None]
    head.linear.parametrizations.weight[0].factor.data = torch.tensor([2.0, 1.0, 0.5, -1.0])
    scaled = head.maps(features) - head.linear.bias[:, None, None]
    assert torch.allclose(scaled, maps * torch.tensor([2.0, 1.0, 0.5, -1.0])[:, None, None], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"pool": "median"}, {"order": "sideways"}, {"pool": "noisy-or", "order": "pool-linear"}]
)
def test_heads_that_are_none(options):
    with pytest.raises(InputError, match=r"pool|noisy-or"):
        Head(4, 3, **options)


def test_convolutions_and_linear_layers_there_and_back():
    torch.manual_seed(0)
    linear, cells = nn.Linear(5, 3), torch.randn(2, 5, 4, 6)
    conv = to_convolution(linear)
    assert torch.allclose(conv(cells), linear(cells.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-6)
    assert torch.equal(to_linear(conv).weight, linear.weight)
    assert torch.equal(to_linear(to_convolution(nn.Linear(5, 3, bias=False))).weight, to_linear(conv).weight) is False
    with pytest.raises(InputError, match="1 x 1"):
        to_linear(nn.Conv2d(5, 3, 3))


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "timm/tf_efficientnet_lite0"])
def test_a_classifier_is_a_dense_predictor_and_back(name):
    net = made(name)
    cells = dense(net)
    logits = net.logits(IMAGES)
    size = float(logits.abs().max())
    assert (cells.logits(IMAGES) - logits).abs().max() <= 1e-6 * max(1, size)
    assert (pooled(cells).logits(IMAGES) - logits).abs().max() <= 1e-6 * max(1, size)
    with torch.no_grad():
        assert torch.allclose(cells.network.maps(IMAGES).mean((2, 3)), logits, atol=1e-5 * max(1, size))
        other = cells.network.maps(torch.randn(1, 3, 128, 160))
    assert other.shape[1] == 3
    assert other[0, 0].numel() > cells.network.maps(IMAGES)[0, 0].numel()


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/mobilenet_v2", "timm/tf_efficientnet_lite0"])
@pytest.mark.parametrize("stride", [16, 8])
def test_a_finer_grid_has_the_old_one_in_it(name, stride):
    net = made(name)
    with torch.no_grad():
        coarse = dense(net).network.maps(IMAGES)
        fine = dense(net, stride).network.maps(IMAGES)
    step = 32 // stride
    assert fine.shape[2:] == (SIZE[0] // stride, SIZE[1] // stride)
    assert torch.allclose(fine[:, :, ::step, ::step], coarse, atol=3e-5 * max(1, float(coarse.abs().max())))


def test_a_stride_that_is_none():
    with pytest.raises(InputError, match="32, 16, 8"):
        dilate(dense(made("timm/resnet10t", **SMALL)).network.backbone, IMAGES[:1], 12)


def test_dense_needs_the_linear_law():
    with pytest.raises(UnsupportedError, match="linear"):
        dense(made("lenet5"))
    with pytest.raises(InputError, match="averaged"):
        pooled(made("timm/resnet10t", **SMALL))


HEADS = [
    {},
    {"pool": "lse", "order": "linear-pool", "units": 16},
    {"pool": "attention", "dropout": 0.1},
    {"pool": "noisy-or", "order": "linear-pool"},
    {"scaled": True},
    {"branches": 2, "units": 8},
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.get("pool", "own") if head else "default")
@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/shufflenet_v2_x0_5"])
def test_any_head_is_saved_and_loaded(name, head, tmp_path):
    net = made(name, head=head, **(SMALL if name.startswith("timm") else {}))
    with torch.no_grad():
        for parameter in net.network.head.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    whatwhere.save(net, tmp_path)
    again = whatwhere.load(tmp_path)
    assert torch.equal(again.logits(IMAGES), net.logits(IMAGES))
    assert again.options == net.options
    (explained,) = whatwhere.explain(again, np.full((50, 70, 3), 120, np.uint8))
    assert explained.map.shape == (2, 3)


NETWORKS = [
    ("lenet5", {"norm": "batch", "antialias": True}),
    ("lenet5", {"norm": "group"}),
    ("lenet5", {"norm": "layer"}),
    ("timm/resnet10t", {"norm": "group", "antialias": True, "output_stride": 8, **SMALL}),
    ("timm/resnet10t", {"norm": "none", **SMALL}),
    ("timm/resnet10t", {"norm": "layer", **SMALL}),
    ("googlenet-gmp", {}),
    ("timm/vit_tiny_patch16_224", {"img_size": [64, 96], "head": {"pool": "topk", "order": "linear-pool"}}),
    ("torchvision/squeezenet1_1", {}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=lambda value: str(value)[:30])
def test_networks_with_options_are_saved_and_loaded(name, options, tmp_path):
    net = made(name, **options)
    whatwhere.save(net, tmp_path)
    again = whatwhere.load(tmp_path)
    assert torch.equal(again.logits(IMAGES), net.logits(IMAGES))
    assert net.trace(IMAGES).features.shape[2:].numel() > 1


def test_normalization_is_what_was_asked_for():
    for norm, kind in [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("layer", nn.GroupNorm)]:
        kinds = [type(module) for module in made("lenet5", norm=norm).network.modules()]
        assert any(issubclass(one, kind) for one in kinds)
    plain = made("lenet5").network
    assert not any(isinstance(module, nn.BatchNorm2d | nn.GroupNorm) for module in plain.modules())
    with pytest.raises(InputError, match="normalization"):
        made("lenet5", norm="spectral")
    with pytest.raises(InputError, match="does not take"):
        made("timm/vgg11", antialias_everything=True)


def test_lenet_is_the_paper_s_size():
    network, _ = build("lenet5", pretrained=False, num_classes=10, channels=1)
    assert network.forward_features(torch.zeros(1, 1, 32, 32)).shape == (1, 120, 1, 1)
    # 60 000 in the paper, whose S2, S4 have weights and whose C3 is not connected to all of S2
    assert sum(p.numel() for p in network.parameters()) == 61_706


def test_antialiasing_moves_less_with_a_shift():
    gaps = []
    for antialias in (False, True):
        net = made("lenet5", antialias=antialias, size=(96, 128))
        wide = torch.randn(8, 3, 96, 129, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            grids = [net.network.forward_features(wide[..., i : i + 128]) for i in (0, 1)]
        gaps.append(float((grids[0] - grids[1]).norm() / grids[0].norm()))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize(("base", "grid"), [("alexnet", 13), ("vgg16", 14), ("googlenet", 14)])
def test_cam_networks_have_the_paper_s_grids(base, grid):
    options = {} if base == "alexnet" else {"init_weights": False}  # their own way takes seconds
    networks = [build(f"{base}-{pool}", pretrained=False, num_classes=4, **options)[0] for pool in ("gap", "gmp")]
    with torch.no_grad():
        features = networks[0].forward_features(torch.randn(1, 3, 224, 224))
        assert features.shape == (1, 1024, grid, grid)
        for network, by_hand in zip(networks, (features.mean((2, 3)), features.amax((2, 3))), strict=True):
            linear = network.head.linear
            assert torch.allclose(
                network.forward_head(features), by_hand @ linear.weight[:, :, 0, 0].T + linear.bias, atol=1e-5
            )
            small = torch.randn(1, 3, 64, 96)
            assert torch.equal(network(small), network.forward_head(network.forward_features(small)))


def test_a_cam_network_without_classes_has_nothing_to_load():
    with pytest.raises(InputError, match="train it"):
        whatwhere.load("alexnet-gap")


def test_branches_erase_what_the_first_one_finds():
    net = made("timm/resnet10t", head={"branches": 2, "units": 8}, **SMALL)
    network, labels = net.network.eval(), torch.tensor([2, 0])
    with torch.no_grad():
        features = network.backbone(IMAGES)
        first, second = network.branches(IMAGES, labels)
        maps = network.branch_maps(first, 0)
        for image, label in enumerate(labels):
            own = maps[image, label]
            erased = own > own.min() + ERASED * (own.max() - own.min())
            assert 0 < erased.sum() < erased.numel()
            by_hand = network.neck[1]((features[image] * ~erased)[None])[0]
            assert torch.allclose(second[image], by_hand, atol=1e-5)
        both = [network.branch_maps(branch, which) for which, branch in enumerate(network.branches(IMAGES))]
        mean = torch.stack([one.mean((2, 3)) for one in both]).mean(0)
    assert torch.allclose(net.logits(IMAGES), mean, atol=1e-5)
    assert net.linear_law(IMAGES) < 1e-5


def test_an_ensemble_is_the_mean_of_logits_and_maps(tmp_path):
    nets = [
        made("timm/resnet10t", seed=1, channels=[8, 8, 16, 24]),
        made("torchvision/shufflenet_v2_x0_5", seed=2),
        made("timm/resnet10t", seed=3, **SMALL),
    ]
    one = ensemble(nets)
    assert torch.allclose(one.logits(IMAGES), torch.stack([net.logits(IMAGES) for net in nets]).mean(0), atol=1e-5)
    maps = torch.stack([net.class_maps(net.trace(IMAGES)) for net in nets]).mean(0)
    assert torch.allclose(one.class_maps(one.trace(IMAGES)), maps, atol=1e-4 * float(maps.abs().max()))
    whatwhere.save(one, tmp_path)
    assert torch.equal(whatwhere.load(tmp_path).logits(IMAGES), one.logits(IMAGES))


def test_ensembles_that_do_not_go_together():
    nets = [made("timm/resnet10t", **SMALL), made("timm/resnet10t", classes=4, **SMALL)]
    with pytest.raises(InputError, match="labels"):
        ensemble(nets)
    with pytest.raises(InputError, match="at least two classifiers, got 1"):
        ensemble(nets[:1])
    with pytest.raises(InputError, match="other input"):
        ensemble([nets[0], made("timm/resnet10t", size=(96, 96), **SMALL)])
    with pytest.raises(UnsupportedError, match="grids"):
        ensemble([nets[0], made("timm/resnet10t", output_stride=16, **SMALL)])


def test_stages_are_the_last_layers_of_each_grid():
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=3, head={}, **SMALL)
    assert stages_of(network.backbone, IMAGES[:1])[-3:] == ["network.layer2", "network.layer3", "network.layer4"]
