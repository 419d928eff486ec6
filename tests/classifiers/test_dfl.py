"""The filter bank beside a network: its streams by hand, what its cells see, where its classes are."""

import pytest
import torch
from scenes import plain
from torch import nn
from torch.nn import functional

import whatwhere
from whatwhere.classifiers.around import around
from whatwhere.classifiers.backbones import headed
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.zoo import build
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.inspection.receptive import effective_field, receptive_field
from whatwhere.scores import of_class

SIZE = (64, 96)


def banked(classes: int = 3, **head: object) -> DflNet:
    """A small ResNet with a bank of two filters a class."""
    torch.manual_seed(0)
    options = {"channels": [8, 8, 12, 16], "output_stride": 16, "head": {"filters": 2, **head}}
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=classes, **options)
    assert isinstance(network, DflNet)
    return network.eval()


def test_streams_by_hand():
    network, images = banked(weights=[0.7, 0.5, 0.2]), torch.rand(2, 3, *SIZE)
    seen = []
    handle = network.get_submodule(network.read).register_forward_hook(lambda module, given, out: seen.append(out))
    general = network.general(images)
    handle.remove()
    responses = functional.conv2d(seen[0], network.bank.weight, network.bank.bias)
    strongest = responses.amax((2, 3))
    side = torch.stack([(strongest[:, 2 * j] + strongest[:, 2 * j + 1]) / 2 for j in range(3)], 1)
    wanted = 0.7 * general + 0.5 * network.patches(strongest) + 0.2 * side
    torch.testing.assert_close(network(images), wanted)
    torch.testing.assert_close(network.maps(images)[:, 1], (responses[:, 2] + responses[:, 3]) / 2)
    # the side branch is the mean of the largest, not the largest of the mean
    assert not torch.allclose(side, network.maps(images).amax((2, 3)))


def test_streams_without_a_weight_have_no_say():
    images = torch.rand(2, 3, *SIZE)
    alone = banked(weights=[0, 1, 0])
    weights = [weight for weight, _ in alone.streams(images)]
    assert weights == [1]
    alone.general.head.linear.weight.data.zero_()
    before = alone(images)
    alone.general.head.linear.bias.data.fill_(100)
    torch.testing.assert_close(alone(images), before)


def test_any_size_goes_through():
    network = banked()
    for size in ((64, 96), (96, 64), (33, 129)):
        logits = network(torch.rand(1, 3, *size))
        assert logits.shape == (1, 3)
        assert logits.isfinite().all()


def test_two_scales_by_hand():
    network, images = banked(scales=[1, 0.75]), torch.rand(2, 3, *SIZE)
    smaller = functional.interpolate(images, (48, 72), mode="bilinear", antialias=True)
    alone = banked()
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), network.parameters(), strict=True))
    torch.testing.assert_close(network(images), (alone(images) + alone(smaller)) / 2)
    # it is split at the first scale, and what the second says stays what it is
    net = around(network, preprocess=plain(SIZE))
    trace = net.trace(images)
    torch.testing.assert_close(trace.logits, network(images))
    torch.testing.assert_close(trace.features, alone.backbone(images))
    single = around(alone, preprocess=plain(SIZE)).trace(images)
    torch.testing.assert_close(trace.gradient(of_class(1)), single.gradient(of_class(1)) / 2)
    doubled = torch.stack([trace.features[1], 2 * trace.features[1]]).detach()
    said = trace.tail(doubled, 1)
    torch.testing.assert_close(said[0], trace.logits[1].detach())
    torch.testing.assert_close(said[1] - said[0], (single.tail(doubled, 1)[1] - single.logits[1].detach()) / 2)
    # no gradient runs back through the other scale either, but in training
    stem = next(network.backbone.parameters())
    assert torch.autograd.grad(trace.logits.sum(), stem, retain_graph=True, allow_unused=True) == (None,)
    network.train()
    sum(logits.sum() for _, logits in network.streams(images)[3:]).backward()
    assert stem.grad.abs().sum() > 0


