"""The classics in every command: trained, cut off, saved, loaded, explained, measured, compared, looked into."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import whatwhere
from whatwhere.apps.cli import app
from whatwhere.classifiers.labels import Labels
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.images import open_photo
from whatwhere.maps import METHODS
from whatwhere.scores import of_class
from whatwhere.training import fit
from whatwhere.training.data import split_data
from whatwhere.training.fit import beginning, train
from whatwhere.training.light import deciding, fit_last_layer, rotated
from whatwhere.training.recipe import Recipe

SIZE = (32, 48)
OPTIONS = {
    "linear": {},
    "color-histogram": {"bins": [4, 2, 3]},
    "hog": {"kernel": "chi2"},
    "visual-words": {"words": 12, "cell": 8, "colour": 1.0},
}


def recipe(name, test="", **given):
    return Recipe(model=name, options=OPTIONS[name], size=SIZE, validation=0.0, decay=1e-3, test=test, **given)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_run_is_a_model_like_any(name, figures, tmp_path):
    net = train(figures, tmp_path / "run", recipe(name))
    again, images = whatwhere.load(tmp_path / "run"), torch.rand(2, 3, *SIZE)
    assert torch.equal(again.logits(images), net.logits(images))
    test = open_dataset(figures, "test")
    (seen,) = whatwhere.explain(again, open_photo(test.samples[0].path), target="top1")
    assert (seen.size, seen.heat.shape) == ((44, 60), (44, 60))
    found = evaluate(again, test, plan_of(["gradcam", "hirescam", "layercam", "eigencam"], baselines=False))
    assert found.classification["top-1"].value == pytest.approx(1 if name != "linear" else 0.6, abs=0.25)
    # of linear heads both are what each cell adds, but for the factor of the mean
    assert found.agreement["gradcam", "hirescam"]["CC"].value == pytest.approx(1, abs=1e-4)


def test_the_commands_take_them(figures, tmp_path):
    run, photo = tmp_path / "run", str(next((figures / "test" / "disc").iterdir()))
    say = CliRunner()

    def said(*words):
        result = say.invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result

    net = train(figures, run, recipe("hog", test="test"))  # at the end it is measured, and a report written
    assert not net.about["data"]["notes"]
    assert net.about["measured"]["top-1"] > 0.7
    assert (run / "report" / "index.html").is_file()
    said("compare", run, figures, "--split", "test")
    said("explain", photo, "--model", run, "--json")
    said("inspect", run, photo, "--data", figures, "--pictures", 0, "--out", tmp_path / "inside")
    said("groups", run, figures, "--split", "test", "--out", tmp_path / "groups")


def test_a_dictionary_survives_an_interruption(figures, tmp_path, monkeypatch):
    whole = train(figures, tmp_path / "whole", recipe("visual-words"))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "_light", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(figures, tmp_path / "run", recipe("visual-words"))
    assert (tmp_path / "run" / "state" / "words.safetensors").exists()
    looked = []
    net = train(figures, tmp_path / "run", resume=True, watch=lambda what, done, total: looked.append(what))
    assert "looking for words" not in looked
    for one, other in zip(net.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # another run begins with the words of this one, unless its descriptors are others
    splits = split_data(figures, Recipe(validation=0.0, test=""))
    on = Recipe(model=str(tmp_path / "run"))
    assert torch.equal(beginning(on, splits).network.dictionary.words, net.network.dictionary.words)
    assert not beginning(replace(on, options={"radius": 6}), splits).network.dictionary.words.any()


def test_an_mlp_learns_in_full_mode(figures, tmp_path):
    options = {"hidden": [12]}
    with pytest.raises(InputError, match="full mode, --full"):
        train(figures, tmp_path / "run", Recipe(model="mlp", options=options))
    full = Recipe(
        model="mlp",
        mode="full",
        options=options,
        size=SIZE,
        epochs=2,
        batch=10,
        test="",
        workers=0,
        light_start=False,
    )
    net = train(figures, tmp_path / "run", full)
    again = whatwhere.load(tmp_path / "run")
    trace = again.trace(torch.rand(2, 3, *SIZE))
    assert torch.equal(trace.logits.detach(), net.logits(trace.images))
    assert METHODS["gradcam"](trace, of_class(1)).shape == (2, *SIZE)
    # light mode goes on from what has learned
    on = beginning(Recipe(model=str(tmp_path / "run")), split_data(figures, Recipe(validation=0.0, test="")))
    assert torch.equal(on.network.hidden[0].weight, net.network.hidden[0].weight)


def test_what_cannot_be_trained(figures, tmp_path):
    with pytest.raises(UnsupportedError, match="multiples of 8 pixels"):
        train(figures, tmp_path / "a", Recipe(model="color-histogram", size=(20, 48)))
    with pytest.raises(InputError, match=r"a kernel is one of linear, hellinger, chi2, got 'rbf'"):
        train(figures, tmp_path / "b", Recipe(model="hog", options={"kernel": "rbf"}, size=SIZE))
    with pytest.raises(InputError, match="does not take wrods"):
        train(figures, tmp_path / "c", Recipe(model="visual-words", options={"wrods": 4}))
    with pytest.raises(DataError, match="wants as many descriptors that differ"):
        train(figures, tmp_path / "d", Recipe(model="visual-words", options={"cell": 16}, size=SIZE))
    shutil.rmtree(figures / "train" / "disc")
    shutil.rmtree(figures / "train" / "square")
    with pytest.raises(DataError, match="at least two classes"):
        train(figures, tmp_path / "e", Recipe(model="linear"))
    with pytest.raises(InputError, match="no weights of its own"):
        whatwhere.load("visual-words")


def test_long_features_are_fitted_in_the_space_of_their_rows(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    targets = torch.eye(3)[torch.arange(12) % 3]
    features = torch.randn(12, 2, 60, generator=draw) + 2 * targets[:, None].repeat(1, 1, 20)
    read, rotation = rotated(features)
    assert read.shape[2] <= 24
    torch.testing.assert_close(read @ rotation.T, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(read.shape[2]), atol=1e-4, rtol=0)
    fitted = []
    for wide in (10, 1000):
        monkeypatch.setattr("whatwhere.training.light.WIDE", wide)
        network, preprocess = whatwhere.classifiers.zoo.build("linear", pretrained=False, num_classes=3, size=(4, 5))
        net = whatwhere.classifiers.around.around(network, labels=Labels(["a", "b", "c"]), preprocess=preprocess)
        fit_last_layer(net, features, targets, decay=1e-2)
        fitted.append(deciding(net.network))
    np.testing.assert_allclose(fitted[0].weight.detach(), fitted[1].weight.detach(), atol=5e-4)
    np.testing.assert_allclose(fitted[0].bias.detach(), fitted[1].bias.detach(), atol=5e-4)
