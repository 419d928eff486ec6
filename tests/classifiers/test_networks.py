"""The seam over the families people have: where it is found, and that it says what the network says."""

import warnings
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from scenes import MANY_FORWARDS, OF_A_KIND, TRANSFORMERS, gap_net, plain
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.vision_transformer import VisionTransformer

import whatwhere
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.layouts import NoGridError, as_grid
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.images import Preprocess
from whatwhere.maps import METHODS
from whatwhere.scores import of_class

SIZE = (24, 40)

TORCHVISION = {
    "alexnet": ("features", 256, False),
    "convnext_tiny": ("features", 768, False),
    "densenet121": ("features", 1024, False),
    "efficientnet_b0": ("features", 1280, True),
    "googlenet": ("inception5b", 1024, True),
    "inception_v3": ("Mixed_7c", 2048, True),
    "mnasnet0_5": ("layers", 1280, True),
    "mobilenet_v2": ("features", 1280, True),
    "mobilenet_v3_small": ("features", 576, False),
    "regnet_y_400mf": ("trunk_output", 440, True),
    "resnet18": ("layer4", 512, True),
    "shufflenet_v2_x0_5": ("conv5", 1024, True),
    "squeezenet1_1": ("classifier.2", 1000, True),
    "swin_t": ("permute", 768, True),
}
OF_ONE_SIZE = {
    "maxvit": (
        lambda: MaxVit(
            (64, 64),
            stem_channels=8,
            partition_size=4,
            block_channels=[8, 16],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.0,
            num_classes=7,
        ),
        ("blocks.1", 16, False),
    ),
    "vit": (
        lambda: VisionTransformer(64, 16, 3, 2, 24, 32, num_classes=7),
        ("encoder.layers.encoder_layer_1", 24, False),
    ),
}
"""Torchvision's that are made for one size of images, a square."""
SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}
TIMM = {
    "convnext_atto": ({}, None, 320, False),
    "deit_tiny_distilled_patch16_224": (SMALL, "blocks.1", 24, False),
    "mobilenetv3_small_050": ({}, None, 288, False),
    "regnetx_002": ({}, None, 368, True),
    "resnet18": ({}, None, 512, True),
    "resnetv2_50": ({"layers": (1,) * 4, "channels": (16, 32, 32, 64), "stem_chs": 8}, None, 64, True),
    "swin_tiny_patch4_window7_224": (
        {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4},
        "norm",
        32,
        True,
    ),
    "test_efficientnet": ({}, None, 256, True),
    "vit_tiny_patch16_224": (SMALL, "blocks.1", 24, False),
    "vit_small_patch16_rope_224": (SMALL, "blocks.1", 24, False),
    "vit_dwee_patch16_reg1_gap_256": (SMALL, "blocks", 24, False),
}


ATTENDING = {
    "deit_tiny_distilled_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch16_rope_224",
    "vit",
}
"""Networks in which every token attends to every token, one matrix a head."""


