import sys

import numpy as np
import pytest
from PIL import Image
from scenes import plain, red_net, scene

import whatwhere
from whatwhere.annotate.run import annotate
from whatwhere.errors import InputError, MissingExtraError
from whatwhere.reports import fiftyone as written

SIZE = (90, 130)


@pytest.fixture
def red():
    return whatwhere.load(red_net(), labels=["blue", "red"], preprocess=plain(SIZE))


@pytest.fixture
def picture(tmp_path):
    pixels, mask = scene(1, SIZE)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "one.png")
    return tmp_path / "pictures" / "one.png", mask


def pasted(detection):
    """The mask where the detection says that it is, on the whole picture, from shares of it."""
    x, y, w, h = detection.bounding_box
    whole, inside = np.zeros(SIZE, bool), np.asarray(detection.mask, bool)
    x0, y0 = round(x * SIZE[1]), round(y * SIZE[0])
    assert inside.shape == (round(h * SIZE[0]), round(w * SIZE[1]))
    whole[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
    return whole


def test_a_sample_is_what_was_explained(red, picture, monkeypatch):
    pytest.importorskip("fiftyone", reason="needs FiftyOne: pip install 'whatwhere[fiftyone]'")
    path, mask = picture
    seen = whatwhere.explain(red, path, target=["red", "blue"])
    made = written.sample(seen)
    assert made.filepath == str(path)
    assert (made.metadata.width, made.metadata.height) == (130, 90)
    assert [one.label for one in made.classes.classifications] == ["red", "blue"]
    assert made.classes.classifications[0].confidence == seen[0].probability
    reds = [one for one in made.where.detections if one.label == "red"]
    assert len(reds) == len(seen[0].boxes)
    assert (np.any([pasted(one) for one in reds], 0) == seen[0].mask).all()
    assert (pasted(reds[0]) & mask).sum() > 0.9 * mask.sum()
    x, y, w, h = reds[0].bounding_box
    assert np.allclose([x * 130, y * 90, (x + w) * 130, (y + h) * 90], seen[0].box.to_list())
    assert (reds[0].trust, reds[0].confidence) == (seen[0].trust, seen[0].probability)
    assert np.allclose(made.heat.map, seen[0].heat)
    assert np.allclose(made.heat_2.map, seen[1].heat)
    assert (made.heat.label, made.heat.range) == ("red", [0, 1])


def test_samples_of_annotations(red, picture, tmp_path):
    pytest.importorskip("fiftyone", reason="needs FiftyOne: pip install 'whatwhere[fiftyone]'")
    path, mask = picture
    (path.parent / "broken.png").write_bytes(b"no picture")
    annotate(red, str(path.parent), tmp_path / "labels", workers=1)
    (made,) = written.samples(tmp_path / "labels")
    assert made.filepath == str(path)
    assert [one.label for one in made.classes.classifications] == ["red"]
    assert (pasted(made.where.detections[0]) & mask).sum() > 0.9 * mask.sum()
    (none,) = written.samples(tmp_path / "labels", min_trust=1.0)
    assert not none.where.detections


def test_of_one_picture_at_a_time(red, picture):
    seen = whatwhere.explain(red, [picture[0], scene(2, SIZE)[0]])
    for wrong in ([], [one for several in seen for one in several]):
        with pytest.raises(InputError, match="explanations of one picture"):
            written.sample(wrong)


def test_without_fiftyone_the_extra_is_named(red, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(MissingExtraError, match=r"whatwhere\[fiftyone\]"):
        written.sample(whatwhere.explain(red, picture[0]))
