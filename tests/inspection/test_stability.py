"""Views of a picture are what they say; and what is measured on them, with networks of which the answer is known."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import gap_net, plain, scene, tailed
from torch import nn

import whatwhere
from whatwhere.classifiers.around import around
from whatwhere.classifiers.lenet import LeNet5
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, InputError
from whatwhere.images import Preprocess
from whatwhere.inspection.stability import correlation, stability
from whatwhere.inspection.views import TRANSFORMS, Transform, checked, families, in_base
from whatwhere.reports.stability import said, stability_csv, stability_fragment

SIZE = (48, 80)
SHIFTS = [Transform("shift", pixels, way) for way in ("right", "down", "diagonal") for pixels in (1, 4, 16)]
MOVED = [*SHIFTS, *(one for one in TRANSFORMS if one.kind in {"scale", "rotation"})]


def blob(size=(64, 96), centre=(30.0, 52.0), radius=5.0):
    """A white spot with soft edges on black: (H W 3), at a centre (y, x) in pixel edges."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    light = 255 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius**2))
    return np.repeat(light[..., None], 3, 2).round().astype(np.uint8)


def tile(seed=0):
    """A texture that repeats every 48 x 80 pixels, 64 x 96 of it: windows of that size are turns of each other."""
    small = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return np.tile(small, (2, 2, 1))[:64, :96]


def rows(found):
    return {row.transform: row for row in found.rows}


# views


def brightest(pixels):
    """Centre of mass (x, y) of an image (d h w)."""
    light = pixels.double().mean(0)
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in light.shape)
    return torch.stack([(light.sum(0) * x).sum(), (light.sum(1) * y).sum()]) / light.sum()


@pytest.mark.parametrize("fit", ["whole", "letterbox", "crop"])
def test_a_view_shows_what_it_says_where(fit):
    # larger than what is made of it, not of its shape, the spot off its middle
    photo = whatwhere.open_photo(blob((230, 300), (108, 160), 6))
    preprocess = Preprocess(SIZE, (0.0,) * 3, (1.0,) * 3, fit=fit)
    seen = set()
    for family in families(preprocess, photo, MOVED):
        base = brightest(family.base)
        for view in family.views:
            assert view.pixels.shape == family.base.shape == (3, *SIZE)
            there = view.to_base @ torch.cat([brightest(view.pixels), torch.ones(1)])
            assert (there - base).abs().max() < 0.1, view.transform
            seen.add(view.transform)
    assert seen == set(MOVED)


def test_shifts_are_windows_of_one_rendering():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    (family,) = families(plain(SIZE), whatwhere.open_photo(pixels), SHIFTS)
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(family.base, whole[:, 16:, 16:])
    for view in family.views:
        pixel = int(view.transform.strength)
        y, x = {"right": (0, pixel), "down": (pixel, 0), "diagonal": (pixel, pixel)}[view.transform.direction]
        assert torch.equal(view.pixels[:, y:, x:], family.base[:, : 48 - y, : 80 - x])
        assert torch.equal(in_base(view.to_base, SIZE)[0, 0], torch.tensor([0.5 - x, 0.5 - y], dtype=torch.float64))


def test_a_quarter_turn():
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    (family,) = families(plain(SIZE), whatwhere.open_photo(pixels), [Transform("rotation", 90)])
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(family.base, whole[:, 16:64])
    (view,) = family.views
    assert torch.allclose(view.pixels, whole[:, :, 16:64].rot90(1, (1, 2)), atol=1e-4)


def test_all_scales_show_the_middle_of_one_picture():
    photo = whatwhere.open_photo(blob((120, 200), (60, 100), 4))
    bicubic = Preprocess(SIZE, (0.0,) * 3, (1.0,) * 3)
    (family,) = families(bicubic, photo, [Transform("scale", 0.5), Transform("scale", 2.0)])
    half, double = (view.pixels for view in family.views)
    widths = [float(pixels.sum()) ** 0.5 for pixels in (half, family.base, double)]
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.01)
    assert widths[2] / widths[1] == pytest.approx(2, rel=0.01)


