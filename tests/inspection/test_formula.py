"""What each layer's cells see, by the formula: by hand, and as it is measured."""

import math

import pytest
import torch
from torch import nn

from whatwhere.classifiers.zoo import build
from whatwhere.inspection.formula import receptive_fields
from whatwhere.inspection.receptive import ReceptiveField, effective_field, receptive_field

SIZE = (96, 128)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, (5, 3), padding=(4, 1), dilation=(2, 1))
        self.gate, self.after = nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)

    def forward(self, images):
        grid = torch.cat([self.short(images), self.long(images)], 1)[:, 2:6]
        return self.after(grid * self.gate(grid.mean((2, 3), keepdim=True)).sigmoid())


def test_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 3)
    )
    found = receptive_fields(network, torch.rand(1, 3, *SIZE))
    assert found["1"] == ReceptiveField((7, 7), (2, 2), (-3, -3))
    assert found["2"] == ReceptiveField((11, 11), (4, 4), (-5, -5))
    assert found["3"] == found[""] == ReceptiveField((19, 19), (4, 4), (-5, -5))


def test_where_branches_come_together_a_cell_sees_what_any_of_them_does():
    found = receptive_fields(Branches(), torch.rand(1, 3, *SIZE))
    assert found["short"] == ReceptiveField((1, 1), (1, 1), (0, 0))
    assert found["long"] == ReceptiveField((9, 3), (1, 1), (-4, -1))
    assert found["after"] == ReceptiveField((10, 4), (2, 2), (-4, -1))
    assert math.isinf(found["gate"].size[0])


@pytest.mark.parametrize(
    ("network", "shift"),
    [
        (nn.Sequential(nn.ZeroPad2d((1, 2, 3, 4)), nn.Conv2d(3, 2, 5)), (-3.0, -1.0)),
        (nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(3, 2, 5)), (-2.0, -2.0)),
        (nn.Sequential(nn.Conv2d(3, 2, 5), nn.AvgPool2d(2, ceil_mode=True)), (0.0, 0.0)),
    ],
)
def test_padding_moves_where_cells_begin(network, shift):
    assert receptive_fields(network, torch.rand(1, 3, *SIZE))[""].start == shift


def test_what_it_cannot_follow_it_leaves_out():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3))
    assert set(receptive_fields(network, torch.rand(1, 3, *SIZE))) == {"0"}
    found = receptive_fields(build("timm/vit_tiny_patch16_224", pretrained=False)[0], torch.rand(1, 3, 224, 224))
    assert found["patch_embed.proj"] == ReceptiveField((16, 16), (16, 16), (0, 0))
    assert not any(name.startswith("blocks") for name in found)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("lenet5", ("grid.0", "grid"), {"num_classes": 3}),
        ("torchvision/vgg16", ("features.2", "features.9"), {"init_weights": False}),
        ("torchvision/resnet50", ("maxpool", "layer1.1.conv2"), {}),
        ("efficientnet-lite0", ("conv_stem", "blocks.2.0"), {}),
        ("timm/mobilenetv3_small_050", ("conv_stem", "blocks.2.0"), {}),
    ],
)
def test_the_formula_the_measurement_and_the_gradient_agree(name, layers, options):
    network, _ = build(name, pretrained=False, **options)
    found = receptive_fields(network, torch.rand(1, 3, *SIZE))
    for layer in layers:
        assert found[layer] == receptive_field(network, layer)
    seen = effective_field(network, layers[0], torch.rand(1, 3, *SIZE, generator=torch.manual_seed(0)), share=1.0)
    assert all(one <= most + 1 for one, most in zip(seen.size, found[layers[0]].size, strict=True))


def test_the_network_is_left_as_it_was():
    network = build("timm/resnet10t", pretrained=False)[0].train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    receptive_fields(network, torch.rand(2, 3, 64, 96))
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