def check(net, channels, linear, attending):
    """The seam agrees with the plain forward, every method of one look works on it, the law is as it should be."""
    heads = [module for module in net.network.modules() if isinstance(module, nn.Linear)]
    if heads and heads[-1].weight.std() < 0.05:  # some begin at about zero, which says nothing about where
        nn.init.normal_(heads[-1].weight)
    noise = torch.randn(2, 3, *net.preprocess.size, generator=torch.Generator().manual_seed(3))
    trace = net.trace(noise)
    torch.testing.assert_close(trace.logits.detach(), net.logits(noise), atol=1e-4, rtol=1e-4)
    assert trace.features.shape[:2] == (2, channels)
    assert min(trace.features.shape[2:]) > 1
    if linear is not None:
        assert (net.linear_law(noise) < 1e-3) == linear
    for i in range(2):
        again = trace.tail(trace.features[i].detach().expand(3, *trace.features.shape[1:]), i)
        torch.testing.assert_close(again, trace.logits[i].detach().expand_as(again), atol=1e-4, rtol=1e-4)
    for name in METHODS:
        if name in MANY_FORWARDS or (name == "cam" and not linear):
            continue
        if name in OF_A_KIND and not (attending and name in TRANSFORMERS):
            with pytest.raises(UnsupportedError, match="Use gradcam"):
                METHODS[name](trace, of_class(1))
            continue
        maps = METHODS[name](trace, of_class(1))
        assert maps.isfinite().all()
        assert name in {"layercam", "kpcacam"} or maps.any(), name  # may be 0 in new networks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    layer, channels, linear = TORCHVISION[name]
    size = (128, 160) if name == "inception_v3" else (96, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of two networks, about their own initialization
        net = whatwhere.load(f"torchvision/{name}", pretrained=False, preprocess=plain(size))
    assert net.layer == layer
    assert net.labels[281] == "tabby"
    check(net, channels, linear, False)


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_torchvisions_of_one_size(name):
    make, (layer, channels, linear) = OF_ONE_SIZE[name]
    net = whatwhere.load(make(), preprocess=plain((64, 64)))
    assert net.layer == layer
    check(net, channels, linear, name in ATTENDING)


def test_images_are_as_a_network_was_trained_on_them():
    net = whatwhere.load("torchvision/mobilenet_v3_small", pretrained=False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert (net.preprocess.size, net.preprocess.mean, net.preprocess.std) == ((224, 224), mean, std)
    net = whatwhere.load("timm/vit_tiny_patch16_224", pretrained=False)
    assert (net.preprocess.size, net.preprocess.mean, net.preprocess.std) == ((224, 224), (0.5,) * 3, (0.5,) * 3)
    assert net.layer == "blocks.10"


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    options, layer, channels, linear = TIMM[name]
    size = (64, 96)
    if options and layer is not None:  # transformers have a place for each patch
        options = {**options, "img_size": size}
    net = whatwhere.load(timm.create_model(name, **options), preprocess=plain(size))
    assert getattr(net, "layer", None) == layer
    assert isinstance(net, SplitClassifier) == (layer is None)
    check(net, channels, linear, name in ATTENDING)


def test_a_class_token_leaves_the_patches_after_the_last_block_without_a_say():
    net = whatwhere.load("timm/vit_tiny_patch16_224", pretrained=False)
    noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert net.at("blocks.11").trace(noise).gradient(of_class(3)).eq(0).all()
    assert net.at("blocks.10").trace(noise).gradient(of_class(3)).ne(0).any()


def transformers_net(kind: str):
    import transformers

    small = {"num_labels": 7, "image_size": 64}
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, patch_size=16, **small
        )
        return transformers.ViTForImageClassification(config)
    if kind == "swin":
        config = transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, **small)
        return transformers.SwinForImageClassification(config)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **small)
    return transformers.ConvNextForImageClassification(config)


@pytest.mark.parametrize(("kind", "channels"), [("vit", 32), ("swin", 32), ("convnext", 32)])
def test_transformers(kind, channels):
    network = transformers_net(kind)
    network.config.id2label = {index: f"kind {index}" for index in range(7)}
    net = whatwhere.load(network, preprocess=plain((64, 64)))
    assert net.labels[3] == "kind 3"
    check(net, channels, None, kind in ATTENDING)


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = gap_net(), wrap

    def forward(self, images: Tensor):
        return self.wrap(self.net(images))


@dataclass
class Output:
    loss: None
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"loss": None, "logits": x},
        lambda x: {"out": x},
        lambda x: Output(None, x),
        lambda x: x[:, :, None, None],
    ],
)
def test_outputs_of_every_kind(wrap):
    expected = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(torch.ones(2, 3, *SIZE)).logits
    found = whatwhere.load(Wrapped(wrap), preprocess=plain(SIZE)).trace(torch.ones(2, 3, *SIZE)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "wrap", [lambda x: None, lambda x: {"a": x, "b": x}, lambda x: (x, x), lambda x: x[0], lambda x: ()]
)
def test_outputs_that_are_no_logits_are_refused(wrap):
    with pytest.raises(UnsupportedError, match="wanted logits"):
        whatwhere.load(Wrapped(wrap), preprocess=plain(SIZE))


class Frozen(nn.Module):
    """A backbone that runs under no_grad by itself, as fine-tuning code has it."""

    def __init__(self) -> None:
        super().__init__()
        net = gap_net()
        self.backbone, self.head = net[:5], net[5:]

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.head(features)


