import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from whatwhere.errors import DataError, InputError
from whatwhere.images import Preprocess, image_files, open_photo, printable

RAMP = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)  # H != W


def test_pixels_of_a_png_are_its_pixels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    assert np.array_equal(photo.pixels, RAMP)
    assert photo.size == (5, 4)
    assert photo.source == str(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)  # red in the upper left corner
    upright[:8, -8:] = (0, 255, 0)  # green in the upper right
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    photo = open_photo(tmp_path / "a.jpg")
    assert photo.size == (40, 64)
    assert np.abs(photo.pixels.astype(int) - upright).mean() < 3


def save(path: Path, mode: str) -> None:
    if mode == "16-bit":
        Image.fromarray(np.array([[0, 257, 65535], [32896, 65535, 0]], np.uint16)).save(path)
    elif mode == "float":
        Image.fromarray(np.array([[0, 1 / 255, 1], [128 / 255, 1, 0]], np.float32)).save(path)
    elif mode in {"RGBA", "LA"}:
        image = Image.new(mode, (3, 2), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.save(path)
    elif mode == "palette with transparency":
        image = Image.new("P", (3, 2), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        image.save(path, transparency=1)
    else:
        image = Image.new("RGB", (3, 2))
        image.putpixel((1, 0), (255, 255, 255))
        # uncompressed, some versions of Pillow do not read what they wrote
        image.convert(mode).save(path, **({"compression": "tiff_lzw"} if mode == "YCbCr" else {}))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("P", "png"),
        ("L", "png"),
        ("1", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("palette with transparency", "png"),
        ("CMYK", "tif"),
        ("YCbCr", "tif"),
        ("LAB", "tif"),
    ],
)
def test_modes(tmp_path, mode, suffix):
    save(tmp_path / f"a.{suffix}", mode)
    pixels = open_photo(tmp_path / f"a.{suffix}").pixels
    expected = np.zeros((2, 3, 3), np.uint8)
    expected[0, 1] = 255  # white, or transparent on white
    assert pixels.shape == (2, 3, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(("mode", "suffix"), [("16-bit", "png"), ("16-bit", "tif"), ("float", "tif")])
def test_deep_modes_keep_their_range(tmp_path, mode, suffix):
    save(tmp_path / f"a.{suffix}", mode)
    pixels = open_photo(tmp_path / f"a.{suffix}").pixels
    assert pixels[..., 0].tolist() == [[0, 1, 255], [128, 255, 0]]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        pixels = open_photo(tmp_path / name).pixels
        assert pixels.reshape(-1, 3).tolist() == [[255, 0, 0]] * 24, name


@pytest.mark.parametrize(
    "name", ["köln 東京.png", "a\nb.png", "-rf.png", "[red]x[/].png", "'; drop.png", b"\xff\xfe.png"]
)
def test_odd_names(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    try:
        Image.fromarray(RAMP).save(path, "PNG")
    except OSError:
        pytest.skip("this file system does not take the name")
    photo = open_photo(path)
    assert photo.source.isprintable()
    photo.source.encode("utf-8")


def jpeg(path: Path) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)).save(path, "JPEG")
    return path.read_bytes()


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "x.jpg"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "truncated header":
        path.write_bytes(jpeg(path)[:60])
    elif kind == "truncated body":
        path.write_bytes(jpeg(path)[:2000])
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "too long":
        return tmp_path / ("x" * 5000)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file"),
        ("directory", "directory"),
        ("empty", "empty"),
        ("text", "not an image"),
        ("fifo", "not a regular file"),
        ("truncated header", "Truncated"),
        ("truncated body", "truncated"),
        ("loop", "symbolic links"),
        ("too long", "too long"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(DataError, match=reason) as caught:
        open_photo(path)
    assert printable(path) in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded_and_taken_when_asked_for(tmp_path):
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="3000 x 2000 pixels are more than the bound of 5000"):
        open_photo(tmp_path / "bomb.png", max_pixels=5000)
    bound = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 5000
    try:
        assert open_photo(tmp_path / "bomb.png").size == (2000, 3000)
        assert Image.MAX_IMAGE_PIXELS == 5000
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def test_broken_exif_does_not_lose_the_picture(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*garbage")
    assert np.array_equal(open_photo(tmp_path / "a.png").pixels, RAMP)


def test_arrays_and_pil_images_are_taken():
    assert np.array_equal(open_photo(RAMP).pixels, RAMP)
    assert open_photo(RAMP[..., 0]).pixels.shape == (5, 4, 3)
    assert open_photo(Image.fromarray(RAMP).convert("L")).pixels.shape == (5, 4, 3)
    clear = np.dstack([RAMP, np.zeros((5, 4), np.uint8)])
    assert open_photo(clear).pixels.min() == 255


@pytest.mark.parametrize("bad", [RAMP.astype(float), RAMP[None], RAMP[:0], np.zeros((4, 5, 2), np.uint8)])
def test_things_that_are_no_images_are_refused(bad):
    with pytest.raises(InputError, match="got"):
        open_photo(bad)


def test_image_files_are_found_below_a_folder(tmp_path):
    for name in (
        "b.JPG",
        "a.png",
        "sub/c.webp",
        ".hidden/d.png",
        ".e.png",
        "notes.txt",
        "paper.pdf",
        "film.mpg",
        "plot.eps",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert found == ["a.png", "b.JPG", "sub/c.webp"]


def test_preprocess_by_hand():
    pixels = np.full((4, 6, 3), (0, 51, 255), np.uint8)
    tensor, frame = Preprocess(size=(2, 3), mean=(0.5, 0.2, 0), std=(0.5, 1, 2))(open_photo(pixels))
    assert frame.seen.to_list() == [0, 0, 6, 4]
    torch.testing.assert_close(tensor, torch.tensor([-1.0, 0, 0.5])[:, None, None].expand(3, 2, 3))


def test_preprocess_crop_equals_cutting_first():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8)
    whole = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "size": (20, 20)}
    cropped, frame = Preprocess(**whole, fit="crop", crop_fraction=0.5)(open_photo(pixels))
    assert frame.seen.to_list() == [40, 10, 60, 30]
    torch.testing.assert_close(cropped, Preprocess(**whole)(open_photo(pixels[10:30, 40:60]))[0])


def test_preprocess_letterbox_pads_with_the_mean():
    tensor, frame = Preprocess(size=(20, 20), fit="letterbox")(open_photo(np.full((10, 40, 3), 255, np.uint8)))
    assert frame.placed.to_list() == [0, 7, 20, 12]
    assert tensor[:, :7].eq(0).all()
    assert tensor[:, 12:].eq(0).all()
    assert tensor[:, 7:12].gt(2).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["whole", "crop", "letterbox"])