def test_it_is_a_classifier_split_at_its_last_grid():
    network = banked()
    net = around(network, preprocess=plain(SIZE))
    images = torch.rand(2, 3, *SIZE)
    trace = net.trace(images)
    torch.testing.assert_close(trace.logits, network(images))
    torch.testing.assert_close(trace.features, network.backbone(images))
    # what the patches say is beside it
    torch.testing.assert_close(trace.tail(trace.features[:1].detach(), 0), trace.logits[:1].detach())
    general = network.general.forward_head(trace.features)
    torch.testing.assert_close(
        trace.tail(0 * trace.features[:1].detach(), 0) - trace.logits[:1].detach(),
        network.general.forward_head(0 * trace.features[:1]).detach() - general[:1].detach(),
    )
    assert not any(len(module._forward_hooks) for module in network.modules())
    # and where filters read it can be split too, with all that hangs on it behind
    deeper = net.at(network.read)
    doubled = 2 * deeper.trace(images).features[:1].detach()
    strongest = network.bank(doubled).amax((2, 3))
    p = network.patches(strongest) + 0.1 * network.side(strongest)
    said, rest = (
        deeper.trace(images).tail(doubled, 0),
        around(network.general, preprocess=plain(SIZE)).at(network.tap),
    )
    torch.testing.assert_close(said, (rest.trace(images).tail(doubled, 0) + p).detach())


def test_the_map_of_the_filters_by_hand():
    network = banked()
    net = around(network, preprocess=plain(SIZE))
    images = torch.rand(2, 3, *SIZE)
    trace = net.trace(images)
    features = net.at(network.read).trace(images).features.detach()
    weight = network.bank.weight.detach().flatten(1)
    maps = torch.stack(
        [torch.einsum("c,bcyx->byx", (weight[2 * j] + weight[2 * j + 1]) / 2, features) for j in range(3)]
    )
    for label in range(3):
        found = whatwhere.METHODS["dfl"](trace, of_class(label))
        torch.testing.assert_close(found, maps[label], atol=1e-5, rtol=1e-4)
    one = whatwhere.METHODS["dfl"](trace, lambda logits: logits[:, 1] - logits[:, 2])
    torch.testing.assert_close(one, maps[1] - maps[2], atol=1e-5, rtol=1e-4)


def test_the_map_is_of_a_bank_alone():
    with pytest.raises(UnsupportedError, match=r"no filter bank.*filters = 10"):
        whatwhere.METHODS["dfl"](whatwhere.load().trace(torch.rand(1, 3, *SIZE)), of_class(0))


