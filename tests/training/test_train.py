"""A folder in, a run out: what is in it, that it says where, and that it can be cut off anywhere."""

import csv
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from training.conftest import write

import whatwhere
from whatwhere.classifiers import weights as weights_room
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, InputError, TrainingError, UnsupportedError
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.training import full
from whatwhere.training.checkpoints import PlainCheckpoints
from whatwhere.training.fit import train
from whatwhere.training.loop import Fitting
from whatwhere.training.recipe import Recipe

LENET = Recipe(
    model="lenet5",
    mode="full",
    options={"norm": "batch"},
    size=(44, 60),
    epochs=4,
    batch=8,
    lr=3e-3,
    backbone_lr=1.0,
    layer_decay=1.0,
    frozen_norm=0.5,
    light_start=False,
    smoothing=0.0,
    crop=0.8,
    ema=0.8,
)


def differing(**given):
    return Recipe(**{**LENET.__dict__, **given})


def weights(folder):
    return load_file(folder / "model.safetensors")


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_light_run(figures, tmp_path):
    heard = []
    net = train(figures, tmp_path / "run", Recipe(size=(64, 96)), watch=lambda *what: heard.append(what))
    files = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert files == {"model.safetensors", "run.toml", "metrics.csv", "card.md", "report"}
    assert (tmp_path / "run/report/index.html").stat().st_size > 3000
    assert ("computing features", 30, 30) in heard
    told = tomllib.loads((tmp_path / "run/run.toml").read_text())
    assert told["training"]["size"] == [64, 96]
    assert told["labels"]["names"] == ["disc", "square", "stripes"]
    assert told["measured"]["top-1"] >= 0.6
    assert set(told["versions"]) == {"python", "whatwhere", "torch", "torchvision", "timm"}
    again = whatwhere.load(tmp_path / "run")
    (seen,) = whatwhere.explain(again, figures / "test/disc/000.png", target="disc")
    assert seen.heat.shape == (44, 60)
    assert again.about["training"] == net.about["training"]
    whatwhere.save(again, tmp_path / "copy")
    assert tomllib.loads((tmp_path / "copy/run.toml").read_text()) == told
    # the same again, from the run's own file
    from whatwhere.training.recipe import read_recipe

    train(figures, tmp_path / "again", read_recipe(tmp_path / "run/run.toml"))
    assert same(tmp_path / "run", tmp_path / "again")