def test_light_by_hand():
    pixels = np.full((60, 90, 3), 100, np.uint8)
    pixels[:30] = 200  # mean grey 150
    wanted = [Transform("brightness", 0.5), Transform("brightness", 2.0), Transform("contrast", 0.5)]
    (family,) = families(plain(SIZE), whatwhere.open_photo(pixels), wanted)
    found = [[round(255 * float(view.pixels[0, row, 0])) for row in (0, 47)] for view in family.views]
    assert found == [[100, 50], [255, 200], [175, 125]]
    assert torch.equal(family.base[0, [0, 47], 0], torch.tensor([200, 100]) / 255)


def test_what_a_transform_can_be():
    assert checked(TRANSFORMS, (224, 224)) == list(TRANSFORMS)
    assert max(one.strength for one in checked(TRANSFORMS, (32, 40)) if one.kind == "shift") == 16
    with pytest.raises(InputError, match=r"one of shift.*got 'shear'"):
        checked([Transform("shear", 1.0)], SIZE)
    with pytest.raises(InputError, match=r"right, down, diagonal; got 'up'"):
        checked([Transform("shift", 1, "up")], SIZE)
    with pytest.raises(InputError, match=r"whole pixels; got shift 1.5"):
        checked([Transform("shift", 1.5, "right")], SIZE)
    with pytest.raises(InputError, match=r"positive.*got scale 0"):
        checked([Transform("scale", 0)], SIZE)
    with pytest.raises(InputError, match=r"fit into an input of 48 x 80"):
        checked([Transform("shift", 32, "down")], SIZE)


# measures


def brightness_net(threshold=0.1):
    """Of two classes, one is how bright the picture is on the mean, the other a constant; one cell a pixel."""

    def head(features):
        mean = features.mean((1, 2, 3))
        return 10 * torch.stack([mean, threshold + 0 * mean], 1)

    return tailed(head, 2, SIZE)


def test_a_map_that_is_the_brightness_goes_along():
    net = brightness_net(0.0)
    found = stability(net, [blob(), blob(centre=(34, 60))], transforms=SHIFTS, batch=4)
    assert (found.images, found.model, found.method) == (2, "tail", "gradcam")
    assert [row.transform for row in found.rows] == SHIFTS
    for row in found.rows:
        assert row.equivariance == pytest.approx(1, abs=1e-6)
        assert row.follows == pytest.approx(1, abs=1e-6)
        assert row.consistency == 1
    # the others are sampled anew, from a larger picture
    net.preprocess = Preprocess(SIZE, (0.0,) * 3, (1.0,) * 3)
    for row in stability(net, [blob((230, 300), (100, 165), 25)], transforms=MOVED[len(SHIFTS) :]).rows:
        assert row.equivariance == pytest.approx(1, abs=0.01), row.transform
        assert row.follows == pytest.approx(1, abs=0.02), row.transform


@pytest.mark.parametrize("spread", [3.0, 30.0])
def test_a_map_that_never_moves_follows_nothing(spread):
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(80.0), indexing="ij")
    kept = torch.exp(-((y - 20) ** 2 + (x - 41) ** 2) / (2 * spread**2))

    def stuck(trace, score):
        return kept.expand(len(trace.images), -1, -1)

    found = stability(brightness_net(), [scene(0)[0]], transforms=MOVED, method=stuck)
    assert found.method == "stuck"
    for row in found.rows:
        assert row.follows == pytest.approx(0, abs=1e-6), row.transform
        assert row.equivariance < 1
    # by numpy, on what both see: the last 64 columns now, the first 64 before
    array = kept.numpy().astype(float)
    expected = np.corrcoef(array[:, 16:].ravel(), array[:, :-16].ravel())[0, 1]
    assert rows(found)[Transform("shift", 16, "right")].equivariance == pytest.approx(expected, abs=1e-6)
    for way in ("right", "down", "diagonal"):
        falling = [rows(found)[Transform("shift", pixels, way)].equivariance for pixels in (1, 4, 16)]
        assert falling == sorted(falling, reverse=True)


