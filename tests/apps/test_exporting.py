import json
import pickle

import pytest
import torch
from PIL import Image
from scenes import boxed_scene, gap_net, plain, scene
from typer.testing import CliRunner

import whatwhere
from whatwhere.annotate.looking import SMALL, settings_for
from whatwhere.apps.cli import app
from whatwhere.classifiers.around import around
from whatwhere.classifiers.exported import export
from whatwhere.classifiers.zoo import build

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def model(tmp_path):
    network, preprocess = build("lenet5", pretrained=False, num_classes=3)
    return whatwhere.save(around(network, name="lenet5", preprocess=preprocess), tmp_path / "run")


def test_a_model_is_written_and_what_was_compared_is_printed(model, tmp_path):
    result = run("export", model, "--to", "pt2", "--uint8", "--features", "--out", tmp_path / "model.pt2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all("logits" in line and "features" in line for line in lines)
    assert json.loads((tmp_path / "model.pt2.json").read_text())["outputs"] == ["logits", "features"]


def test_what_has_no_class_maps_is_refused_by_name(model, tmp_path):
    result = run("export", model, "--out", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "--features" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module", params=["float", "int8"])
def exported(request, tmp_path_factory):
    """A small network as an ONNX file, and a data set of its classes."""
    root = tmp_path_factory.mktemp("exported")
    (root / "data" / "test" / "a").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(scene(i, (45, 65))[0]).save(root / "data" / "test" / "a" / f"{i}.png")
    net = whatwhere.load(gap_net(), preprocess=plain((24, 40)), labels=list("abcde"))
    given = root / "data" if request.param == "int8" else None
    export(net, root / "model.onnx", threshold=0.3, int8=given)
    return net, root


def test_a_file_is_evaluated(exported):
    _, root = exported
    result = run("evaluate", root / "model.onnx", root / "data")
    assert result.exit_code == 0, result.stderr
    assert "top-1" in result.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_annotates(workers, exported, tmp_path):
    pytest.importorskip("pyarrow")
    net, root = exported
    words = ("annotate", root / "data", "--model", root / "model.onnx", "--out", tmp_path / "out")
    result = run(*words, "--workers", workers, "--min-trust", "0")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "coco" / "instances.json").read_text())
    assert len(found["images"]) == 3
    names = {one["id"]: one["name"] for one in found["categories"]}
    said = {names[one["category_id"]] for one in found["annotations"]}
    assert said <= {one.label for (one,) in whatwhere.explain(net, sorted((root / "data").rglob("*.png")))}


def test_no_other_engine_is_chosen_for_a_file(exported, tmp_path):
    _, root = exported
    again = whatwhere.load(root / "model.onnx")
    assert settings_for(again, images=SMALL).backend == "torch"
    result = run(
        "annotate", root / "data", "--model", root / "model.onnx", "--out", tmp_path, "--backend", "openvino"
    )
    assert result.exit_code == 2
    assert "choose no other engine" in result.stderr


def test_a_file_goes_to_another_machine(exported):
    _, root = exported
    net = whatwhere.load(root / "model.onnx")
    images = torch.rand(2, 3, 24, 40)
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again.logits(images), net.logits(images))


def test_integers_are_said(tmp_path):
    network, preprocess = build("lenet5", pretrained=False, num_classes=3)
    model = whatwhere.save(around(network, name="lenet5", preprocess=preprocess), tmp_path / "run")
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        boxed_scene(tmp_path / "pictures", f"{i}.png", i, (45, 65))
    words = ("export", model, "--features", "--int8", tmp_path / "pictures", "--out", tmp_path / "model.onnx")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "int8 from 1 pictures" in result.stdout
    assert "of 1 pictures" in result.stdout
    result = run("export", model, "--features", "--int8", tmp_path / "none", "--out", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "none: wanted a folder of pictures" in result.stderr
