"""Patches in pixels of the original: by hand, over a whole data set, for one picture, and as a page."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import whatwhere
from whatwhere.apps.cli import app
from whatwhere.classifiers.around import around
from whatwhere.classifiers.zoo import build
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, UnsupportedError
from whatwhere.geometry import Box
from whatwhere.images import Preprocess
from whatwhere.inspection.patches import bank_of, best_patches, decisions, field_of
from whatwhere.inspection.receptive import receptive_field

SIZE = (64, 96)
OPTIONS = {"channels": [8, 8, 12, 16], "output_stride": 16, "head": {"filters": 2}}


def banked():
    """A classifier of two classes with a bank of two filters each."""
    torch.manual_seed(0)
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=2, **OPTIONS)
    plain = Preprocess(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    net = around(network, name="timm/resnet10t", labels=["left", "right"], preprocess=plain)
    net.options = OPTIONS
    return net


class Brightness(nn.Module):
    """Two units that look at 8 x 8 pixels in steps of 8: how red they are, and how blue."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 2, 8, 8, bias=False)
        self.look.weight.data.zero_()
        self.look.weight.data[0, 0] = self.look.weight.data[1, 2] = 1 / 64

    def forward(self, images):
        return self.look(images).flatten(2).amax(2)


@pytest.fixture
def spots(tmp_path):
    """Black pictures of 128 x 288 pixels; each has a red spot and a blue one, of which it is known where."""
    (tmp_path / "data/one").mkdir(parents=True)
    for number in range(6):
        pixels = np.zeros((128, 288, 3), np.uint8)
        pixels[16 * number : 16 * number + 16, 24 * number : 24 * number + 24, 0] = 100 + 20 * number
        pixels[112:128, 264 - 24 * number : 288 - 24 * number, 2] = 250 - 20 * number
        Image.fromarray(pixels).save(tmp_path / f"data/one/{number}.png")
    (tmp_path / "data/one/bad.png").write_bytes(b"no picture")
    return tmp_path / "data"


