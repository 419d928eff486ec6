"""What stands behind a preset: the same on the road of one image and in the evaluation of many."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import boxed_scene, deep_head_net, gap_net, plain, red_net, scene, vit_net
from torch import nn

import whatwhere
from whatwhere import PRESETS
from whatwhere.datasets import open_dataset
from whatwhere.errors import InputError
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.evaluation.localization import HITS, overlaps, pixels_of
from whatwhere.evaluation.protocols import PROTOCOLS
from whatwhere.geometry import Box
from whatwhere.images import Preprocess
from whatwhere.maps.combine import root
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.shape import positive, to_original, unit
from whatwhere.scores import of_class

SHARPER = [name for name, one in PRESETS.items() if one.refine]


@pytest.fixture(scope="module")
def red():
    return whatwhere.load(red_net(), preprocess=plain((40, 60)), labels=["blue", "red"])


def blob() -> np.ndarray:
    pixels = np.full((80, 120, 3), 20, np.uint8)
    pixels[20:50, 36:90] = (230, 10, 15)
    return pixels


def test_there_are_three_from_cheap_to_dear():
    assert list(PRESETS) == ["fast", "balanced", "best"]
    costs = [one.cost for one in PRESETS.values()]
    assert costs == sorted(costs)
    assert all(name == one.name == one.__name__ for name, one in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_method_and_what_refines_its_heat(red, name):
    preset = PRESETS[name]
    (seen,) = whatwhere.explain(red, blob(), target="red", preset=name)
    (same,) = whatwhere.explain(red, blob(), target="red", method=name)
    assert seen.method == name
    assert seen.threshold == preset.threshold
    assert np.array_equal(seen.heat, same.heat)
    coarse = to_original(unit(positive(torch.from_numpy(seen.map)[None])), seen.frame)[0].numpy()
    assert np.array_equal(seen.heat, preset.refine(coarse, seen.pixels) if preset.refine else coarse)
    assert seen.heat.min() >= 0
    assert seen.heat.max() <= 1
    assert seen.box.iou(Box(36, 20, 90, 50)) > 0.9


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (90, 2)])
def test_odd_pictures_and_constant_ones(red, name, size):
    for pixels in (scene(0, (90, 130))[0][: size[0], : size[1]], np.full((*size, 3), 77, np.uint8)):
        (seen,) = whatwhere.explain(red, pixels, target="red", preset=name)
        assert np.isfinite(seen.heat).all()
        assert seen.heat.shape == pixels.shape[:2]
    assert not seen.heat.any()
    assert seen.box is None


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_whatever_way_the_picture_lies_in_the_input(fit):
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "fit": fit}
    net = whatwhere.load(red_net(), preprocess=Preprocess(size=(40, 40), **options), labels=["blue", "red"])
    for name in SHARPER:
        (seen,) = whatwhere.explain(net, blob(), target="red", preset=name)
        assert seen.box.iou(Box(36, 20, 90, 50)) > 0.8


class Fixed(nn.Module):
    """Of one size, as transformers' are: of others it raises this."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = deep_head_net(), error

    def forward(self, images):
        if images.shape[2:] != (24, 40):
            raise self.error
        return self.inner(images)


@pytest.mark.parametrize("name", SHARPER)
def test_networks_of_one_size_are_looked_at_in_it(name):
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 40, 5)).eval()
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(4))
    for network in (fixed, vit_net(), Fixed(ValueError("wanted 24 x 40"))):
        trace = whatwhere.load(network, preprocess=plain((24, 40))).trace(images)
        assert PRESETS[name](trace, of_class(2)).equal(root(gradcam)(trace, of_class(2)))


@pytest.mark.parametrize("name", SHARPER)
def test_too_little_memory_for_a_second_look_is_said(name):
    net = whatwhere.load(Fixed(torch.OutOfMemoryError("out of memory")), preprocess=plain((24, 40)))
    with pytest.raises(torch.OutOfMemoryError):
        whatwhere.explain(net, blob(), preset=name)


@pytest.mark.parametrize("name", SHARPER)
def test_a_batch_is_its_images_one_by_one(name):
    net = whatwhere.load(gap_net(), preprocess=plain((24, 40)))
    pictures = [scene(seed, size)[0] for seed, size in enumerate([(45, 65), (30, 30), (64, 40)])]
    together = whatwhere.explain(net, pictures, target=3, preset=name)
    for picture, (one,) in zip(pictures, together, strict=True):
        (alone,) = whatwhere.explain(net, picture, target=3, preset=name)
        np.testing.assert_allclose(one.heat, alone.heat, atol=1e-3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_evaluated_is_what_explain_gives(tmp_path, protocol):
    net = whatwhere.load(red_net(), preprocess=plain((45, 65)), labels=["blue", "red"])
    rows = [boxed_scene(tmp_path, f"test/red/{number}.png", number, (45, 65)) for number in range(3)]
    (tmp_path / "boxes.csv").write_text("\n".join(["path,class,x0,y0,x1,y1", *rows]) + "\n")
    dataset = open_dataset(tmp_path)
    found = evaluate(net, dataset, plan_of(["fast", *SHARPER], protocol, baselines=False))
    assert found.where("balanced")["MaxBoxAccV2"].value >= found.where("fast")["MaxBoxAccV2"].value
    if protocol != "half-open":
        return
    for name in SHARPER:
        hits, pixels = np.zeros(1000, int), np.zeros((2, 1001), int)
        for sample in dataset:
            (seen,) = whatwhere.explain(net, sample.photo(), target="red", preset=name)
            hits += overlaps(seen.heat, sample.boxes[0]).any >= 0.7
            inside = np.zeros(seen.size, np.int8)
            (box,) = sample.boxes[0]
            inside[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = 1
            pixels += pixels_of(seen.heat, inside)
        tally = found.tally.part(name)
        assert np.array_equal(tally["hits"][0, HITS.index("any 0.7")], hits)
        assert np.array_equal(tally["pixels"][0], pixels)


def test_what_a_classifier_was_calibrated_to_comes_first(red):
    red.thresholds["balanced"] = 0.7
    (seen,) = whatwhere.explain(red, blob(), target="red", preset="balanced")
    (told,) = whatwhere.explain(red, blob(), target="red", preset="balanced", threshold=0.2)
    red.thresholds.clear()
    assert (seen.threshold, told.threshold) == (0.7, 0.2)


def test_presets_that_are_none(red):
    with pytest.raises(InputError, match="fast, balanced, best, got 'sharp'"):
        whatwhere.explain(red, blob(), preset="sharp")
    with pytest.raises(InputError, match="nearest: balanced"):
        whatwhere.explain(red, blob(), method="balance")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_sent_to_other_processes(name):
    assert pickle.loads(pickle.dumps(PRESETS[name])) is PRESETS[name]


def test_grey_photographs(red):
    for name in SHARPER:
        (seen,) = whatwhere.explain(red, Image.fromarray(blob()).convert("L"), target="red", preset=name)
        assert np.isfinite(seen.heat).all()