def test_it_is_exported():
    pytest.importorskip("onnxruntime")
    net = around(banked(), preprocess=plain(SIZE))
    images = torch.rand(3, 3, *SIZE)
    compiled = net.compiled()
    torch.testing.assert_close(compiled.logits(images), net.logits(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        compiled.trace(images).features, net.trace(images).features.detach(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    network, preprocess = build(
        "efficientnet-lite0", pretrained=True, num_classes=3, head={"filters": 2}, in_chans=channels
    )
    assert len(preprocess.mean) == len(preprocess.std) == channels
    assert network(torch.rand(1, channels, 64, 96)).shape == (1, 3)


def test_one_channel_is_three_equal_ones():
    one, grey = build("efficientnet-lite0", pretrained=True, in_chans=1)
    three, _ = build("efficientnet-lite0", pretrained=True)
    images = torch.rand(1, 1, 64, 96)
    assert grey.mean == pytest.approx((0.5,), abs=0.1)
    torch.testing.assert_close(one(images), three(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_it_is_saved_and_loaded(tmp_path):
    network, head = banked(), {"filters": 2}
    net = around(network, name="timm/resnet10t", preprocess=plain(SIZE), labels=["a", "b", "c"])
    net.options = {"channels": [8, 8, 12, 16], "output_stride": 16, "head": head}
    whatwhere.save(net, tmp_path / "run")
    again = whatwhere.load(tmp_path / "run")
    images = torch.rand(2, 3, *SIZE)
    assert torch.equal(again.logits(images), net.logits(images))
    assert torch.equal(again.trace(images).features, net.trace(images).features)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"filters": 0}, "at least one filter"),
        ({"weights": [1, 1]}, "three weights"),
        ({"weights": [0, 0, 1]}, "above 0"),
        ({"weights": [1, -1, 1]}, "three weights"),
        ({"tap": "layer7"}, "no layer 'layer7'; nearest: layer"),
        ({"tap": "global_pool"}, "choose a layer before the last"),
        ({"branches": 2}, "one branch"),
        ({"scales": [0.5, 1]}, "the first is 1"),
    ],
)
def test_wrong_settings_are_said(head, said):
    with pytest.raises(InputError, match=said):
        banked(**head)


def big(name: str, classes: int = 200) -> DflNet:
    """A published network with the bank of the paper."""
    options = {"init_weights": False} if name == "vgg16" else {}  # its own way takes seconds
    network, _ = build(f"torchvision/{name}", pretrained=False, num_classes=classes, head={"filters": 10}, **options)
    assert isinstance(network, DflNet)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "tap", "channels", "grid", "size", "stride", "own"),
    [
        # conv1_1 to conv5_3, without the three fully connected layers
        ("vgg16", "features.22", 512, (14, 20), 92, 8, 14_714_688),
        # 7 + 2 * 2 = 11 behind the stem; each 3 x 3 adds twice the step before it: 3 * 8, 8 + 3 * 16, 16 + 5 * 32
        ("resnet50", "layer3", 1024, (7, 10), 267, 16, 23_508_032),
    ],
)
def test_published_shapes_and_counts(name, tap, channels, grid, size, stride, own):
    network = big(name)
    assert network.read.startswith(f"general.backbone.network.{tap}")
    assert network.bank.weight.shape == (2000, channels, 1, 1)
    assert sum(p.numel() for p in network.backbone.parameters()) == own
    assert sum(p.numel() for p in network.bank.parameters()) == 2000 * channels + 2000
    assert sum(p.numel() for p in network.patches.parameters()) == 200 * 2000 + 200
    with torch.no_grad():
        assert network.responses(torch.rand(1, 3, 112, 160)).shape == (1, 2000, *grid)
    field = receptive_field(network, network.read)
    assert (field.size, field.stride) == ((size, size), (stride, stride))


def test_where_a_stage_is_narrow_filters_read_the_next_wide_block():
    network, _ = build("efficientnet-lite0", pretrained=False, num_classes=3, head={"filters": 2})
    # blocks.4, the last of stride 16, has 112 channels, blocks.5 192
    assert network.read == "general.backbone.network.blocks.6"
    assert network.bank.in_channels == 320
    slim, _ = build("efficientnet-lite0", pretrained=False, num_classes=3, head={"filters": 2, "tap": "blocks.4"})
    assert slim.bank.in_channels == 112


def formula(layers: list[tuple[int, int, int]]) -> tuple[float, int, float]:
    """Size, stride and start behind kernels, strides and paddings, one after another (Araujo et al. 2019)."""
    size, jump, start = 1, 1, 0.0
    for kernel, stride, padding in layers:
        size, start, jump = size + (kernel - 1) * jump, start - padding * jump, jump * stride
    return size, jump, start


@pytest.mark.parametrize("seed", range(4))
def test_receptive_fields_are_those_of_the_formula(seed):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = [], []
    layers: list[nn.Module] = []
    for number in range(4):
        ky, kx, sy, sx = (int(torch.randint(1, high, (), generator=draw)) for high in (6, 6, 3, 3))
        py, px = (int(torch.randint(0, k, (), generator=draw)) for k in (ky, kx))
        layers.append(nn.Conv2d(3 if number == 0 else 4, 4, (ky, kx), (sy, sx), (py, px)))
        rows.append((ky, sy, py))
        columns.append((kx, sx, px))
    network = nn.Sequential(*layers)
    field = receptive_field(network, "3")
    for axis, one in enumerate((rows, columns)):
        assert (field.size[axis], field.stride[axis], field.start[axis]) == formula(one)


def test_windows_by_hand():
    field = receptive_field(nn.Sequential(nn.Conv2d(3, 4, (3, 5), (2, 3), (1, 0)), nn.Conv2d(4, 4, 3, 1, 1)), "1")
    assert field.size == (7, 11)
    assert field.window(2, 1).to_list() == [0, 1, 11, 8]
    assert field.centre(2, 1) == (5.5, 4.5)


