import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco
from scenes import scene, tight

from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.regions import rle
from whatwhere.regions.components import components
from whatwhere.regions.threshold import fraction, mask_of, otsu, percentile

HEAT = np.array([[0, 0, 0, 0, 0], [0, 0.5, 1, 0, 0.1], [0, 0.2, 0.4, 0, 0.3]], np.float32)


def test_fraction_by_hand():
    assert fraction(HEAT, 0.2).astype(int).tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]]
    assert np.array_equal(fraction(HEAT * 7, 0.2), fraction(HEAT, 0.2)), "a share of its own maximum"


def test_percentile_by_hand():
    # 15 values, 9 of them 0: above the 80th percentile are the highest three
    assert percentile(HEAT, 80).astype(int).tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_otsu_parts_two_levels():
    heat = np.where(HEAT > 0.25, 0.9, 0.1).astype(np.float32)
    assert np.array_equal(otsu(heat), HEAT > 0.25)


def test_otsu_is_scikit_image():
    from skimage.filters import threshold_otsu

    for seed in range(3):
        heat = scene(seed)[0][..., 0].astype(np.float32)
        levels = np.round(heat * (255 / heat.max())).astype(np.uint8)
        assert np.array_equal(otsu(heat), levels > threshold_otsu(levels))


@pytest.mark.parametrize("at", [0.0, 0.5, "otsu", "p50"])
def test_nothing_is_nowhere(at):
    assert not mask_of(np.zeros((3, 5), np.float32), at).any()


@pytest.mark.parametrize("at", ["0.2", 0.2])
def test_thresholds_as_words(at):
    assert np.array_equal(mask_of(HEAT, at), fraction(HEAT, 0.2))
    assert np.array_equal(mask_of(HEAT, "p80"), percentile(HEAT, 80))


@pytest.mark.parametrize("at", [1.0, -0.1, "p100", "half", "", "nan"])
def test_thresholds_that_are_none(at):
    with pytest.raises(InputError, match="got"):
        mask_of(HEAT, at)


def test_components_by_hand():
    mask = np.array([[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 1]], bool)
    found = components(mask)
    # the diagonal is connected; the column is the largest
    assert found.areas == (3, 2, 1)
    assert found.boxes == (Box(5, 0, 6, 3), Box(0, 0, 2, 2), Box(3, 2, 4, 3))
    assert np.array_equal(found.mask(1), mask & (np.arange(6) < 2))


def test_equal_components_go_from_top_to_bottom():
    mask = np.zeros((3, 12), bool)
    mask[1, 0] = mask[0, 10] = mask[0, 4] = True
    assert [(box.x0, box.y0) for box in components(mask).boxes] == [(4, 0), (10, 0), (0, 1)]


@pytest.mark.parametrize("parts", [3, 7, 8, 40])
def test_few_components_and_many_are_measured_alike(parts):
    mask = np.zeros((9, 12 * parts), bool)
    for i in range(parts):
        mask[i % 3 : i % 3 + 1 + i % 5, 12 * i : 12 * i + 1 + i % 4] = True
    found = components(mask)
    sizes = [(1 + i % 5, 1 + i % 4) for i in range(parts)]
    order = sorted(range(parts), key=lambda i: (-sizes[i][0] * sizes[i][1], i % 3, i))
    assert found.areas == tuple(sizes[i][0] * sizes[i][1] for i in order)
    for place, i in enumerate(order):
        (height, width), top = sizes[i], i % 3
        assert found.boxes[place] == Box(12 * i, top, 12 * i + width, top + height)
        assert found.mask(place).sum() == found.areas[place]
        assert found.mask(place)[top, 12 * i]


def test_components_of_nothing():
    found = components(np.zeros((3, 5), bool))
    assert found.boxes == ()


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 12))))
def test_components_are_the_mask(mask):
    found = components(mask)
    parts = [found.mask(index) for index in range(len(found.boxes))]
    assert sum(found.areas) == mask.sum()
    assert np.array_equal(np.logical_or.reduce([np.zeros_like(mask), *parts]), mask)
    for box, part in zip(found.boxes, parts, strict=True):
        assert box == tight(part)


def test_rle_by_hand():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert rle.encode(mask) == {"size": [2, 3], "counts": [1, 4, 1]}
    assert rle.encode(~mask) == {"size": [2, 3], "counts": [0, 1, 4, 1]}


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools'
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 12))))
def test_rle_is_what_pycocotools_reads(mask):
    code = rle.encode(mask)
    assert np.array_equal(rle.decode(code), mask)
    assert np.array_equal(coco.decode(coco.frPyObjects(code, *code["size"])).astype(bool), mask)


def test_rle_that_does_not_fill_the_size():
    with pytest.raises(DataError, match="sum to 5, wanted 6"):
        rle.decode({"size": [2, 3], "counts": [5]})
