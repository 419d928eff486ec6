"""What goes home is what is seen."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import whatwhere
from whatwhere.regions.rle import decode
from whatwhere.server.view import as_coco, as_npy, as_png, at_threshold, reduced, shown


@pytest.fixture(scope="module")
def one(net, photos):
    (found,) = whatwhere.explain(net, photos[0])
    return found


def test_another_threshold_is_the_librarys(one, net, photos):
    (expected,) = whatwhere.explain(net, photos[0], threshold=0.6)
    moved = at_threshold(one, 0.6)
    assert moved.heat is one.heat
    assert moved.to_dict() == expected.to_dict()
    assert one.boxes != moved.boxes


def test_files_hold_the_map_and_the_regions(one):
    np.testing.assert_allclose(np.load(io.BytesIO(as_npy(one))), one.heat, atol=1e-6)
    assert (np.asarray(Image.open(io.BytesIO(as_png(shown(one, 0.5))))) == shown(one, 0.5)).all()
    found = json.loads(as_coco(one))
    masks = [decode(each["segmentation"]) for each in found["annotations"]]
    assert (sum(mask.astype(int) for mask in masks) == one.mask).all()
    for each, mask in zip(found["annotations"], masks, strict=True):
        x, y, w, h = map(int, each["bbox"])
        assert mask[y : y + h, x : x + w].sum() == each["area"] == mask.sum()


def test_nothing_is_laid_over_at_no_opacity(one):
    box = one.box
    inner = (slice(int(box.y0) + 20, int(box.y0) + 60), slice(int(box.x0) + 20, int(box.x0) + 60))
    grey = one.pixels @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(shown(one, 0.0)[inner], (one.pixels / 2 + grey[..., None] / 2)[inner], atol=1.5)


def test_a_picture_is_no_longer_than_webp_holds():
    assert reduced(np.zeros((1, 20_000, 3), np.uint8)).shape == (1, 16_383, 3)
    assert reduced(np.full((3, 5, 3), 7, np.uint8)).tolist() == np.full((3, 5, 3), 7).tolist()