def test_a_small_network_learns_and_says_where(tmp_path):
    """From scratch and labels alone: the map is on the figure."""
    write(tmp_path / "data/train", {"disc": 40, "square": 40, "stripes": 40})
    write(tmp_path / "data/test", {"disc": 10, "square": 10, "stripes": 10}, seed=500)
    recipe = differing(
        epochs=12, batch=16, head={"pool": "lse", "order": "linear-pool"}, frozen_norm=0.0, ema=0.0, crop=0.6
    )
    net = train(tmp_path / "data", tmp_path / "run", recipe)
    assert net.about["measured"]["top-1"] >= 0.7
    rows = metrics(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == list(range(12))
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_run_that_was_cut_off_ends_as_it_would_have(epoch, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "SAVED_EVERY", 0.0)
    recipe = differing(validation=0.2, aids=("cutmix",), mixup=0.2, augment="trivial", workers=0)
    values = {epoch: 0.1 * epoch for epoch in range(4)}  # so that the last epoch is the best
    monkeypatch.setattr(full.Keeper, "_chosen", lambda self, row: values[row["epoch"]])
    train(figures, tmp_path / "whole", recipe)
    step = Fitting.training_step

    def cut(self, batch, number):
        if (self.current_epoch, number) == (epoch, 1):
            raise Killed
        return step(self, batch, number)

    monkeypatch.setattr(Fitting, "training_step", cut)
    with pytest.raises(Killed):
        train(figures, tmp_path / "cut", recipe)
    monkeypatch.setattr(Fitting, "training_step", step)
    torch.rand(7)
    with pytest.raises(InputError, match="resume"):
        train(figures, tmp_path / "cut", recipe)
    with pytest.raises(InputError, match="other settings: lr"):
        train(figures, tmp_path / "cut", Recipe(**{**recipe.__dict__, "lr": 0.1}), resume=True)
    train(figures, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "cut/metrics.csv").read_text()
    # once it is whole, resuming does nothing
    before = (tmp_path / "cut/model.safetensors").stat().st_mtime_ns
    train(figures, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut/model.safetensors").stat().st_mtime_ns == before


def test_a_process_that_is_killed(figures, tmp_path):
    """With kill -9, somewhere; and two at once are refused."""
    code = f"""
import time
import torch; torch.set_num_threads(1)  # as here: sums in another order are other sums
from whatwhere.training import full
from whatwhere.training.fit import train
from whatwhere.training.recipe import recipe_of
full.SAVED_EVERY = 0.0
def watch(what, done, total):
    print(what, done, flush=True)
    if (what, done) == ("training", 45):
        time.sleep(600)  # it is not to come to its end before it is killed
train({str(figures)!r}, {str(tmp_path / "run")!r}, recipe_of({differing(epochs=20).plain()!r}), resume=True,
      watch=watch)
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if line == "training 20\n":
            break
    with pytest.raises(InputError, match="another process"):
        train(figures, tmp_path / "run", resume=True)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert (tmp_path / "run/state/checkpoint.safetensors").exists()
    train(figures, tmp_path / "run", resume=True)
    train(figures, tmp_path / "whole", differing(epochs=20))
    assert same(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "SAVED_EVERY", 0.0)
    loss = Fitting.loss
    monkeypatch.setattr(
        Fitting, "loss", lambda self, *args: loss(self, *args) * (float("nan") if self.current_epoch == 2 else 1)
    )
    with pytest.raises(TrainingError, match="nan at step 6 of epoch 2"):
        train(figures, tmp_path / "run", LENET)
    state = PlainCheckpoints().load_checkpoint(tmp_path / "run/state/checkpoint.safetensors")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_out_of_memory_halves_the_batch(figures, tmp_path, monkeypatch):
    step, said = Fitting.training_step, []

    def hungry(self, batch, number):
        if len(batch[0]) > 4 and self.current_epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch, number)

    monkeypatch.setattr(Fitting, "training_step", hungry)
    train(figures, tmp_path / "run", LENET, watch=lambda what, done, total: total or said.append(what))
    assert said == ["out of memory: 4 images go through at once, 2 times a step"]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 4


def test_other_errors_are_not_taken_for_memory(figures, tmp_path, monkeypatch):
    def broken(self, batch, number):
        raise RuntimeError("something else")

    monkeypatch.setattr(Fitting, "training_step", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(figures, tmp_path / "run", LENET)


def test_the_best_epoch_is_kept_and_patience_ends(figures, tmp_path, monkeypatch):
    values = iter([0.4, 0.8, 0.5, 0.6, 0.7, 0.9])
    monkeypatch.setattr(full, "measured", lambda *_: next(values))
    average, kept = [], Fitting.on_train_epoch_start
    monkeypatch.setattr(
        Fitting,
        "on_train_epoch_start",
        lambda self: (average.append({k: v.clone() for k, v in self.average.state_dict().items()}), kept(self))[1],
    )
    train(figures, tmp_path / "run", differing(epochs=6, validation=0.2, patience=2))
    rows = metrics(tmp_path / "run")
    assert [float(row["validation"]) for row in rows] == [0.4, 0.8, 0.5, 0.6]
    best = average[2]  # as epoch 2 began, epoch 1 had ended
    assert all(torch.equal(best[key], value) for key, value in weights(tmp_path / "run").items())


def test_localization_chooses_the_epoch_and_thresholds(figures, tmp_path):
    rows = ["path,class,x0,y0,x1,y1"]
    rows += [f"test/{name}/00{i}.png,{name},20,10,40,34" for name in ("disc", "square", "stripes") for i in range(3)]
    (figures / "boxes.csv").write_text("\n".join(rows))
    recipe = differing(epochs=2, select="localization", boxes=str(figures), methods=("gradcam", "layercam"))
    net = train(figures, tmp_path / "run", recipe)
    assert set(net.thresholds) == {"gradcam", "layercam"}
    assert whatwhere.load(tmp_path / "run").thresholds == net.thresholds
    found = [float(row["localization"]) for row in metrics(tmp_path / "run")]
    again = evaluate(net, open_dataset(figures), plan_of(["gradcam"], baselines=False))
    assert again.where("gradcam")["MaxBoxAccV2"].value == pytest.approx(max(found), abs=1e-6)


@pytest.mark.parametrize("aid", ["has", "adl", "acol", "spg"])
def test_every_aid_trains_a_run(aid, figures, tmp_path):
    net = train(figures, tmp_path / "run", differing(epochs=1, aids=(aid,), light_start=True, decay=1e-3))
    again = whatwhere.load(tmp_path / "run")
    images = torch.randn(2, 3, 44, 60)
    assert torch.equal(again.logits(images), net.logits(images))


def test_a_dense_run(figures, tmp_path):
    net = train(figures, tmp_path / "run", differing(epochs=2, loss="dense"))
    assert net.linear_law(torch.randn(1, 3, 44, 60)) < 1e-4


def test_a_run_goes_on_from_another_with_other_classes(figures, tmp_path):
    write(tmp_path / "pairs/train", {"disc": 4, "stripes": 4})
    train(figures, tmp_path / "first", differing(epochs=2))
    net = train(
        tmp_path / "pairs", tmp_path / "second", Recipe(model=str(tmp_path / "first"), mode="light", decay=1e-3)
    )
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert list(net.labels) == ["disc", "stripes"]
    assert torch.equal(first["grid.0.weight"], second["grid.0.weight"])
    assert first["head.4.weight"].shape != second["head.4.weight"].shape
    assert net.preprocess.size == (44, 60)


def test_tensorboard_is_written(figures, tmp_path):
    pytest.importorskip("tensorboard")
    train(figures, tmp_path / "run", differing(epochs=1, log="tensorboard"))
    assert list((tmp_path / "run/tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aids": ("sedatives",)}, "has, cutmix"),
        ({"aids": ("acol", "spg")}, "acol, spg is a loss of its own"),
        ({"aids": ("has",), "aid_options": {"has": {"grids": 3}}}, r"aid_options\.has"),
        ({"aids": ("adl",), "aid_options": {"adl": {"layers": ["nope"]}}}, r"aid_options\.adl"),
        ({"loss": "dense", "head": {"pool": "max"}}, "cells whose mean"),
        ({"options": {"num_classes": 7}}, "7 classes and the data 3"),
        ({"options": {"pretrained": True}}, "pretrained is set by itself"),
        ({"options": {"norms": "batch"}}, "does not take norms"),
        ({"options": {"stride": 8}}, "head of ours"),
        ({"head": {"pools": "mean"}}, "pool, order"),
        ({"head": {"units": -1}}, "units"),
        ({"head": {"dropout": 2}}, "dropout"),
        ({"model": "resnet9000"}, "nearest"),
        ({"methods": ("divination",)}, "nearest"),
        ({"boxes": "/nope", "select": None}, "no such file"),
        ({"precision": "vague"}, "precision vague"),
        ({"size": (8, 8)}, "does not run"),
    ],
)
def test_recipes_that_do_not_go_with_the_network(given, message, figures, tmp_path):
    with pytest.raises(whatwhere.WhatWhereError, match=message):
        train(figures, tmp_path / "run", differing(**given))
    # nothing is left that would stand in the way of the next attempt
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}


def test_heads_whose_last_layer_is_not_the_last_word(figures, tmp_path):
    squeezed = Recipe(model="torchvision/squeezenet1_1", pretrained=False, size=(64, 96))
    with pytest.raises(UnsupportedError, match="head of ours"):
        train(figures, tmp_path / "run", squeezed)


def test_nothing_to_resume(figures, tmp_path):
    with pytest.raises(InputError, match="no training"):
        train(figures, tmp_path / "run", resume=True)


def stopped(monkeypatch, figures, out, recipe, error, epoch=1):
    """A training that is stopped in an epoch by an error."""
    monkeypatch.setattr(full, "SAVED_EVERY", 0.0)
    step = Fitting.training_step

    def cut(self, batch, number):
        if self.current_epoch == epoch:
            raise error
        return step(self, batch, number)

    monkeypatch.setattr(Fitting, "training_step", cut)
    with pytest.raises(type(error)):
        train(figures, out, recipe)
    monkeypatch.setattr(Fitting, "training_step", step)


def test_ctrl_c_is_an_interruption_that_can_be_taken_up(figures, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stopped(monkeypatch, figures, tmp_path / "run", LENET, KeyboardInterrupt())
    assert signal.getsignal(signal.SIGINT) is before
    (tmp_path / "run/.whatwhere-left").mkdir()
    train(figures, tmp_path / "run", resume=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {
        "model.safetensors",
        "run.toml",
        "metrics.csv",
        "card.md",
        "report",
    }


def test_a_full_disk_keeps_the_state_before(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "SAVED_EVERY", 0.0)
    written = []

    def full_disk(tensors, place, metadata=None):
        written.append(place)
        if len(written) == 2:
            raise safetensors.SafetensorError("I/O error: No space left on device")
        save_file(tensors, place, metadata)

    monkeypatch.setattr(weights_room, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(figures, tmp_path / "run", LENET)
    train(figures, tmp_path / "run", resume=True)
    train(figures, tmp_path / "whole", LENET)
    assert same(tmp_path / "run", tmp_path / "whole")


def test_other_pictures_are_another_training(figures, tmp_path, monkeypatch):
    stopped(monkeypatch, figures, tmp_path / "run", LENET, RuntimeError("stop"))
    write(figures / "train", {"disc": 11})
    with pytest.raises(DataError, match="pictures are not those"):
        train(figures, tmp_path / "run", resume=True)


def test_what_light_mode_found_is_there_to_be_surpassed(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "measured", lambda *_: -1.0)
    recipe = differing(validation=0.2, light_start=True, epochs=1)
    train(figures, tmp_path / "full", recipe)
    train(figures, tmp_path / "light", Recipe(**{**recipe.__dict__, "mode": "light", "smoothing": 0.0}))
    assert same(tmp_path / "full", tmp_path / "light")


def test_weights_that_are_no_numbers_are_not_kept(figures, tmp_path):
    with pytest.raises(TrainingError, match=r"no number|nan|inf"):
        train(figures, tmp_path / "run", differing(lr=1e30))


def test_a_finished_run_is_not_written_over(figures, tmp_path):
    train(figures, tmp_path / "run", differing(epochs=1))
    with pytest.raises(InputError, match="holds a run already"):
        train(figures, tmp_path / "run", differing(epochs=1))


def test_a_state_is_plain_and_whole_or_not_there(tmp_path):
    state = {
        "epoch": 3,
        "tensors": {"a": torch.arange(6).reshape(2, 3).T, 7: torch.tensor(1.5)},
        "list": [1, (2.5, None, "x", True)],
        "empty": {},
    }
    keep = PlainCheckpoints()
    keep.save_checkpoint(state, tmp_path / "state")
    again = keep.load_checkpoint(tmp_path / "state")
    assert torch.equal(again["tensors"]["a"], state["tensors"]["a"])
    assert again["tensors"][7] == 1.5
    assert again["list"] == state["list"]
    assert (again["epoch"], again["empty"]) == (3, {})
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(TypeError, match="object"):
        keep.save_checkpoint({"odd": object()}, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    (tmp_path / "state").write_bytes(before[:40])
    with pytest.raises(DataError, match="go on from"):
        keep.load_checkpoint(tmp_path / "state")


def test_a_process_takes_time_to_be_found_gone(tmp_path):
    """A lock of a process that is gone holds nobody up."""
    from whatwhere.files import held

    code = f"""
import pathlib, time
from whatwhere.files import held
with held(pathlib.Path({str(tmp_path / "lock")!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    running.stdout.readline()
    with pytest.raises(InputError, match="another process"), held(tmp_path / "lock"):
        pass
    running.kill()
    running.wait()
    running.stdout.close()
    for _ in range(50):
        try:
            with held(tmp_path / "lock"):
                return
        except InputError:
            time.sleep(0.1)
    raise AssertionError("still held")


def test_full_mode_with_a_few_images_says_that_light_mode_may_be_better(figures, tmp_path):
    heard = []
    recipe = Recipe(mode="full", epochs=1, size=(64, 96), batch=4)
    train(figures, tmp_path / "run", recipe, watch=lambda what, *_: heard.append(what))
    assert any("light mode is often better" in what for what in heard)


def test_the_card_says_what_the_run_holds(figures, tmp_path):
    net = train(figures, tmp_path / "run", Recipe(size=(64, 96)))
    by_class, text = net.about["by_class"], (tmp_path / "run/card.md").read_text()
    assert by_class["shown"] == [3, 3, 3]
    truth = open_dataset(figures, "test")
    said = [whatwhere.explain(net, sample.path)[0].index for sample in truth]
    real = [net.labels.find(truth.classes[sample.labels[0]]) for sample in truth]
    right = [sum(a == b == k for a, b in zip(said, real, strict=True)) for k in range(3)]
    assert by_class["right"] == right
    for name, count in zip(net.labels, right, strict=True):
        assert f"| {name} | 10 | 3 | {count} | {100 * count / 3:.1f} |" in text
    wrong = [(a, b) for a, b in zip(real, said, strict=True) if a != b]
    assert {(a, b): n for a, b, n in by_class["confused"]} == {pair: wrong.count(pair) for pair in wrong}
    assert whatwhere.load(tmp_path / "run").about["by_class"] == by_class
