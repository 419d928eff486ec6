"""An exported file says what the classifier says, in an engine of its own; what cannot be exported leaves no file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import bank_net, deep_head_net, gap_net, plain
from timm.models.vision_transformer import VisionTransformer

import whatwhere
from whatwhere.classifiers import exported
from whatwhere.classifiers.exported import export, photographs, runner
from whatwhere.classifiers.graph import Pixels, box_of
from whatwhere.classifiers.heads import Head, Headed
from whatwhere.errors import DataError, InputError, UnsupportedError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZE = (24, 40)
SUFFIX = {"onnx": "onnx", "openvino": "xml", "pt2": "pt2"}


def small(network=None, **given):
    return whatwhere.load(network or gap_net(), preprocess=replace(plain(SIZE), interpolation="bicubic", **given))


def small_vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small network as an ONNX file of pixels with a box."""
    net = small()
    file = tmp_path_factory.mktemp("made") / "model.onnx"
    return net, export(net, file, threshold=0.4, uint8=True, box=True)


@pytest.mark.parametrize("to", ["onnx", "openvino", "pt2"])
@pytest.mark.parametrize("size", [SIZE, (31, 50)])
def test_a_file_says_what_the_network_says(to, size, tmp_path):
    if to == "openvino":
        pytest.importorskip("openvino")
    net = small()
    wrote = export(net, tmp_path / f"model.{SUFFIX[to]}", to, threshold=0.3)
    assert wrote.meta["any_size"]
    run = runner(wrote.file)
    for count in (1, 3):
        images = torch.randn(count, 3, *size)
        trace = net.trace(images)
        logits, maps = run(images.numpy())
        np.testing.assert_allclose(logits, trace.logits.detach(), atol=1e-4)
        np.testing.assert_allclose(maps, net.class_maps(trace), atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(60, 33), (24, 40), (17, 90)])
def test_pixels_of_any_size_give_the_box_that_explain_gives(made, count, size):
    net, wrote = made
    photos = [np.array(Image.fromarray(one.pixels).resize(size[::-1])) for one in photographs()[:count]]
    logits, maps, boxes = runner(wrote.file)(np.stack(photos))
    assert maps.shape == (count, 5, 6, 10)
    for pixels, said, box in zip(photos, logits, boxes, strict=True):
        (one,) = whatwhere.explain(net, pixels, method="cam", threshold=0.4)
        assert said.argmax() == one.index
        np.testing.assert_allclose(
            said, net.logits(net.preprocess(whatwhere.open_photo(pixels))[0][None])[0], atol=0.05
        )
        if one.mask.any():
            rows, columns = np.nonzero(one.heat > 0.4 * one.heat.max())
            np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1.01)


@pytest.mark.parametrize("fit", ["whole", "crop", "letterbox"])
@pytest.mark.parametrize("filter_", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(70, 41), (9, 30)])
def test_pixels_are_resized_as_pillow_resizes_them(fit, filter_, size):
    preprocess = replace(plain(SIZE), interpolation=filter_, fit=fit)
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted, frame = preprocess(whatwhere.open_photo(pixels))
    with torch.no_grad():
        got, rows, columns = Pixels(preprocess)(torch.from_numpy(pixels)[None])
    np.testing.assert_allclose(got[0], wanted, atol=(0 if filter_ == "nearest" else 1.5) / 255 + 1e-6)
    assert (float(columns.placed), float(rows.placed)) == (frame.placed.x0, frame.placed.y0)
    assert (float(columns.seen), float(rows.seen)) == pytest.approx((frame.seen.x0, frame.seen.y0), abs=1e-4)


def test_the_box_by_hand():
    maps = torch.full((2, 2, 3, 5), -1.0)
    maps[0, 1, 1, 3], maps[0, 1, 0, 0] = 1.0, 0.6  # two parts: the box is around both
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # and the second image's best map is nowhere positive
    down, across = torch.eye(3), torch.eye(5)
    assert box_of(logits, maps, down, across, 0.5).tolist() == [[0, 0, 4, 2], [0, 0, 0, 0]]
    assert box_of(logits, maps, down, across, 0.7).tolist() == [[3, 1, 4, 2], [0, 0, 0, 0]]


