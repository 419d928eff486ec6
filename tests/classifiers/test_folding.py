"""Folding batch normalization: by hand, exact over families, and left alone where it would change what comes out."""

import pytest
import timm
import torch
from scenes import gap_net, plain
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d, create_conv2d
from timm.models.densenet import DenseNet
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models.vgg import make_layers

import whatwhere
from whatwhere.classifiers.folding import fold_batchnorm, folded
from whatwhere.errors import UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.scores import of_class

IMAGE = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def shaken(network):
    """Statistics and weights that are far from those of a new layer, which does nothing."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def check(network, folded, left, image=IMAGE):
    """Folds a network; what comes out is the same, to rounding."""
    found = fold_batchnorm(shaken(network), image)
    assert (len(found.folded), len(found.left)) == (folded, left)
    with torch.no_grad():
        expected, got = network(image), found.network(image)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    return found


def test_by_hand():
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    conv.weight.data.fill_(2)
    conv.bias.data.fill_(1)
    norm.running_mean.fill_(3)
    norm.running_var.fill_(4)
    norm.weight.data.fill_(6)
    norm.bias.data.fill_(5)
    found = fold_batchnorm(nn.Sequential(conv, norm), torch.rand(1, 1, 2, 3))
    # 6 * (2 x + 1 - 3) / 2 + 5 = 6 x - 1
    assert (found.network[0].weight.item(), found.network[0].bias.item()) == (6, -1)
    assert isinstance(found.network[1], nn.Identity)
    assert (found.folded, found.left) == (["1"], [])
    assert found.network[0].weight.requires_grad
    assert (conv.weight.item(), conv.bias.item()) == (2, 1)


NARROW = {"num_classes": 5, "pretrained": False}
FAMILIES = {
    "resnet": (lambda: timm.create_model("resnet10t", channels=[8, 8, 12, 16], **NARROW), 15, 0),
    "resnet, bottlenecks": (
        lambda: timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (1,) * 4, channels=(4,) * 4, num_classes=5),
        17,
        0,
    ),
    # of each layer's two, the second is fed by a convolution, the first by all layers before
    "densenet": (lambda: DenseNet(growth_rate=4, block_config=(2, 2), num_classes=5), 5, 6),
    "resnetv2": (
        lambda: ResNetV2(
            (1, 1), (16, 32), stem_chs=8, num_classes=5, conv_layer=create_conv2d, norm_layer=BatchNormAct2d
        ),
        4,
        3,
    ),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", **NARROW), 34, 0),
    "efficientnet": (lambda: timm.create_model("tinynet_e", **NARROW), 31, 0),
    "regnet": (lambda: timm.create_model("regnetx_002", w0=8, wm=2.0, depth=4, **NARROW), 17, 0),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8,) * 4, **NARROW), 0, 0),
    "vgg": (
        lambda: nn.Sequential(
            make_layers([8, "M", 12, 12, "M"], batch_norm=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        3,
        0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    make, folded, left = FAMILIES[family]
    torch.manual_seed(0)
    check(make(), folded, left)


def test_the_embedded_classifier_and_its_maps(net, photos):
    found = fold_batchnorm(net.network, torch.rand(1, 3, 96, 128))
    assert (len(found.folded), len(found.left)) == (49, 0)
    fast = whatwhere.load(found.network, preprocess=net.preprocess, labels=net.labels)
    images = net.preprocess(whatwhere.open_photo(photos[0]))[0][None]
    one, other = net.at("blocks.5").trace(images), fast.at("blocks.5").trace(images)
    assert (one.logits - other.logits).abs().max() <= 1e-5 * one.logits.abs().max()
    maps = [METHODS["gradcam"](trace, of_class(281)) for trace in (one, other)]
    assert (maps[0] - maps[1]).abs().max() <= 1e-4 * maps[0].abs().max()
    # a layer that was normalized and activated can still be asked for by its name
    assert fast.at("bn2").trace(images).features.min() == 0


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 8, 3, groups=1, dilation=2, bias=False), nn.BatchNorm2d(8)),
        (nn.Conv2d(3, 6, 3, groups=3, stride=2), nn.BatchNorm2d(6, affine=False)),
        (nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)),
        (Conv2dSame(3, 8, 3, stride=2), BatchNormAct2d(8, act_layer=nn.SiLU)),
        (nn.Flatten(), nn.LazyLinear(7), nn.BatchNorm1d(7)),
        (nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        (nn.Conv2d(3, 8, 3).bfloat16(), nn.BatchNorm2d(8).bfloat16()),
    ],
)
def test_kinds_of_layers(layers):
    network = nn.Sequential(*layers)
    kind = next((one.dtype for one in layers[0].parameters()), torch.float32)
    network(IMAGE.to(kind))  # what is lazy learns its size
    found = fold_batchnorm(shaken(network), IMAGE.to(kind))
    assert (found.folded, found.left) == ([str(len(layers) - 1)], [])
    assert {one.dtype for one in found.network.parameters()} == {kind}
    with torch.no_grad():
        expected, got = network(IMAGE.to(kind)).float(), found.network(IMAGE.to(kind)).float()
    assert (got - expected).abs().max() <= (1e-5 if kind == torch.float32 else 0.03) * expected.abs().max()


def test_the_activation_of_a_normalization_stays():
    found = check(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU)), 1, 0)
    assert [type(one) for one in found.network[1]] == [nn.SiLU]


class Graph(nn.Module):
    """Two layers of each kind, wired as told: ``wiring(self, x)``."""

    def __init__(self, wiring):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def read_by(net, x):
    kept = net.first(x)
    return net.norm(kept) * net.norm.weight.sum()


def only_when_large(net, x):
    kept = net.first(x)
    return net.other(net.second(net.norm(kept) + (kept if x.shape[3] > 56 else 0)))


@pytest.mark.parametrize(
    ("wiring", "folded"),
    [
        (lambda net, x: net.other(net.second(net.norm(net.first(x)))), ["norm", "other"]),
        (lambda net, x: net.other(net.first(net.norm(net.first(x)))), []),  # one convolution twice
        (lambda net, x: net.norm(net.second(net.norm(net.first(x)))), []),  # one normalization twice
        (lambda net, x: (kept := net.first(x)) + net.other(net.second(net.norm(kept))), ["other"]),
        (lambda net, x: [net.norm(kept := net.first(x)), kept], []),  # handed out
        (lambda net, x: net.norm(kept := net.first(x)) + net.other(kept), []),
        (lambda net, x: net.other(net.second(net.norm(net.first(x).relu_()))), ["other"]),  # changed in between
        (lambda net, x: net.other(net.second(net.norm(x).relu())), ["other"]),  # normalized before
        (lambda net, x: net.norm(net.first(x)) + nn.functional.conv2d(x, net.first.weight), []),  # weights used again
        (read_by, []),
        (only_when_large, ["other"]),
    ],
)
def test_what_would_change_is_left(wiring, folded):
    network = shaken(Graph(wiring))
    found = fold_batchnorm(network, IMAGE)
    assert found.folded == folded
    assert sorted(found.folded + found.left) == ["norm", "other"]
    for size in ((40, 56), (60, 90)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            pairs = zip(network(image), found.network(image), strict=True)
        assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in pairs)


def test_weights_that_are_shared_are_left():
    network = Graph(lambda net, x: net.other(net.second(net.norm(net.first(x)))))
    network.second.weight = network.first.weight
    assert fold_batchnorm(shaken(network), IMAGE).folded == []


def test_weights_that_are_normalized_themselves_are_left():
    network = nn.Sequential(StdConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    check(network, 1, 1)


def test_the_network_stays_as_it_is():
    network = gap_net().train()
    network[1].momentum = 0.5
    before = {name: one.clone() for name, one in network.state_dict().items()}
    with torch.inference_mode():
        found = fold_batchnorm(network, IMAGE)
    assert found.folded == ["1"]
    assert not any(module.training for module in found.network.modules())
    assert not any(one.is_inference() for one in found.network.parameters())
    assert all(module.training for module in network.modules())
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert not network[1]._forward_hooks


class SinglePrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = gap_net()

    def forward(self, x):
        return self.inner(x.float())


def test_a_network_of_single_precision():
    assert fold_batchnorm(shaken(SinglePrecision()), IMAGE).folded == ["inner.1"]


def test_a_network_that_does_not_run():
    with pytest.raises(UnsupportedError, match=r"Sequential does not run on images \(1, 4, 24, 40\)"):
        fold_batchnorm(gap_net(), torch.rand(1, 4, 24, 40))


def test_a_classifier_takes_the_result():
    net = whatwhere.load(shaken(gap_net()), preprocess=plain((24, 40)))
    image = torch.rand(1, 3, 24, 40)
    fast = whatwhere.load(fold_batchnorm(net.network, image).network, preprocess=plain((24, 40)))
    assert torch.allclose(net.logits(image), fast.logits(image), atol=1e-5)


def test_a_classifier_that_is_folded_sees_the_same():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    how = {"preprocess": whatwhere.Preprocess(size=(20, 30))}
    net = whatwhere.load(shaken(network), layer="2", **how)
    lean, images = folded(net), torch.randn(2, 3, 20, 30)
    assert isinstance(lean.network[1], nn.Identity)
    assert isinstance(net.network[1], nn.BatchNorm2d)
    own, other = net.trace(images), lean.trace(images)
    assert torch.allclose(own.features, other.features, atol=1e-5)
    assert torch.allclose(own.logits, other.logits, atol=1e-5)
    before = whatwhere.load(network, layer="0", **how)  # what is folded is behind the split
    assert folded(before) is before
    plain = whatwhere.load(nn.Sequential(*network[:1], *network[2:]), layer="1", **how)
    assert folded(plain) is plain