def test_a_backbone_under_its_own_no_grad():
    expected = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(torch.ones(2, 3, *SIZE))
    found = whatwhere.load(Frozen(), preprocess=plain(SIZE)).trace(torch.ones(2, 3, *SIZE))
    torch.testing.assert_close(found.gradient(of_class(0)), expected.gradient(of_class(0)))


def test_the_last_layer_before_the_pooling_is_found_and_another_can_be_asked_for():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    assert net.layer == "4"
    assert net.at("2").trace(torch.ones(1, 3, *SIZE)).features.shape == (1, 8, 12, 20)
    assert whatwhere.load(gap_net(), preprocess=plain(SIZE), layer="0").layer == "0"


def test_a_split_anywhere_gives_the_same_logits():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    noise = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    for layer in "01234":
        assert torch.equal(net.at(layer).trace(noise).logits, net.trace(noise).logits)


def test_layers_that_will_not_do_say_so():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    with pytest.raises(InputError, match="no layer 'layer4'; nearest"):
        net.at("layer4")
    with pytest.raises(UnsupportedError, match="no grid"):
        net.at("6").trace(torch.ones(1, 3, *SIZE))
    shared = nn.ReLU()
    twice = nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(UnsupportedError, match="2 times"):
        whatwhere.load(twice, preprocess=plain(SIZE)).at("1").trace(torch.ones(1, 3, *SIZE))
    with pytest.raises(UnsupportedError, match=r"no layer gives a grid .* pass layer="):
        whatwhere.load(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 40, 4)), preprocess=plain(SIZE))
    with pytest.raises(UnsupportedError, match="pass preprocess"):
        whatwhere.load(nn.Sequential(nn.Flatten(), nn.Linear(7, 4)))


def test_a_single_logit_is_a_sigmoid():
    net = whatwhere.load(gap_net(classes=1), preprocess=plain(SIZE))
    assert net.activation == "sigmoid"
    assert net.probabilities(torch.zeros(1, 1)).item() == 0.5


def test_labels_have_to_fit():
    with pytest.raises(InputError, match="gives 5 logits, got 2 labels"):
        whatwhere.load(gap_net(), preprocess=plain(SIZE), labels=["a", "b"])


@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [
        ((2, 6, 3, 5), (24, 40), (6, 3, 5)),  # channels first
        ((2, 3, 5, 6), (24, 40), (6, 3, 5)),  # channels last
        ((2, 15, 6), (24, 40), (6, 3, 5)),  # patches
        ((2, 16, 6), (24, 40), (6, 3, 5)),  # a class token before them
        ((2, 20, 6), (24, 40), (6, 3, 5)),  # and four registers
        ((2, 197, 8), (224, 224), (8, 14, 14)),
        ((2, 7, 7, 7), (224, 224), (7, 7, 7)),
    ],
)
def test_layouts(shape, size, grid):
    output = torch.arange(float(np.prod(shape))).reshape(shape)
    found, back = as_grid(output, size, frozenset({6}))
    assert found.shape == (2, *grid)
    assert torch.equal(back(found), output)


def test_the_patches_are_read_row_by_row():
    tokens = torch.arange(1.0, 17).reshape(1, 16, 1)
    grid, _ = as_grid(tokens, (24, 40), frozenset())
    assert grid[0, 0].tolist() == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]


@pytest.mark.parametrize("shape", [(2, 5), (2, 1000, 3), (2,)])
def test_what_is_no_layout(shape):
    with pytest.raises(NoGridError):
        as_grid(torch.zeros(shape), (24, 40), frozenset())


def test_hooks_are_gone_when_the_network_fails():
    class Failing(nn.Module):
        def forward(self, images):
            raise RuntimeError("out of memory")

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Failing())
    net = HookedClassifier(network, whatwhere.Labels(["a"]), Preprocess(size=SIZE), "failing", layer="0")
    network.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        net.trace(torch.ones(1, 3, *SIZE))
    assert not network[0]._forward_hooks
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("shape", [(0, 3, 24, 40), (1, 3, 0, 40)])
def test_what_is_no_batch(shape):
    with pytest.raises(InputError, match="wanted a batch of images"):
        whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(torch.zeros(shape))


