"""All thresholds at once are all thresholds one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from whatwhere.regions.components import components
from whatwhere.regions.sweep import levels_of, sweep
from whatwhere.regions.threshold import fraction


def same_as_one_by_one(levels: np.ndarray, count: int, heat: np.ndarray) -> None:
    found = sweep(levels, count, heat)
    assert (np.diff(found.threshold) >= 0).all()
    largest = found.largest()
    for number in range(count):
        expected = components(levels > number)
        rows = found.threshold == number
        got = sorted(
            (*map(int, box), int(area)) for box, area in zip(found.boxes[rows], found.areas[rows], strict=True)
        )
        assert got == sorted((*box.to_list(), area) for box, area in zip(expected.boxes, expected.areas, strict=True))
        if expected.boxes:
            assert found.boxes[largest[number]].tolist() == expected.boxes[0].to_list()
        else:
            assert largest[number] == -1


def test_by_hand():
    levels = np.array([[0, 3, 0, 0, 1, 2, 1], [0, 2, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]])
    found = sweep(levels, 4, levels.astype(float))
    rows = zip(found.threshold.tolist(), found.boxes.tolist(), found.areas.tolist(), strict=True)
    assert sorted(rows) == [
        (0, [1, 0, 3, 3], 4),
        (0, [4, 0, 7, 1], 3),
        (1, [1, 0, 2, 2], 2),
        (1, [5, 0, 6, 1], 1),
        (2, [1, 0, 2, 1], 1),
    ]
    assert found.boxes[found.largest()[:3]].tolist() == [[1, 0, 3, 3], [1, 0, 2, 2], [1, 0, 2, 1]]
    assert found.largest()[3] == -1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_random_levels(seed, height, width, top):
    levels = np.random.default_rng(seed).integers(0, top + 1, (height, width))
    same_as_one_by_one(levels, top + 2, levels.astype(float))
    finer = levels + np.random.default_rng(seed + 1).random((height, width)) / 2
    same_as_one_by_one(levels, top + 2, finer * (levels > 0))


@pytest.mark.parametrize("seed", range(4))
def test_smooth_maps_of_a_real_size(seed):
    grid = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(seed))
    for dtype in (np.float32, np.float64):
        heat = interpolate(grid, (60, 84), mode="bicubic")[0, 0].clamp(min=0).numpy().astype(dtype)
        levels = levels_of(heat, 100)
        for number in range(100):
            assert np.array_equal(levels > number, fraction(heat, number / 100))
        same_as_one_by_one(levels, 100, heat)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_equals_a_threshold_is_not_above_it(dtype):
    heat = (np.arange(1001) / 1000).astype(dtype).reshape(7, 143)
    levels = levels_of(heat, 1000)
    for number in (0, 1, 3, 299, 300, 301, 999):
        assert np.array_equal(levels > number, fraction(heat, number / 1000))


def test_maps_that_are_rough_in_every_pixel():
    heat = np.random.default_rng(0).random((40, 61))
    same_as_one_by_one(levels_of(heat, 100), 100, heat)


def test_constant_maps_have_no_components():
    assert levels_of(np.zeros((4, 6)), 10).max() == 0
    assert sweep(np.zeros((4, 6), int), 10, np.zeros((4, 6))).largest().tolist() == [-1] * 10
    assert sweep(np.full((4, 6), 3), 10, np.full((4, 6), 0.3)).largest().tolist() == [0, 1, 2] + [-1] * 7