def test_a_map_that_goes_half_the_way():
    def half(trace, score):
        light = trace.images.mean(1)
        y, x = ((torch.arange(side) + 0.5) for side in SIZE)
        cy, cx = ((light.sum(axis) * at).sum(1) / light.sum((1, 2)) for axis, at in ((2, y), (1, x)))
        # from the middle of the base view's spot: half of its way
        cy, cx = (cy + 24) / 2, (cx + 40) / 2
        return torch.exp(-((y[:, None] - cy[:, None, None]) ** 2 + (x - cx[:, None, None]) ** 2) / 50)

    found = stability(brightness_net(0.0), [blob(centre=(40, 56))], transforms=SHIFTS, method=half)
    assert [row.follows for row in found.rows] == pytest.approx([0.5] * len(SHIFTS), abs=0.03)


def test_maps_that_are_constant():
    def flat(trace, score):
        return torch.ones(len(trace.images), 3, 5)

    def flat_where_moved(trace, score):
        return trace.images.mean(1) * (len(trace.images) == 1)

    wanted = [Transform("shift", 4, "right"), Transform("shift", 8, "right")]
    found = stability(brightness_net(), [blob()], transforms=wanted, method=flat)
    assert all(math.isnan(row.equivariance) and math.isnan(row.follows) for row in found.rows)
    assert all(row.consistency == 1 for row in found.rows)
    found = stability(brightness_net(), [blob()], transforms=wanted, method=flat_where_moved)
    assert all(row.equivariance == 0 for row in found.rows)
    ones = torch.ones(1, 2, 3)
    ramp = torch.arange(6.0).reshape(1, 2, 3) / 6
    everywhere = torch.ones(1, 2, 3, dtype=torch.bool)
    assert correlation(ramp, 1 - ramp, everywhere).item() == pytest.approx(-1)
    assert correlation(ramp, ones, everywhere).item() == 0
    assert correlation(ramp, ramp, everywhere & False).isnan().all()


def net_of(padding_mode, stride=1):
    torch.manual_seed(0)
    padded = {"padding": 1, "padding_mode": padding_mode}
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=stride, **padded),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, **padded),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return around(network, preprocess=plain(SIZE), name=padding_mode)


def test_circular_padding_and_a_mean_are_exactly_invariant():
    exact = stability(net_of("circular"), [tile(0), tile(1)], transforms=SHIFTS)
    for row in exact.rows:
        assert row.consistency == 1
        assert row.change < 1e-6
        assert row.equivariance == pytest.approx(1, abs=1e-5)
        assert row.follows == pytest.approx(1, abs=1e-5)
    padded = stability(net_of("zeros"), [tile(0), tile(1)], transforms=SHIFTS)
    assert min(row.change for row in padded.rows) > 10 * max(row.change for row in exact.rows)
    assert all(row.equivariance < 1 - 1e-4 for row in padded.rows)


def test_steps_of_two_are_invariant_to_even_shifts_alone():
    wanted = [Transform("shift", pixels, "right") for pixels in (1, 2, 3, 4, 15, 16)]
    found = rows(stability(net_of("circular", stride=2), [tile(2)], transforms=wanted))
    odd, even = ([found[one].change for one in wanted if one.strength % 2 == rest] for rest in (1, 0))
    assert max(even) < 1e-6 < 1e-5 < min(odd)


def test_blurring_before_cells_are_left_out_steadies():
    torch.manual_seed(0)
    sharp, blurred = LeNet5(4), LeNet5(4, antialias=True)
    blurred.load_state_dict(sharp.state_dict(), strict=False)
    wanted = [Transform("shift", 1, way) for way in ("right", "down", "diagonal")]
    photos = [scene(seed, (104, 140))[0] for seed in range(2)]
    for one, other in zip(
        *(stability(around(net, preprocess=plain(SIZE)), photos, transforms=wanted).rows for net in (sharp, blurred)),
        strict=True,
    ):
        assert other.change < one.change
        assert other.equivariance > one.equivariance


