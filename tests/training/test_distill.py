"""A head that learns a slow where: it agrees with its teacher, costs one look, and travels with the run."""

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import gap_net, plain, scene, tight, vit_net
from torch import nn

import whatwhere
from whatwhere.classifiers.distilled import DistilledHead
from whatwhere.datasets import open_splits
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.geometry import Frame
from whatwhere.maps.shape import to_original, unit
from whatwhere.scores import of_class
from whatwhere.training.distill import Lessons, _threshold, distill, to_network

SIZE = (64, 96)


class Coloured(nn.Module):
    """Red against blue on a grid of stride 8, behind blocks of stride 2, 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False) for _ in range(3))
        for block in (self.one, self.two, self.three):
            nn.init.zeros_(block.weight)
            with torch.no_grad():
                for channel in range(3):
                    block.weight[channel, channel] = 1 / 9
        self.last = nn.Linear(3, 2)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[-4.0, 0.0, 4.0], [4.0, -2.0, -2.0]]))
            self.last.bias.zero_()

    def forward(self, images):
        return self.last(self.three(self.two(self.one(images))).mean((2, 3)))


def coloured():
    return whatwhere.load(Coloured().eval(), preprocess=plain(SIZE), labels=["blue", "red"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 red ellipses on dark textures, in a folder of one class."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "train/red").mkdir(parents=True)
    for seed in range(24):
        Image.fromarray(scene(seed, (90, 130))[0]).save(root / f"train/red/{seed:02}.png")
    return root


@pytest.fixture(scope="module")
def taught(pictures):
    net = coloured()
    before = {name: tensor.clone() for name, tensor in net.network.state_dict().items()}
    found = distill(net, open_splits(pictures, ("train",)), epochs=30, batch=4, rate=3e-3)
    after = net.network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    return net, found


def test_it_agrees_with_its_teacher_on_other_pictures(taught):
    net, found = taught
    assert found.pictures == 24
    assert found.agreement > 0.8
    assert not found.failed
    closer = []
    for seed in range(100, 106):
        pixels, mask = scene(seed, (90, 130))
        (plainly,), (seen,), (best,) = (
            whatwhere.explain(net, pixels, target="red", **how)
            for how in ({"method": "gradcam"}, {"method": "distilled"}, {"preset": "best"})
        )
        assert seen.threshold == net.thresholds["distilled"]
        assert seen.map.shape == (32, 48)  # of the shallowest of three stages
        assert best.box.iou(tight(mask)) > 0.9
        assert seen.box.iou(tight(mask)) > 0.75
        closer.append(seen.box.iou(tight(mask)) - plainly.box.iou(tight(mask)))
    assert np.mean(closer) > 0.1


def test_one_look_is_enough(taught):
    net, _ = taught
    looks = []
    with net.network.register_forward_hook(lambda module, args, output: looks.append(len(args[0]))):
        whatwhere.explain(net, scene(7, (90, 130))[0], target=["red", "blue"], method="distilled")
    assert looks == [1]


def test_nothing_is_found_where_nothing_speaks_for_the_class(taught):
    net, _ = taught
    (seen,) = whatwhere.explain(net, np.zeros((50, 70, 3), np.uint8), target="red", method="distilled")
    assert not seen.mask.any()
    assert seen.box is None
    assert seen.trust == 0


def test_a_batch_says_what_each_says_alone(taught):
    net, _ = taught
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    together = whatwhere.METHODS["distilled"](net.trace(images), of_class(1))
    for i in range(3):
        alone = whatwhere.METHODS["distilled"](net.trace(images[i : i + 1]), of_class(1))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_what_is_drawn_is_drawn_again(taught, pictures):
    net, _ = taught
    again = coloured()
    distill(again, open_splits(pictures, ("train",)), epochs=30, batch=4, rate=3e-3)
    for one, other in zip(net.distilled.state_dict().values(), again.distilled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_travels_with_its_run(pictures, tmp_path):
    net = whatwhere.load("torchvision/mobilenet_v3_small", pretrained=False, preprocess=plain(SIZE))
    dataset = open_splits(pictures, ("train",)).sampled(4)
    found = distill(net, dataset, preset="fast", epochs=1)  # of other classes: the most probable one is learned
    assert found.pictures + len(found.failed) == 4
    whatwhere.save(net, tmp_path / "run")
    again = whatwhere.load(tmp_path / "run")
    assert again.thresholds == net.thresholds
    pixels = scene(3, (90, 130))[0]
    (one,), (other,) = (whatwhere.explain(each, pixels, method="distilled") for each in (net, again))
    assert np.array_equal(one.map, other.map)
    assert whatwhere.load(tmp_path / "run", layer="features.8").distilled is None  # it is of its own layer
    (tmp_path / "run/distilled.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"distilled\.safetensors"):
        whatwhere.load(tmp_path / "run")


def test_bad_pictures_are_named_and_lose_nothing(pictures, tmp_path):
    root = tmp_path / "data/train/red"
    root.mkdir(parents=True)
    for file in sorted(pictures.glob("train/red/*"))[:3]:
        (root / file.name).write_bytes(file.read_bytes())
    (root / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(root / "dark.png")
    found = distill(coloured(), open_splits(tmp_path / "data", ("train",)), epochs=1)
    assert found.pictures == 3
    assert len(found.failed) == 2
    assert any("broken.png" in why for why in found.failed.values())
    assert any("nothing speaks for red" in why for why in found.failed.values())
    for file in root.glob("[0-9]*"):
        file.unlink()
    net = coloured()
    with pytest.raises(DataError, match="no picture to learn from"):
        distill(net, open_splits(tmp_path / "data", ("train",)), epochs=1, folder=tmp_path / "there")
    assert net.distilled is None
    assert "distilled" not in net.thresholds
    assert not list((tmp_path / "there").iterdir())


def test_what_cannot_be_distilled_is_said(pictures):
    dataset = open_splits(pictures, ("train",))
    with pytest.raises(InputError, match="preset is one of"):
        distill(coloured(), dataset, preset="better")
    with pytest.raises(InputError, match="at least 1 epoch"):
        distill(coloured(), dataset, epochs=0)
    with pytest.raises(UnsupportedError, match="two sizes"):
        distill(whatwhere.load(vit_net(), preprocess=plain((24, 40))), dataset)
    with pytest.raises(UnsupportedError, match="whatwhere distill"):
        whatwhere.explain(whatwhere.load(gap_net(), preprocess=plain(SIZE)), scene(1)[0], method="distilled")
    with pytest.raises(InputError, match="channels of each"):
        DistilledHead(["a"], [1, 2])


class Echo(DistilledHead):
    """It says what it is told."""

    def forward(self, grids, maps):
        return maps.logit()


def test_the_threshold_is_of_heat_as_explain_makes_it():
    maps = torch.full((1, 8, 12), 0.5)
    maps[:, 2:6, 3:9] = 0.6
    maps[:, 3:5, 4:8] = 0.9
    masks = torch.zeros(1, 8, 12)
    masks[:, 2:6, 3:9] = 1
    share, agreement = _threshold(Echo(["a"], [1]), Lessons([], maps, maps, masks), 4)
    assert agreement == pytest.approx(1)
    assert torch.equal(unit(maps) > share, masks.bool())


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1)])
def test_a_line_of_which_a_crop_sees_less_than_a_pixel(size):
    assert to_network(np.ones(size, np.float32), Frame.crop(size, (64, 64), 0.875), (8, 8)).min() == 1


@pytest.mark.parametrize("kind", [Frame.whole, Frame.crop, Frame.letterbox])
def test_heat_on_the_grid_comes_back_as_it_was(kind):
    """A disc, brought to the network's grid and back; what a crop cut away, or a letterbox padded, is 0."""
    y, x = np.mgrid[:90, :130] + 0.5
    heat = np.exp(-(((y - 40) / 18) ** 2) - ((x - 70) / 20) ** 2).astype(np.float32)
    frame = kind((90, 130), SIZE)
    grid = to_network(heat, frame, (32, 48))
    assert grid.shape == (32, 48)
    back = to_original(torch.from_numpy(grid)[None], frame)[0].numpy()
    seen = frame.seen
    inside = np.s_[int(seen.y0) + 3 : int(seen.y1) - 3, int(seen.x0) + 3 : int(seen.x1) - 3]
    assert np.abs(back - heat)[inside].max() < 0.05