def test_extreme_shapes_pass(size, fit):
    tensor, _ = Preprocess(fit=fit)(open_photo(np.full((*size, 3), 9, np.uint8)))
    assert tensor.shape == (3, 224, 224)
    assert tensor.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_fraction": 2.0},
        {"size": (0, 5)},
        {"std": (float("nan"), 1, 1)},
        {"interpolation": "cubic"},
        {"mean": (0.5,)},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_preprocess_says_what_it_takes(wrong):
    with pytest.raises(InputError, match="got"):
        Preprocess(**wrong)


@pytest.mark.parametrize("seed", range(3))
def test_damage_of_any_kind_is_an_error_of_ours(tmp_path, seed):
    """Bytes flipped at random in files of every format that is written here."""
    draw = np.random.default_rng(seed)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "ico", "tga", "avif", "jp2"):
        path = tmp_path / f"a.{suffix}"
        try:
            Image.fromarray(draw.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
        except (KeyError, OSError, ValueError):  # a format that this Pillow was built without
            continue
        whole = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            for place in draw.integers(0, min(len(damaged), 300), 4):
                damaged[place] = draw.integers(0, 256)
            path.write_bytes(damaged[: draw.integers(1, len(damaged) + 1)])
            with warnings.catch_warnings(), suppress(DataError):
                warnings.simplefilter("ignore")
                assert open_photo(path, max_pixels=10**6).pixels.ndim == 3


def test_a_header_that_is_no_number(tmp_path):
    (tmp_path / "bad.ppm").write_bytes(b"P6\nabc")
    with pytest.raises(DataError, match=r"bad\.ppm"):
        open_photo(tmp_path / "bad.ppm")
