import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from scenes import plain, red_net

import whatwhere
from whatwhere.errors import InputError
from whatwhere.reports.page import write_report
from whatwhere.reports.picture import overlay


@pytest.fixture(scope="module")
def red():
    """Two explanations of a red rectangle at rows 10 to 30, columns 20 to 60 of 80 x 120 pixels."""
    net = whatwhere.load(red_net(), preprocess=plain((80, 120)), labels=["blue", "red <b>& hot</b>"])
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[10:30, 20:60, 0] = 255
    pixels[70:80, 100:120, 2] = 255
    return whatwhere.explain(net, pixels, target=[1, 0])


def test_the_box_is_drawn_where_it_is(red):
    picture = np.asarray(whatwhere.draw(red[0], side=120, opacity=0))
    panel = picture[:80, 126:246]  # beside the picture of 120 pixels and a gap of 6
    white = (panel == 255).all(2)
    rows, columns = np.nonzero(white)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (11, 29, 21, 59)
    assert not white[15:25, 26:54].any(), "an outline, not a filled box"


def test_there_is_a_panel_for_the_picture_and_each_explanation(red):
    assert whatwhere.draw(red, side=240).size == (3 * 240 + 2 * 6, 160 + 28)


def test_the_map_is_warm_where_it_speaks(red):
    colours = overlay(red[0], opacity=1)
    inside, outside = colours[20, 40].astype(int), colours[50, 90].astype(int)
    assert inside[0] > inside[2], "red rather than blue"
    assert outside[2] > outside[0]


def test_what_was_not_seen_is_dark(photos, net):
    cropped = whatwhere.Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, fit="crop")
    seen = whatwhere.explain(whatwhere.load(preprocess=cropped), photos[0])[0]
    colours = overlay(seen)
    assert colours[:, : int(seen.frame.seen.x0) - 1].max() <= 85


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_written(red, tmp_path, suffix):
    whatwhere.draw(red, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as picture:
        assert picture.size == (3 * 480 + 12, 348)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"colormap": "turbot"}, "nearest: turbo"), ({"opacity": 2}, "opacity"), ({"side": 1}, "side")],
)
def test_wrong_options(red, options, message):
    with pytest.raises(InputError, match=message):
        whatwhere.draw(red, **options)


def test_a_suffix_that_is_no_format(red, tmp_path):
    with pytest.raises(InputError, match=r"\.png, \.jpg"):
        whatwhere.draw(red, tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_several_images_are_several_pictures(red):
    other = whatwhere.explain(whatwhere.load(red_net(), preprocess=plain((80, 120))), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(InputError, match="one image"):
        whatwhere.draw([*red, *other])
    with pytest.raises(InputError, match="one image"):
        whatwhere.draw([])


def test_extreme_shapes_are_drawn(red):
    net = whatwhere.load(red_net(), preprocess=plain((80, 120)))
    for size in ((1, 1), (1, 3000), (3000, 1)):
        whatwhere.draw(whatwhere.explain(net, np.full((*size, 3), (255, 0, 0), np.uint8), target=1))


def test_the_page_is_self_contained(red, tmp_path):
    page = write_report([red, red], tmp_path / "out", "a <model>")
    text = page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == ["image-2.png", "image.png", "index.html"]
    assert "a &lt;model&gt;" in text
    assert "red &lt;b&gt;&amp; hot&lt;/b&gt;" in text
    assert "20 10 60 30" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 2
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (3 * 480 + 12, 348)


def test_a_page_of_nothing_says_so(tmp_path):
    assert "No image could be read" in write_report([], tmp_path, "x").read_text()


def test_names_that_no_page_can_show(red, tmp_path):
    odd = [whatwhere.Explanation(**{**vars_of(red[0]), "source": "/a/b\udcff"})]
    assert write_report([odd], tmp_path, "x").is_file()


def vars_of(one):
    return {name: getattr(one, name) for name in one.__dataclass_fields__}