def test_a_gate_of_whole_channels_is_left_out_and_attention_sees_everything():
    gated, _ = build("timm/efficientnet_b0", pretrained=False)
    plainer, _ = build("timm/efficientnet_lite0", pretrained=False)
    assert receptive_field(gated, "blocks.1") == receptive_field(plainer, "blocks.1")
    swin, _ = build("timm/vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True)
    assert receptive_field(swin, "blocks.0").size == (float("inf"), float("inf"))


def test_what_is_seen_in_practice_by_hand():
    conv = nn.Conv2d(1, 1, (5, 9), (2, 3), bias=False)
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 1:4, 4] = torch.tensor([1.0, 2.0, 1.0])
    field = effective_field(conv_alone := nn.Sequential(conv), "0", torch.rand(2, 1, 40, 60), share=0.9)
    # squares 1 4 1 along y: two thirds in the middle row, all in three; along x one column holds it all
    assert field.size == (3, 1)
    theory = receptive_field(conv_alone, "0", 1)
    assert field.stride == theory.stride
    assert field.centre(3, 4) == theory.centre(3, 4)
    assert effective_field(conv_alone, "0", torch.rand(2, 1, 40, 60), share=0.6).size == (1, 1)


def test_a_bank_on_what_has_no_stages_asks_for_the_layer():
    flat = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(UnsupportedError, match="say with tap"):
        headed(flat, torch.rand(1, 3, *SIZE), 4, filters=2)
    again = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert headed(again, torch.rand(1, 3, *SIZE), 4, filters=2, tap="0").read == "general.backbone.network.0"


def test_filters_read_what_is_there_before_a_layer_works_in_place():
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    conv = chain[0]
    network = headed(chain, torch.rand(1, 3, *SIZE), 4, filters=2, tap="0").eval()
    images = torch.rand(2, 3, *SIZE)
    features = conv(images)
    assert (features < 0).any()
    torch.testing.assert_close(network.responses(images), network.bank(features))
    trace = around(network, preprocess=plain(SIZE)).at(network.read).trace(images)
    torch.testing.assert_close(trace.features, features)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 3, 4, 1), nn.Upsample(scale_factor=2)),
        (nn.Conv2d(3, 4, 3, 4, 1), nn.ConvTranspose2d(4, 4, 4, 2, 1)),
        (nn.Conv2d(3, 4, 3, 2, 1, padding_mode="circular"), nn.Conv2d(4, 4, 3, 1, 1)),
    ],
    ids=["upsampled", "transposed", "circular"],
)
def test_cells_that_follow_no_one_rule_are_said(layers):
    with pytest.raises(UnsupportedError, match="windows of one size at even steps"):
        receptive_field(nn.Sequential(*layers), "1")


def test_more_padding_than_kernel_and_layers_for_one_size_behind():
    field = receptive_field(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 100), nn.Conv2d(4, 4, 3, 1, 1), nn.Flatten(), nn.Linear(7, 2)), "1"
    )
    assert (field.size, field.stride, field.start) == ((7, 7), (2, 2), (-102, -102))


class Weighed(nn.Module):
    """A convolution, weighed by what a layer makes of its mean, all in one module."""

    def __init__(self):
        super().__init__()
        self.look, self.gate = nn.Conv2d(4, 4, 7, 1, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.look(x)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


def test_what_does_more_than_weigh_is_no_gate():
    field = receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Weighed()), "1")
    assert field.size == (float("inf"), float("inf"))
    box = field.window(2, 3)
    assert box.to_list() == [float("-inf"), float("-inf"), float("inf"), float("inf")]


def test_networks_for_one_size_are_seen_in_practice():
    vit, _ = build("timm/vit_tiny_patch16_224", pretrained=False)
    with torch.inference_mode():
        field = effective_field(vit, "blocks.0", torch.rand(1, 3, 224, 224))
    assert field.stride == (16, 16)
    assert field.centre(3, 5) == (88, 56)
