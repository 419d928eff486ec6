import json

import pytest
from typer.testing import CliRunner

import whatwhere
from whatwhere.apps.cli import app
from whatwhere.classifiers.around import around
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