def test_best_patches_by_hand(spots):
    network = Brightness()
    plain = Preprocess(size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    net = whatwhere.load(network, preprocess=plain, layer="look", labels=["red", "blue"])
    field = receptive_field(network, "look")
    for batch in (1, 4, 16):
        best = best_patches(net, open_dataset(spots), network.look, field, count=3, batch=batch)
        red, blue = best.patches
        assert [patch.image for patch in red] == ["one/5.png", "one/4.png", "one/3.png"]
        assert [patch.image for patch in blue] == ["one/0.png", "one/1.png", "one/2.png"]
        assert red[0].cell == (5, 5)
        # a cell of 8 x 8 pixels of 64 x 96 is one of 16 x 24 pixels of 128 x 288
        assert red[0].box.to_list() == [120, 80, 144, 96]
        assert red[0].centre == (132, 88)
        assert blue[1].box.to_list() == [240, 112, 264, 128]
        assert red[0].response == pytest.approx(200 / 255, abs=0.03)  # edges are smoothed
        assert list(best.failed) == ["one/bad.png"]


def test_where_units_saturate_the_picture_and_the_cell_with_more_of_it_come_first(spots):
    network = Brightness()
    plain = Preprocess(size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    net = whatwhere.load(network, preprocess=plain, layer="look", labels=["red", "blue"])
    bright = np.zeros((128, 288, 3), np.uint8)
    bright[32:80, 72:144, 0] = 255  # three by three cells, the middle one of which has bright ones all around
    Image.fromarray(bright).save(spots / "one/0.png")
    for batch in (1, 4):
        best = best_patches(
            net,
            open_dataset(spots),
            lambda images: network.look(images).clamp(max=0.1),
            receptive_field(network, "look"),
            count=2,
            batch=batch,
        )
        assert best.patches[0][0].image == "one/0.png"
        assert best.patches[0][0].cell == (3, 4)


def test_windows_are_cut_at_the_edges_and_centres_are_not(spots):
    network = nn.Sequential(nn.Conv2d(3, 2, 24, 8, padding=8, bias=False), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    network[0].weight.data.zero_()
    network[0].weight.data[:, 0, 8:16, 8:16] = 1 / 64
    plain = Preprocess(size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    net = whatwhere.load(network, preprocess=plain, layer="0", labels=["red", "again"])
    dataset = open_dataset(spots)
    first = next(sample for sample in dataset if sample.name == "one/0.png")
    from dataclasses import replace

    best = best_patches(net, replace(dataset, samples=[first]), network[0], receptive_field(network, "0"))
    (patch,) = best.patches[0]
    assert patch.box.to_list() == [0, 0, 48, 32]
    assert patch.centre == (12, 8)


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_windows_where_not_all_is_seen_or_some_is_padding(tmp_path, fit):
    (tmp_path / "one").mkdir()
    pixels = np.full((128, 288, 3), 30, np.uint8)
    pixels[48:80, 120:168, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "one/a.png")
    network = Brightness()
    network.look.weight.data[1] = -1 / 64  # how dark: padding is darker than any of the picture
    plain = Preprocess(size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, fit=fit)
    net = whatwhere.load(network, preprocess=plain, layer="look", labels=["red", "dark"])
    frame = plain.frame((128, 288))
    best = best_patches(net, open_dataset(tmp_path), network.look, receptive_field(network, "look"))
    (red,), (dark,) = best.patches
    y, x = red.cell
    expected = frame.to_original(Box(8 * x, 8 * y, 8 * x + 8, 8 * y + 8))
    assert red.box.to_list() == expected.to_list()
    assert red.box.intersection(Box(120, 48, 168, 80)).area > 0.7 * red.box.area
    assert dark.box.area > 0
    assert frame.seen.x0 <= dark.centre[0] <= frame.seen.x1
    assert 0 < dark.centre[1] < 128


def test_a_data_set_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/bad.png").write_bytes(b"")
    net = banked()
    with pytest.raises(DataError, match=r"no picture can be read: .*bad.png"):
        best_patches(
            net,
            open_dataset(tmp_path),
            net.network.responses,
            receptive_field(nn.Sequential(nn.Conv2d(3, 2, 1)), "0"),
        )


def test_what_decides_adds_up(spots):
    net = banked()
    field = field_of(net, net.network.read, open_dataset(spots))
    photo = whatwhere.open_photo(spots / "one/3.png")
    found = decisions(net, photo, field)
    logits = net.logits(net.preprocess(photo)[0][None])[0]
    assert [one.label for one in found] == logits.argsort(descending=True).tolist()
    responses = net.network.responses(net.preprocess(photo)[0][None])[0].detach()
    for one in found:
        assert sum(one.streams) == pytest.approx(float(logits[one.label]), rel=1e-4, abs=1e-5)
        assert one.probability == pytest.approx(float(logits.softmax(0)[one.label]), rel=1e-4)
        assert one.contributions == sorted(one.contributions, reverse=True)
        assert sorted(patch.unit for patch in one.patches) == [2 * one.label, 2 * one.label + 1]
        for patch in one.patches:
            assert responses[patch.unit][patch.cell] == responses[patch.unit].max()
            assert patch.box.to_list() == pytest.approx(
                net.preprocess.frame(photo.size).to_original(field.window(*patch.cell)).to_list()
            )
    # what the filters of all classes add to a logit is what P and the side branch say, but for P's bias
    weight, strongest = net.network.patches.weight.detach(), responses.flatten(1).amax(1)
    bias = net.network.patches.bias.detach()
    whole = float((weight[0] * strongest).sum() + 0.1 * strongest[:2].mean() + bias[0])
    zero = next(one for one in found if one.label == 0)
    assert zero.streams[1] + zero.streams[2] == pytest.approx(whole, rel=1e-4, abs=1e-5)
    (asked,) = decisions(net, photo, field, [1])
    assert asked.label == 1


def test_only_a_bank_has_patches(spots):
    with pytest.raises(UnsupportedError, match=r"no filter bank.*head.filters=10"):
        bank_of(whatwhere.load())


def test_the_command_writes_a_page(spots, tmp_path):
    net = banked()
    whatwhere.save(net, tmp_path / "run")
    photo, out = spots / "one/2.png", tmp_path / "page"
    told = ["patches", str(tmp_path / "run"), str(photo), "--data", str(spots), "--out", str(out), "--count", "2"]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 1  # one picture of the data cannot be read
    assert "bad.png" in done.output
    page = (out / "index.html").read_text()
    assert page.count("<figure>") == 4
    assert "<b>left</b>" in page
    assert "<b>right</b>" in page
    assert "http" not in page.replace("http-equiv", "")
    found = json.loads((out / "patches.json").read_text())
    assert found["filters"] == 2
    assert found["classes"] == ["left", "right"]
    assert [len(own) for own in found["patches"]] == [2] * 4
    box = found["patches"][0][0]["box"]
    assert 0 <= box["x0"] < box["x1"] <= 288
    assert 0 <= box["y0"] < box["y1"] <= 128


def test_the_command_says_what_is_missing(spots, tmp_path):
    whatwhere.save(banked(), tmp_path / "run")
    done = CliRunner().invoke(app, ["patches", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "--data" in done.output
    done = CliRunner().invoke(app, ["patches", "efficientnet-lite0", "--data", str(spots)])
    assert done.exit_code == 2
    assert "no filter bank" in done.output