def test_the_metadata_is_all_that_an_example_needs(made):
    net, wrote = made
    session = onnxruntime.InferenceSession(wrote.file)
    meta = json.loads(session.get_modelmeta().custom_metadata_map["whatwhere"])
    assert meta == json.loads(wrote.sidecar.read_text()) == json.loads(json.dumps(wrote.meta))
    assert meta["labels"] == list(net.labels)
    assert (meta["threshold"], meta["preprocess"]["size"]) == (0.4, list(SIZE))
    assert [output.name for output in session.get_outputs()] == ["logits", "maps", "box"]
    assert session.get_inputs()[0].shape[0] == "batch"


@pytest.mark.parametrize("method", ["cam", "gradcam"])
@pytest.mark.parametrize("uint8", [False, True])
def test_a_file_is_a_classifier_again(method, uint8, made, tmp_path):
    net = made[0]
    file = made[1].file if uint8 else export(net, tmp_path / "model.onnx", threshold=0.4).file
    again = whatwhere.load(file)
    assert list(again.labels) == list(net.labels)
    photo = photographs()[1]
    wanted, got = (
        whatwhere.explain(one, photo, target="class 2", method=method, threshold=0.4) for one in (net, again)
    )
    assert got[0].probability == pytest.approx(wanted[0].probability, abs=1e-4)
    assert got[0].box == wanted[0].box
    np.testing.assert_allclose(got[0].heat, wanted[0].heat, atol=1e-3)
    (seen,) = whatwhere.explain(again, photo, target="class 2", preset="balanced")
    assert len(seen.looks) == (1 if uint8 else 2)  # pixels are resized to the network's size in any case
    with pytest.raises(UnsupportedError, match="is a file"):
        whatwhere.explain(again, photo, method="fullgrad")
    with pytest.raises(UnsupportedError, match="export it again"):
        again.at("3")
    with pytest.raises(UnsupportedError, match="export the model that it was made from"):
        export(again, tmp_path / "again.onnx", threshold=0.4)


@pytest.mark.parametrize("network", [deep_head_net, small_vit, bank_net])
def test_without_the_linear_law_there_are_features_or_nothing(network, tmp_path):
    net = small(network())
    with pytest.raises(UnsupportedError, match="--features"):
        export(net, tmp_path / "model.onnx", threshold=0.3)
    assert not list(tmp_path.iterdir())
    wrote = export(net, tmp_path / "model.onnx", threshold=0.3, features=True, uint8=True)
    picture = photographs()[0].pixels[None, :30, :50]
    logits, features = runner(wrote.file)(np.ascontiguousarray(picture))
    with torch.no_grad():
        trace = net.trace(Pixels(net.preprocess)(torch.tensor(picture))[0])
    np.testing.assert_allclose(logits, trace.logits.detach(), atol=1e-4)
    np.testing.assert_allclose(features, trace.features.detach(), atol=1e-4)
    with pytest.raises(UnsupportedError, match="no class maps"):
        whatwhere.load(wrote.file)


def test_a_head_of_the_package(tmp_path):
    net = small(Headed(gap_net()[:5], torch.nn.Identity(), Head(12, 5)))
    wrote = export(net, tmp_path / "model.pt2", "pt2", threshold=0.3)
    assert wrote.meta["outputs"] == ["logits", "maps"]


def test_what_says_something_else_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    true = exported.runner
    monkeypatch.setattr(exported, "runner", lambda file: lambda images: [o + 1e-2 for o in true(file)(images)])
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(UnsupportedError, match=r"other logits: .* differ from PyTorch's by"):
        export(small(), tmp_path / "model.pt2", "pt2", threshold=0.3)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


@pytest.mark.parametrize(
    ("file", "to", "options", "said"),
    [
        ("model.bin", "onnx", {}, r"ends with \.onnx"),
        ("none/model.onnx", "onnx", {}, "no such folder"),
        ("model.onnx", "onnx", {"threshold": 1.0}, r"in \[0, 1\)"),
        ("model.onnx", "onnx", {"box": True, "features": True}, "choose one"),
    ],
)
def test_wrong_arguments(file, to, options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        export(small(), tmp_path / file, to, **{"threshold": 0.3, **options})
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_no_models(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        whatwhere.load(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a file of whatwhere export"):
        whatwhere.load(tmp_path / "model.onnx")
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(InputError, match=r"those of whatwhere export --to onnx are loaded"):
        whatwhere.load(tmp_path / "model.xml")
    with pytest.raises(InputError, match="has all of its own"):
        whatwhere.load(tmp_path / "model.onnx", labels=["a"])
