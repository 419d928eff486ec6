"""A graph of 8-bit integers says about what the float one says; what cannot be quantized leaves no file."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image
from scenes import gap_net, plain, scene

import whatwhere
from whatwhere.classifiers.exported import export, runner
from whatwhere.classifiers.int8 import agreement_of, correlation_of, pictures_in
from whatwhere.errors import DataError, InputError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZE = (24, 40)


def small():
    return whatwhere.load(gap_net(), preprocess=replace(plain(SIZE), interpolation="bicubic"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures of two shapes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        Image.fromarray(scene(i, (45 + i % 2, 65))[0]).save(root / f"{i:02}.png")
    return root


@pytest.mark.parametrize(("to", "suffix"), [("onnx", "onnx"), ("openvino", "xml")])
@pytest.mark.parametrize("uint8", [False, True])
def test_it_says_about_the_same(to, suffix, uint8, folder, tmp_path):
    if to == "openvino":
        pytest.importorskip("openvino")
    net, files = small(), [tmp_path / f"{name}.{suffix}" for name in ("float", "int8")]
    own, wrote = (
        export(net, file, to, threshold=0.4, uint8=uint8, box=uint8, int8=given)
        for file, given in zip(files, (None, folder), strict=True)
    )
    assert own.quantized is None
    found = wrote.quantized
    assert (found.calibrated, found.compared) == (8, 3)
    assert found.is_close
    weights = [file.with_suffix(".bin") for file in files]
    sizes = [sum(one.stat().st_size for one in pair if one.is_file()) for pair in zip(files, weights, strict=True)]
    assert [found.before, found.after] == pytest.approx(sizes, rel=0.02)  # what was measured goes into the file too
    pictures = pictures_in(folder, net.preprocess, uint8)
    said = [[run(pictures.read(one)) for one in pictures.compared] for run in map(runner, files)]
    assert agreement_of(*said) == found.agreement
    assert correlation_of(*said) == pytest.approx(found.correlation, abs=1e-6)
    differences = [np.abs(one[0] - other[0]).max() for one, other in zip(*said, strict=True)]
    assert 0 < max(differences) < 0.1 * np.abs([one[0] for one in said[0]]).max()
    meta = json.loads(wrote.sidecar.read_text())
    assert meta["int8"]["agreement"] == found.agreement
    assert meta["digest"] != own.meta["digest"]


def test_the_network_is_of_integers_and_nothing_else(folder, tmp_path):
    wrote = export(small(), tmp_path / "model.onnx", threshold=0.4, uint8=True, box=True, int8=folder)
    graph = onnx.load(wrote.file).graph
    made_by = {output: node for node in graph.node for output in node.output}
    kinds = {one.name: one.data_type for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv":
            images, weight = (made_by[name] for name in node.input[:2])
            assert images.op_type == weight.op_type == "DequantizeLinear"
            assert kinds[weight.input[0]] == onnx.TensorProto.INT8
        if node.op_type in {"MatMul", "Sub", "Div"}:  # of pixels and boxes
            assert not {made_by[name].op_type for name in node.input if name in made_by} & {"DequantizeLinear"}
    assert made_by["logits"].op_type == "Add"
    assert whatwhere.load(wrote.file).thresholds == {}


def test_numbers_by_hand():
    maps = np.zeros((1, 2, 2, 3), np.float32)
    maps[0, 1] = [[1, 2, 3], [4, 5, 6]]
    one, turned, flat = ([np.array([[0.0, 1.0]]), again] for again in (maps, -maps, np.zeros_like(maps)))
    assert correlation_of([one, one], [[one[0], 3 * maps + 1], turned]) == pytest.approx((1 - 1) / 2)
    assert correlation_of([one], [flat]) == 0
    assert correlation_of([flat], [flat]) == 1
    assert agreement_of([one, one, one], [one, [np.array([[1.0, 0.0]])], one]) == pytest.approx(2 / 3)


def test_pictures_are_of_the_whole_folder_and_apart(tmp_path):
    for i in range(600):
        (tmp_path / f"{i:03}.png").touch()
    found = pictures_in(tmp_path, plain(SIZE), uint8=True)
    assert not set(found.calibrated) & set(found.compared)
    chosen = sorted(int(file.stem) for file in (*found.calibrated, *found.compared))
    assert len(chosen) == 256
    assert (chosen[0], chosen[-1]) == (0, 599)
    assert set(np.diff(chosen)) == {2, 3}


def test_one_picture_is_both(tmp_path):
    Image.fromarray(scene(0)[0]).save(tmp_path / "one.png")
    found = export(small(), tmp_path / "model.onnx", threshold=0.4, int8=tmp_path).quantized
    assert (found.calibrated, found.compared) == (1, 1)


@pytest.mark.parametrize(
    ("to", "pictures", "error", "said"),
    [
        ("model.onnx", None, InputError, "wanted a folder of pictures"),
        ("model.onnx", {}, DataError, "no image files"),
        ("model.onnx", {"a.png": b"nothing", "b.png": b"nothing"}, DataError, r"[ab]\.png: not an image"),
        ("model.pt2", {}, InputError, "onnx and openvino"),
    ],
)
def test_what_cannot_be_quantized_leaves_what_was_there(to, pictures, error, said, tmp_path):
    given, out = tmp_path / "pictures", tmp_path / "out"
    out.mkdir()
    (out / to).write_text("before")
    if pictures is not None:
        given.mkdir()
        for name, data in pictures.items():
            (given / name).write_bytes(data)
    with pytest.raises(error, match=said):
        export(small(), out / to, to.split(".")[1], threshold=0.4, int8=given)
    assert [file.name for file in out.iterdir()] == [to]
    assert (out / to).read_text() == "before"