class Scaled(nn.Module):
    """A timm network whose own forward does more than its two halves."""

    def __new__(cls):
        network = timm.create_model("test_resnet").eval()
        plain_forward = network.forward
        network.forward = lambda images: plain_forward((images - 0.5) * 4) / 3
        return network


def test_a_forward_that_does_more_than_its_halves_is_not_split_by_them():
    net = whatwhere.load(Scaled())
    assert isinstance(net, HookedClassifier)
    noise = torch.rand(2, 3, *net.preprocess.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.trace(noise).logits.detach(), net.logits(noise))


class Aside(nn.Module):
    """A branch that is computed last, and that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = gap_net(), nn.Conv2d(12, 4, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.main[:5](images)
        return self.main[5:](features), self.aside(features)


def test_a_branch_that_the_logits_do_not_depend_on():
    net = whatwhere.load(Aside(), preprocess=plain(SIZE))
    assert net.layer == "main.4"
    for frozen in (False, True):
        net.network.requires_grad_(not frozen)
        with pytest.raises(UnsupportedError, match="do not depend"):
            net.at("aside").trace(torch.ones(1, 3, *SIZE))


def test_one_cell_is_no_grid():
    net = whatwhere.load("timm/resnet18", pretrained=False, preprocess=plain((32, 32)))
    assert net.layer == "layer3"


def test_an_unknown_layer_of_a_token_network_under_its_own_no_grad():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = timm.create_model("vit_tiny_patch16_224", num_classes=0), nn.Linear(192, 5)

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.body(images)
            return self.head(features)

    net = whatwhere.load(Body(), preprocess=plain((224, 224)))
    assert net.layer == "body.blocks.10"


def test_loading_inside_inference_mode():
    with torch.inference_mode():
        net = whatwhere.load("timm/vit_tiny_patch16_224", pretrained=False)
    assert net.layer == "blocks.10"


def test_named_tuples_pass_through_a_split():
    Pair = namedtuple("Pair", ["grid", "other"])

    class Two(nn.Module):
        def forward(self, images):
            return Pair(images * 2, 7)

    class Last(nn.Module):
        def forward(self, pair):
            assert pair.other == 7
            return pair.grid.mean((2, 3))

    net = whatwhere.load(nn.Sequential(nn.Conv2d(3, 4, 3), Two(), Last()), preprocess=plain(SIZE))
    assert net.at("1").trace(torch.ones(1, 3, *SIZE)).features.shape == (1, 4, 22, 38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_maps_follow_the_weights(dtype):
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    net.network.to(dtype)
    batch = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    net.class_maps(net.trace(batch))
    before = net.class_maps(net.trace(batch))
    net.network[8].weight.data.mul_(2)
    torch.testing.assert_close(net.class_maps(net.trace(batch)), 2 * before)


def test_a_channel_for_each_class_is_its_own_class_map():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).bfloat16()
    net = whatwhere.load(network, preprocess=plain(SIZE))
    trace = net.trace(torch.ones(2, 3, *SIZE))
    torch.testing.assert_close(net.class_maps(trace), trace.features.detach())


def test_a_stride_that_differs_by_direction_is_no_other_layout():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=(2, 1), padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    net = whatwhere.load(network, preprocess=plain((64, 64)))
    assert net.trace(torch.rand(1, 3, 64, 64)).features.shape == (1, 32, 32, 64)


def test_a_compiled_network_is_seen_through():
    compiled = torch.compile(gap_net(), backend="eager")
    assert whatwhere.load(compiled, preprocess=plain(SIZE)).layer == "4"


def test_a_network_of_several_inputs_says_what_to_do():
    class Two(nn.Module):
        def forward(self, images, meta):
            return images.mean((2, 3)) + meta

    with pytest.raises(UnsupportedError, match="takes the images alone"):
        whatwhere.load(Two(), preprocess=plain(SIZE))


def test_a_network_made_under_inference_mode_says_so():
    with torch.inference_mode():
        network = gap_net()
    with pytest.raises(UnsupportedError, match="under inference_mode"):
        whatwhere.load(network, preprocess=plain(SIZE))