def test_light_changes_classes_and_probabilities():
    grey = np.full((50, 70, 3), 100, np.uint8)
    factors = (0.5, 0.75, 1.25, 2.0)
    wanted = [Transform("brightness", factor) for factor in factors]
    found = rows(stability(brightness_net(0.3), [grey], transforms=wanted))
    before, *shares = (1 / (1 + math.exp(3 - 10 * mean / 255)) for mean in (100, 50, 75, 125, 200))
    for one, mean, share in zip(wanted, (50, 75, 125, 200), shares, strict=True):
        assert found[one].change == pytest.approx(abs(share - before), abs=1e-5), one
        assert found[one].consistency == (mean / 255 > 0.3)
        assert math.isnan(found[one].follows)
    black = stability(brightness_net(0.3), [grey, 0 * grey], transforms=wanted[:1])
    assert black.rows[0].consistency == 0.5  # black stays black, and its class with it


def test_of_one_class_it_counts_whether_it_is_there():
    net = around(
        nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), preprocess=plain(SIZE), layer="0"
    )
    net.network[0].weight.data.fill_(1 / 3)
    net.network[0].bias.data.fill_(-0.3)
    wanted = [Transform("brightness", 0.5), Transform("brightness", 2.0)]
    found = stability(net, [np.full((50, 70, 3), 102, np.uint8)], transforms=wanted)
    assert [row.consistency for row in found.rows] == [0, 1]


def test_numbers_do_not_depend_on_the_batch():
    net = around(gap_net(SIZE), preprocess=plain(SIZE))
    photos = [scene(seed)[0] for seed in range(3)]
    one, other = (stability(net, photos, transforms=MOVED, batch=batch) for batch in (1, 16))
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.transform == b.transform
        assert astuple(a)[1:] == pytest.approx(astuple(b)[1:], abs=1e-4, nan_ok=True)


def test_bad_pictures_are_listed(tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(scene(0)[0]).save(tmp_path / "one/good.png")
    (tmp_path / "one/bad.png").write_bytes(b"no picture")
    net, wanted, counted = brightness_net(), SHIFTS[:1], []
    found = stability(net, open_dataset(tmp_path), transforms=wanted, seen=counted.append)
    assert (found.images, list(found.failed), counted) == (1, ["one/bad.png"], [1, 2])
    found = stability(net, [np.zeros((4, 5, 7)), scene(1)[0], str(tmp_path / "none.png")], transforms=wanted)
    assert (found.images, list(found.failed)) == (1, ["image 1", str(tmp_path / "none.png")])
    with pytest.raises(DataError, match=r"no picture can be measured: .*bad.png"):
        stability(net, [tmp_path / "one/bad.png"], transforms=wanted)

    def nowhere(trace, score):
        return torch.full((len(trace.images), 2, 3), torch.nan)

    with pytest.raises(DataError, match=r"image 1: the map of tail has nan"):
        stability(net, [scene(1)[0]], transforms=wanted, method=nowhere)


def test_what_cannot_be_asked():
    with pytest.raises(InputError, match="no method is called 'gradcan'"):
        stability(brightness_net(), [blob()], method="gradcan")
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        stability(brightness_net(), [blob()], batch=0)
    volumes = tailed(lambda features: features.mean((2, 3))[:, :2], 2, SIZE)
    volumes.preprocess = plain((8, *SIZE))
    with pytest.raises(InputError, match="photos have 1 or 3 channels"):
        stability(volumes, [blob()])


# the table and the page


def test_the_table_and_the_fragment():
    photos = [blob(), "<b>gone</b>.png"]
    found = stability(brightness_net(0.02), photos, transforms=[*SHIFTS, Transform("brightness", 0.5)])
    table = stability_csv(found).splitlines()
    assert table[0] == "kind,direction,strength,consistency,change,equivariance,follows"
    assert table[1].startswith("shift,right,1,1.0000,")
    assert table[-1].startswith("brightness,,0.5,")
    assert table[-1].endswith(",")  # nothing that a map could follow
    page = stability_fragment(found)
    assert page.count("<svg") == 4  # three directions, and light
    assert "shift diagonal 16 px" in page
    assert "nan" not in page
    assert "&lt;b&gt;gone" in page
    assert "http" not in page
    # of one strength alone there is a point, in all panels on the same scale
    assert page.count("<circle") == 3 * 3 * 4 + 3
    assert said(Transform("rotation", 15)) == "rotation 15°"
