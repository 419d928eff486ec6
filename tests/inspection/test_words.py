"""Classes written in units: a dictionary by hand, layers, and the page."""

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import plain
from torch import nn
from typer.testing import CliRunner

import whatwhere
from whatwhere.apps.cli import app
from whatwhere.classifiers.zoo import build
from whatwhere.datasets import open_dataset
from whatwhere.errors import UnsupportedError
from whatwhere.inspection.layers import activations, first_kernels, layers
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.inspection.words import dictionary, layer_of

SIZE = (64, 96)


class Colours(nn.Module):
    """Three units that say how red, green and blue 8 x 8 pixels are; classes are warm (red, some green) and cold."""

    def __init__(self, deep=False):
        super().__init__()
        self.look = nn.Conv2d(3, 3, 8, 8, bias=False)
        self.look.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) / 64
        self.fc = nn.Linear(3, 2)
        self.fc.weight.data = torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.0, 2.0]])
        self.fc.bias.data.zero_()
        self.after = nn.Softplus() if deep else nn.Identity()

    def forward(self, images):
        return self.after(self.fc(self.look(images).mean((2, 3))))


def net_of(network):
    return whatwhere.load(network, preprocess=plain(SIZE), layer="look", labels=["warm", "cold"])


@pytest.fixture
def pictures(tmp_path):
    """Grey pictures with a spot: the more red there is, the less blue; green is nearly always the same."""
    for number in range(5):
        pixels = np.full((128, 288, 3), 40, np.uint8)
        pixels[16:48, 24 * number : 24 * number + 48, 0] = 40 + 50 * number
        pixels[80:112, 24 * number : 24 * number + 48, 2] = 240 - 50 * number
        pixels[:4, :4, 1] = 40 + number
        folder = tmp_path / "data" / ("warm" if number > 2 else "cold")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("deep", [False, True])
def test_a_dictionary_by_hand(pictures, deep):
    net = net_of(Colours(deep))
    dataset = open_dataset(pictures)
    found = dictionary(net, dataset, [0, 1], words=2, count=1, batch=2)
    assert found.layer == "look"
    assert found.field == ReceptiveField((8, 8), (8, 8), (0, 0))
    assert [word.unit for word in found.words[0]] == [0, 1]
    assert found.words[1][0].unit == 2
    assert [own[0].image for own in found.patches] == ["warm/4.png", "warm/4.png", "cold/0.png"]
    if not deep:
        images = torch.stack([net.preprocess(sample.photo())[0] for sample in dataset])
        spread = net.trace(images).features.detach().mean((2, 3)).std(0, correction=0)
        assert found.words[0][0].weight == pytest.approx(float(spread[0]), rel=1e-4)
        assert found.words[1][0].weight == pytest.approx(2 * float(spread[2]), rel=1e-4)


def test_the_layer_of_a_split_is_found_by_what_it_gives():
    assert layer_of(whatwhere.load(pretrained=False)) == "bn2"
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=3)
    net = whatwhere.load(network, preprocess=plain(SIZE))
    assert layer_of(net) == "layer4"
    assert layer_of(net.at("layer2.0.conv1")) == "layer2.0.conv1"


def test_layers_kernels_and_activations_by_hand():
    net = net_of(Colours())
    look, fc = layers(net)
    assert (look.name, look.kind, look.parameters, look.grid) == ("look", "Conv2d", 576, (8, 12))
    assert look.field == ReceptiveField((8, 8), (8, 8), (0, 0))
    assert (fc.parameters, fc.grid, fc.field) == (8, None, None)
    assert first_kernels(net).shape == (3, 3, 8, 8)
    images = torch.rand(2, 3, *SIZE)
    assert torch.equal(activations(net, images, ["look"])["look"], net.network.look(images))
    with pytest.raises(UnsupportedError, match="'fc' gives no grid"):
        activations(net, images, ["fc"])


def test_a_linear_classifier_has_templates():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3 * 8 * 12, 2))
    net = whatwhere.load(network, preprocess=plain((8, 12)), layer="0")
    assert first_kernels(net).shape == (3, 3, 1, 1)
    flat = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3 * 8 * 12, 2))
    templates = first_kernels(whatwhere.load(flat, preprocess=plain((8, 12)), layer="0"))
    assert torch.equal(templates[1].flatten(), flat[2].weight[1])
    with pytest.raises(UnsupportedError, match="begins with no convolution"):
        first_kernels(whatwhere.load(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())))


def test_the_command_writes_a_page(pictures, tmp_path):
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=2, channels=[8, 8, 12, 16])
    net = whatwhere.load(network, preprocess=plain(SIZE), labels=["warm", "cold"])
    net.name, net.options = "timm/resnet10t", {"channels": [8, 8, 12, 16]}
    whatwhere.save(net, tmp_path / "run")
    (pictures / "warm" / "bad.png").write_bytes(b"no picture")
    told = ["inspect", str(tmp_path / "run"), str(pictures / "warm/3.png"), "--data", str(pictures)]
    done = CliRunner().invoke(app, [*told, "--out", str(tmp_path / "page"), "--words", "2", "--count", "3"])
    assert done.exit_code == 1, done.output  # one picture of the data cannot be read
    assert "bad.png" in done.output
    page = (tmp_path / "page/index.html").read_text()
    assert page.count('alt="a best patch"') == 2 * 2 * 3
    assert "layer4" in page
    assert "3 x 3" in page
    assert "<b>warm</b>" in page
    assert "What normalization does" in page
    assert "http" not in page
    assert (tmp_path / "page/stability.csv").read_text().startswith("kind,direction,strength,consistency")


def test_a_class_that_is_not_there(pictures):
    done = CliRunner().invoke(
        app, ["inspect", "efficientnet-lite0", "--data", str(pictures), "--classes", "unicornx"]
    )
    assert done.exit_code == 2
    assert "unicornx" in done.output
