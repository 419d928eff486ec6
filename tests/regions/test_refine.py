"""What the picture's edges decide, on pictures whose edges a reader can see."""

import inspect

import cv2
import numpy as np
import pytest
from scenes import scene

from whatwhere.errors import InputError
from whatwhere.regions.refine import CELLS, grabcut, grid_of, guided, recolour, settle, superpixels, walk

RED, BLUE = (220, 40, 30), (30, 60, 200)
SOFT = [walk, settle, recolour, guided, superpixels]


def halves(size: tuple[int, int], at: int) -> np.ndarray:
    """Red on the left of a column, blue on its right."""
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:, :at], pixels[:, at:] = RED, BLUE
    return pixels


def noise(size: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.random(size).astype(np.float32), draw.integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("steps", [(1,), (1, 2), (3,)])
def test_walk_solves_its_equations(steps):
    heat, pixels = noise((5, 7))
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).astype(float)
    places = [(y, x) for y in range(5) for x in range(7)]

    def apart(one, other):
        return np.square(lab[one] - lab[other]).sum()

    near = {}
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places[:i]):
            for step in {1, *steps}:
                if {abs(y - v), abs(x - u)} in ({step}, {0, step}):
                    near[i, j] = step
    # the mean is that of the four directions' means, whatever the number of pairs in each
    directions = {}
    for (i, j), step in near.items():
        (y, x), (v, u) = places[i], places[j]
        if step == 1:
            directions.setdefault((y - v, x - u), []).append(apart(places[i], places[j]))
    mean = np.mean([np.mean(values) for values in directions.values()])
    assert len(directions) == 4
    laplacian = np.zeros((35, 35))
    for (i, j), step in near.items():
        if step in steps:
            weight = np.exp(-2 * apart(places[i], places[j]) / mean)
            laplacian[[i, j], [i, j]] += weight
            laplacian[[i, j], [j, i]] -= weight
    expected = np.linalg.solve(laplacian + 0.05 * np.eye(35), 0.05 * heat.ravel()).reshape(5, 7)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(walk(heat, pixels, trust=0.05, contrast=2.0, steps=steps), expected, atol=1e-4)


def test_walk_stops_at_edges():
    heat = np.zeros((9, 14), np.float32)
    heat[3:6, 1:3] = 1
    pixels = halves((9, 14), 5)
    found = walk(heat, pixels, contrast=20.0)
    assert np.array_equal(found > 0.5 * found.max(), pixels[..., 0] == RED[0])
    assert found[:, :5].min() > 10 * found[:, 5:].max()


def test_walk_that_trusts_the_heat_leaves_it():
    heat, pixels = noise((6, 9))
    expected = (heat - heat.min()) / (heat.max() - heat.min())
    np.testing.assert_allclose(walk(heat, pixels, trust=1e6), expected, atol=1e-4)


def test_walk_stops_at_the_edges_of_features():
    heat = np.zeros((8, 12), np.float32)
    heat[2:5, 1:3] = 1
    features = np.zeros((3, 4, 6), np.float32)
    features[1, :, 3:] = 7
    flat = np.full((8, 12, 3), 90, np.uint8)
    found = walk(heat, flat, trust=0.1, contrast=20.0, features=features)
    assert found[:, :5].min() > 0.9
    assert found[:, 6:].max() < 0.1
    assert np.abs(np.diff(walk(heat, flat, trust=0.1)[:, 3:], axis=1)).max() < 0.3


def test_guided_is_its_formula():
    heat, pixels = noise((5, 7))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) / 255.0

    def window(values, y, x):  # the border's pixels once more: ... 1 0 | 0 1 2 ...
        inside = [
            [max(-at - 1, min(at, 2 * side - 1 - at)) for at in range(c - 1, c + 2)] for c, side in ((y, 5), (x, 7))
        ]
        return values[np.ix_(*inside)]

    slope, offset = np.zeros((5, 7)), np.zeros((5, 7))
    for y in range(5):
        for x in range(7):
            i, p = window(grey, y, x), window(heat.astype(float), y, x)
            slope[y, x] = ((i * p).mean() - i.mean() * p.mean()) / (i.var() + 0.01)
            offset[y, x] = p.mean() - slope[y, x] * i.mean()
    expected = [
        [window(slope, y, x).mean() * grey[y, x] + window(offset, y, x).mean() for x in range(7)] for y in range(5)
    ]
    np.testing.assert_allclose(guided(heat, pixels, radius=1, eps=0.01), np.clip(expected, 0, 1), atol=1e-6)


def test_recolour_by_hand():
    # of the heat, 3.5 of 4 lie on red; of what is missing to 1, 0.5 of 8
    heat = np.zeros((3, 4), np.float32)
    heat[0], heat[1, 0] = (1, 1, 1, 0.5), 0.5
    pixels = np.full((3, 4, 3), BLUE, np.uint8)
    pixels[0] = RED
    red, blue = 3.5 / 4 / (3.5 / 4 + 0.5 / 8), 0.5 / 4 / (0.5 / 4 + 7.5 / 8)
    np.testing.assert_allclose(recolour(heat, pixels), np.where(pixels[..., 0] == RED[0], red, blue), atol=1e-6)


