"""A folder of labelled pictures -> a saved run: the road of a training, cut off anywhere and taken up again."""

import csv
import io
import logging
import os
import platform
import shutil
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from whatwhere.classifiers.around import around
from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.saved import RUN, load_run, save
from whatwhere.classifiers.zoo import build
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, InputError, MissingExtraError
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.evaluation.run import calibrate
from whatwhere.files import aside, held
from whatwhere.images import printable
from whatwhere.reports.evaluation import write_evaluation
from whatwhere.training.data import Splits, drawing, looks, split_data
from whatwhere.training.light import FEATURES, features_of, fit_last_layer
from whatwhere.training.objective import measured
from whatwhere.training.recipe import Recipe, recipe_of

STARTED, STATE, METRICS, REPORT = "recipe.toml", "state", "metrics.csv", "report"

Watch = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much; of nothing, what is said is news."""


def train(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    layout: str | None = None,
    resume: bool = False,
    strict: bool = False,
    devices: int | str = "auto",
    accelerator: str = "auto",
    nodes: int = 1,
    watch: Watch = lambda what, done, total: None,
) -> Classifier:
    """Train a classifier on labelled pictures, and save it to a folder that ``load`` takes.

    Args:
        root: of the data set, as ``open_dataset`` takes it.
        out: folder of the run: ``model.safetensors``, ``run.toml`` with all that was told and measured,
            ``metrics.csv``, ``report/``. While it is going on, ``state/`` holds what it goes on from.
        recipe: what differs from the defaults; None with ``resume`` for that of the run.
        layout: of the data set; by default what the files look like.
        resume: go on with a training that was cut off; it ends as it would have. Begins one where there is none.
        strict: stop at what else would be left out and said: unreadable images, empty classes, duplicates.
        devices: as Lightning's Trainer takes it.
        accelerator: as Lightning's Trainer takes it.
        nodes: machines.
        watch: is told how far it is.

    Raises:
        InputError: the folder holds a run already; a recipe that does not go with the network.
        DataError: there is nothing to learn from; with ``strict``, something is odd.
        TrainingError: the loss is no number; the last good state is kept.
        MissingExtraError: full mode without Lightning.
    """
    root, out = Path(root), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    first = int(os.environ.get("LOCAL_RANK", "0")) + int(os.environ.get("NODE_RANK", "0")) == 0
    if not first:
        return _train(root, out, recipe or _started(out)[0], layout, strict, devices, accelerator, nodes, watch)
    with held(out / ".lock"):
        if (out / RUN).exists():
            if resume:
                return load_run(out)
            raise InputError(f"{printable(out)} holds a run already; choose another folder")
        if (out / STARTED).exists():
            if not resume:
                raise InputError(f"a training was begun in {printable(out)}; resume it, or choose another folder")
            recipe, root, layout = _taken_up(out, recipe, root, layout)
        else:
            recipe = recipe or Recipe()
            told = {"data": str(root.resolve()), "training": recipe.plain()} | ({"layout": layout} if layout else {})
            with aside(out / STARTED) as file:
                file.write_text(tomli_w.dumps(told), encoding="utf-8")
        try:
            return _train(root, out, recipe, layout, strict, devices, accelerator, nodes, watch)
        except (InputError, DataError):  # nothing has been done that could be taken up
            if not (out / STATE).exists():
                (out / STARTED).unlink()
            raise


def _started(out: Path) -> tuple[Recipe, Path, str | None]:
    try:
        told = tomllib.loads((out / STARTED).read_text(encoding="utf-8"))
        return recipe_of(told["training"]), Path(told["data"]), told.get("layout")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{printable(out / STARTED)}: damaged: {error}") from error


def _taken_up(out: Path, recipe: Recipe | None, root: Path, layout: str | None) -> tuple[Recipe, Path, str | None]:
    """What a training was begun with, which what is asked for now must not contradict."""
    old, data, before = _started(out)
    new = old if recipe is None else recipe
    different = [key for key, value in new.plain().items() if old.plain().get(key) != value]
    if different or root.resolve() != data or layout not in {None, before}:
        what = ", ".join(different) or ("the data set" if root.resolve() != data else "the layout")
        raise InputError(
            f"the training in {printable(out)} was begun with other settings: {what}; choose another folder"
        )
    return old, data, before


def _train(
    root: Path,
    out: Path,
    recipe: Recipe,
    layout: str | None,
    strict: bool,
    devices: int | str,
    accelerator: str,
    nodes: int,
    watch: Watch,
) -> Classifier:
    splits = split_data(root, recipe, layout=layout, strict=strict, seen=lambda n, of: watch("reading images", n, of))
    for note in splits.notes:
        watch(note, 0, 0)
    net = beginning(recipe, splits)
    state = out / STATE
    state.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    if recipe.mode == "light" or recipe.light_start:
        if accelerator != "cpu" and torch.cuda.is_available():
            net.network.to("cuda")
        rows = [_light(net, recipe, splits, state, watch)]
        net.network.to("cpu")
    if recipe.mode == "full":
        try:
            from whatwhere.training.full import fit_network
        except ImportError as error:
            raise MissingExtraError(f"full mode needs Lightning: pip install 'whatwhere[train]' ({error})") from error
        rows += fit_network(
            net, recipe, splits, out, devices=devices, accelerator=accelerator, nodes=nodes, watch=watch
        )
    return _finished(net, recipe, splits, root, out, rows, watch)


def beginning(recipe: Recipe, splits: Splits) -> Classifier:
    """The network as it is before training, with the data's classes.

    Raises:
        InputError: the recipe and the network do not go together.
        UnsupportedError: the network takes no other classes, or no other head.
    """
    from whatwhere.training.aids import AIDS

    k, labels, options = len(splits.labels), splits.labels, dict(recipe.options)
    unknown = [name for name in recipe.aids if name not in AIDS]
    if unknown:
        raise InputError(f"no aid is called {unknown[0]!r}; there are {', '.join(AIDS)}")
    if (told := options.pop("num_classes", k)) != k:
        raise InputError(f"the head has {told} classes and the data {k}; leave num_classes out")
    head = dict(recipe.head) or next((dict(AIDS[name].head) for name in recipe.aids if AIDS[name].head), {})
    if not head and (recipe.loss == "dense" or recipe.aids):
        head = {"pool": "mean"}
    folder = Path(recipe.model)
    with drawing(recipe.seed):
        if (folder / RUN).exists():
            old = load_run(folder)
            name, options = old.name, {**old.options, **options} | ({"head": head} if head else {})
            network, _ = build(name, pretrained=False, num_classes=k, **options)
            own = network.state_dict()
            fitting = {
                key: t for key, t in old.network.state_dict().items() if key in own and own[key].shape == t.shape
            }
            network.load_state_dict(fitting, strict=False)
            preprocess = old.preprocess
        else:
            name = recipe.model
            options |= {"head": head} if head else {}
            network, preprocess = build(name, pretrained=recipe.pretrained, num_classes=k, **options)
    if recipe.size is not None:
        preprocess = replace(preprocess, size=recipe.size)
    activation = "sigmoid" if splits.several else "softmax"
    net = around(network, name=name, labels=labels, preprocess=preprocess, activation=activation)  # type: ignore[arg-type]
    net.options = options
    return net


def _light(net: Classifier, recipe: Recipe, splits: Splits, state: Path, watch: Watch) -> dict[str, Any]:
    """Fit the last layer; a row of metrics."""
    features = features_of(net, splits.train, state / FEATURES, seen=lambda n, of: watch("computing features", n, of))
    choice = fit_last_layer(
        net,
        features,
        splits.train.targets(),
        decay=recipe.decay,
        adjustment=recipe.adjustment,
        seed=recipe.seed,
        seen=lambda n, of: watch("fitting the last layer", n, of),
    )
    row: dict[str, Any] = {"phase": "light", "decay": choice.decay}
    if choice.accuracy == choice.accuracy:
        row["cross_validation"] = round(choice.accuracy, 6)
    if splits.validation is not None:
        logits = torch.cat([net.logits(x.to(net.device)).cpu() for x in looks(splits.validation, net.preprocess, 16)])
        row["validation"] = measured(logits, splits.validation.targets(), net.activation)
    return row


def _finished(
    net: Classifier,
    recipe: Recipe,
    splits: Splits,
    root: Path,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    watch: Watch,
) -> Classifier:
    """Calibrate, measure, and write all down; run.toml comes last, and says that the run is whole."""
    if recipe.boxes is not None:
        watch("choosing thresholds", 0, 1)
        calibrate(net, open_dataset(recipe.boxes), recipe.methods)
    found: dict[str, float] = {}
    if splits.test is not None:
        watch("measuring", 0, 1)
        evaluation = evaluate(net, splits.test, plan_of(recipe.methods))
        write_evaluation(evaluation, net, splits.test, out / REPORT)
        found = {name: one.value for name, one in evaluation.classification.items()}
        for method in recipe.methods:
            found |= {f"{method} {name}": one.value for name, one in evaluation.where(method).items()}
        found = {name: float(value) for name, value in found.items() if value == value}
    write_metrics(out / METRICS, rows)
    net.about = {
        "training": recipe.plain(),
        "data": {
            "root": str(root.resolve()),
            "train": len(splits.train),
            "validation": 0 if splits.validation is None else len(splits.validation),
            "notes": splits.notes,
            "unreadable": sorted(splits.unreadable.values()),
        },
        "measured": ({"on": splits.test.name} if splits.test is not None else {}) | found,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("whatwhere", "torch", "torchvision", "timm")},
        },
    }
    save(net, out)
    shutil.rmtree(out / STATE)
    (out / STARTED).unlink()
    return net


def write_metrics(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of all that was measured on the way."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    with aside(file) as place:
        place.write_text(text.getvalue(), encoding="utf-8", newline="")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """A while in which Lightning does not advise."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torch\.optim\.lr_scheduler")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