def test_settle_walks_learns_the_colours_and_walks_again():
    heat, pixels = noise((7, 9))
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    again = 0.6 * heat + 0.4 * recolour(walk(heat, pixels), pixels)
    np.testing.assert_allclose(settle(heat, pixels, colour=0.4), walk(again, pixels), atol=1e-4)
    np.testing.assert_allclose(settle(heat, pixels, colour=0.0), walk(heat, pixels), atol=1e-4)


def test_superpixels_vote():
    heat, _ = noise((20, 30))
    pixels = halves((20, 30), 12)
    found = superpixels(heat, pixels)
    for value in np.unique(found):
        np.testing.assert_allclose(heat[found == value].mean(), value, rtol=1e-5)
    assert len(np.unique(found[:, :10])) == len(np.unique(found[:, 15:])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_grabcut_finds_the_thing_from_a_coarse_map(seed):
    pixels, mask = scene(seed)
    coarse = cv2.resize(mask.astype(np.float32), (5, 4), interpolation=cv2.INTER_AREA)
    heat = cv2.resize(coarse / coarse.max(), (130, 90))
    found = grabcut(heat, pixels)
    assert (found & mask).sum() / (found | mask).sum() > 0.95
    assert np.array_equal(found, grabcut(heat, pixels))


@pytest.mark.parametrize("seed", range(3))
def test_walk_finds_the_thing_from_a_coarse_map(seed):
    pixels, mask = scene(seed)
    coarse = cv2.resize(mask.astype(np.float32), (5, 4), interpolation=cv2.INTER_AREA)
    heat = cv2.resize(coarse / coarse.max(), (130, 90))

    def best(found):
        return max(((found > at) & mask).sum() / ((found > at) | mask).sum() for at in np.arange(0.1, 1, 0.05))

    assert best(walk(heat, pixels)) > max(0.9, best(heat) + 0.05)


@pytest.mark.parametrize("method", SOFT)
def test_mirrored_pictures_give_mirrored_heat(method):
    heat, pixels = noise((30, 42), 3)
    heat, pixels = cv2.GaussianBlur(heat, (0, 0), 5), cv2.GaussianBlur(pixels, (0, 0), 3)
    there, back = method(heat, pixels), method(heat[:, ::-1].copy(), pixels[:, ::-1].copy())[:, ::-1]
    assert np.abs(there - back).mean() < (0.02 if method is superpixels else 1e-4)


@pytest.mark.parametrize("method", [*SOFT, grabcut])
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (700, 2), (3, 5)])
def test_odd_pictures(method, size):
    heat, pixels = noise(size)
    for picture in (pixels, np.full_like(pixels, 128), np.repeat(pixels[..., :1], 3, 2)):
        found = method(heat, picture)
        assert found.shape == size
        assert np.isfinite(found).all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert found.dtype == (bool if method is grabcut else np.float32)


@pytest.mark.parametrize("method", [walk, settle, recolour, grabcut])
@pytest.mark.parametrize("value", [0, 0.4, 1])
def test_a_constant_map_gives_zeros(method, value):
    _, pixels = noise((6, 8))
    assert not method(np.full((6, 8), value, np.float32), pixels).any()


@pytest.mark.parametrize("method", [*SOFT, grabcut])
def test_heat_of_another_picture_is_refused(method):
    with pytest.raises(InputError, match=r"\(4, 6\) and \(6, 4\)"):
        inspect.unwrap(method)(np.zeros((4, 6), np.float32), np.zeros((6, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (walk, {"trust": 0.0}),
        (walk, {"contrast": -1.0}),
        (walk, {"steps": ()}),
        (walk, {"steps": (0,)}),
        (settle, {"trust": -1.0}),
        (settle, {"colour": 1.5}),
        (recolour, {"bins": 0}),
        (guided, {"radius": 0}),
        (guided, {"eps": 0.0}),
        (grabcut, {"threshold": 0.9, "sure": 0.8}),
        (grabcut, {"rounds": 0}),
    ],
)
def test_options_that_mean_nothing(method, wrong):
    with pytest.raises(InputError, match="got"):
        method(*noise((4, 6)), **wrong)


@pytest.mark.parametrize(
    "size", [(1, 1), (7, 5), (300, 450), (1, 90_000), (90_000, 1), (20_000, 2), (4000, 3), (56, 56)]
)
def test_grids_have_the_shape_of_the_picture(size):
    (H, W), (y, x) = size, grid_of(size)
    assert y * x <= CELLS
    assert 1 <= y <= H
    assert 1 <= x <= W
    if H * W > CELLS and min(H, W) > 100:
        assert abs(x / y - W / H) < 0.05
        assert y * x > 0.95 * CELLS
