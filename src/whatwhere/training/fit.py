"""A folder of labelled pictures -> a saved run: the road of a training, cut off anywhere and taken up again."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.classic.named import SIZED
from whatwhere.classic.words import VisualWords
from whatwhere.classifiers.around import around
from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.huggingface import PREFIX, configuration
from whatwhere.classifiers.saved import RUN, load_run, save
from whatwhere.classifiers.zoo import UNTRAINED, build
from whatwhere.datasets import Dataset, open_dataset
from whatwhere.errors import InputError, MissingExtraError, WhatWhereError, settings_blamed
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.evaluation.run import calibrate
from whatwhere.files import held
from whatwhere.images import printable
from whatwhere.reports.card import per_class, write_card
from whatwhere.reports.evaluation import write_evaluation
from whatwhere.training.aids import AIDS
from whatwhere.training.bank import Grids, fit_bank, general_of, grids_of
from whatwhere.training.data import MANY, Splits, drawing, looks, split_data
from whatwhere.training.dictionary import WORDS, learn_words
from whatwhere.training.filters import FILTERS, initialize_filters
from whatwhere.training.folder import (
    METRICS,
    REPORT,
    STARTED,
    STATE,
    Task,
    Watch,
    absolute,
    begun,
    cleared,
    rank,
    same_data,
    unwatched,
    write_metrics,
)
from whatwhere.training.light import FEATURES, deciding, features_of, fit_last_layer
from whatwhere.training.objective import measured
from whatwhere.training.recipe import Recipe


def train(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    layout: str | None = None,
    resume: bool = False,
    strict: bool = False,
    devices: int | str = 1,
    accelerator: str = "auto",
    nodes: int = 1,
    watch: Watch = unwatched,
) -> Classifier:
    """Train a classifier on labelled pictures, and save it to a folder that ``load`` takes.

    Args:
        root: of the data set, as ``open_dataset`` takes it.
        out: folder of the run: ``model.safetensors``, ``run.toml`` with all that was told and measured,
            ``metrics.csv``, ``card.md``, ``report/``. While it is going on, ``state/`` holds what it goes on from.
        recipe: what differs from the defaults; None with ``resume`` for that of the run.
        layout: of the data set; by default what the files look like.
        resume: go on with a training that was cut off; it ends as it would have. With a recipe, begins one where
            there is none.
        strict: stop at what else would be left out and said: unreadable images, empty classes, duplicates.
        devices: as Lightning's Trainer takes it.
        accelerator: as Lightning's Trainer takes it.
        nodes: machines.
        watch: is told how far it is.

    Raises:
        InputError: the folder holds a run already; a recipe that does not go with the network.
        DataError: there is nothing to learn from; with ``strict``, something is odd.
        UnsupportedError: the network takes no other classes, no other head, or none of the aids.
        TrainingError: the loss is no number; the last good state is kept.
        MissingExtraError: full mode without Lightning.
        OSError: something cannot be written; the last state is kept.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    told = None if resume and recipe is None else absolute(Task(Path(root), recipe or Recipe(), layout))
    how = {"devices": devices, "accelerator": accelerator, "num_nodes": nodes}
    if rank():  # the first process has written it down before it started the others
        return _train(out, begun(out, told), strict, how, watch)
    with held(out / ".lock"):
        if (out / RUN).exists():
            if not resume:
                raise InputError(f"{printable(out)} holds a run already; choose another folder")
            cleared(out, whole=True)
            return load_run(out)
        cleared(out, whole=False)
        if (out / STARTED).exists() and not resume:
            raise InputError(f"a training was begun in {printable(out)}; resume it, or choose another folder")
        task = begun(out, told)
        try:
            return _train(out, task, strict, how, watch)
        except Exception:
            if not any((out / STATE).glob("*.safetensors")):  # nothing has been done that could be taken up
                cleared(out, whole=True)
            raise


def _train(out: Path, task: Task, strict: bool, how: Mapping[str, Any], watch: Watch) -> Classifier:
    recipe = task.recipe
    if recipe.mode == "full":
        try:
            from whatwhere.training.full import fit_network
        except ImportError as error:
            raise MissingExtraError(f"full mode needs Lightning: pip install 'whatwhere[train]' ({error})") from error
    plan_of(recipe.methods)  # what is wrong with these is said now, and not at the end
    boxed = None if recipe.boxes is None else open_dataset(recipe.boxes)
    if boxed is not None and not any(one.boxes or one.read_truth for one in boxed):
        raise InputError(f"{recipe.boxes}: wanted a data set with boxes or masks, and none of its pictures has any")
    splits = split_data(
        task.data, recipe, layout=task.layout, strict=strict, seen=lambda n, of: watch("reading images", n, of)
    )
    if (
        boxed is not None
        and splits.test is not None
        and {one.path for one in boxed} & {one.path for one in splits.test}
    ):
        splits.notes.append(f"thresholds are chosen on images of {splits.test.name}, which is measured at the end")
    recipe = resolved(recipe)
    fewest = int(splits.train.targets().sum(0).min())
    if recipe.mode == "full" and recipe.pretrained and splits.validation is None and fewest < MANY:
        splits.notes.append(
            f"a class has {fewest} images: below {MANY} light mode is often better, and nothing is held out to tell"
        )
    for note in splits.notes:
        watch(note, 0, 0)
    net = beginning(recipe, splits)
    state = out / STATE
    state.mkdir(exist_ok=True)
    same_data(out, splits.digest)
    rows: list[dict[str, Any]] = []
    with settings_blamed(f"device {how['accelerator']}"):
        net.network.to(_device(str(how["accelerator"])))
    if recipe.mode == "light" and isinstance(net.network, DflNet):
        rows += _light_bank(net, recipe, splits, state, watch)
    else:
        _begin_filters(net, recipe, splits, state, watch)
        _begin_words(net, recipe, splits, state, watch)
        if recipe.mode == "light" or recipe.light_start:
            rows.append(_light(net, recipe, splits, state, watch))
    net.network.to("cpu")
    if recipe.mode == "full":
        rows += fit_network(net, recipe, splits, out, rows, how, watch)
        if rank():
            return net
    return _finished(net, recipe, splits, boxed, task, out, rows, watch)


def _device(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what depends on other things of it said."""
    norm, frozen, select = recipe.frozen_norm, recipe.frozen, recipe.select
    pretrained = recipe.pretrained and recipe.model not in UNTRAINED
    if norm is None:
        norm = 1.0 if pretrained else 0.0
    if frozen is None:
        frozen = 0.25 if pretrained else 0.0
    if select is None:
        select = "accuracy" if recipe.boxes is None else "localization"
    aid = next((dict(AIDS[name].head) for name in recipe.aids if name in AIDS and AIDS[name].head), {})
    head = dict(recipe.head) or aid
    if not head and (recipe.loss == "dense" or recipe.aids):
        head = {"pool": "mean"}
    return replace(recipe, pretrained=pretrained, frozen_norm=norm, frozen=frozen, select=select, head=head)


def beginning(recipe: Recipe, splits: Splits) -> Classifier:
    """The network as it is before training, with the data's classes.

    Raises:
        InputError: the recipe and the network do not go together.
        UnsupportedError: the network takes no other classes, or no other head.
    """
    k, options = len(splits.labels), dict(recipe.options)
    unknown = [name for name in recipe.aids if name not in AIDS]
    if unknown:
        raise InputError(f"no aid is called {unknown[0]!r}; there are {', '.join(AIDS)}")
    losses = [name for name in recipe.aids if name in {"acol", "spg"}] + ["dense"] * (recipe.loss == "dense")
    if len(losses) > 1:
        raise InputError(f"each of {', '.join(losses)} is a loss of its own; choose one")
    if recipe.loss == "dense" and recipe.head.get("pool", "mean") != "mean":
        raise InputError(f"a dense loss trains cells whose mean is what the network says, not {recipe.head['pool']}")
    if (told := options.pop("num_classes", k)) != k:
        raise InputError(f"the head has {told} classes and the data {k}; leave num_classes out")
    if taken := {"pretrained", "name", "head"} & options.keys():
        raise InputError(f"{', '.join(sorted(taken))} is set by itself, not among options")
    head = {"head": recipe.head} if recipe.head else {}
    folder = Path(recipe.model)
    blamed = f"model = {recipe.model}, options = {options}, head = {recipe.head}"
    with drawing(recipe.seed), settings_blamed(blamed):
        if (folder / RUN).exists():
            old = load_run(folder)
            name, preprocess = old.name, old.preprocess
            options = {**old.options, **options, **_sized(name, recipe)} | head
            network, _ = build(name, pretrained=False, num_classes=k, **options)
            own, decide = network.state_dict(), {id(t) for t in _deciding_of(network)}
            new = {key for key, t in network.state_dict(keep_vars=True).items() if id(t) in decide}
            known = {
                key: t for key, t in old.network.state_dict().items() if key in own and own[key].shape == t.shape
            }
            if isinstance(network, VisualWords) and options != old.options:
                known = {key: t for key, t in known.items() if "dictionary" not in key}  # of other descriptors
            if list(old.labels) != list(splits.labels):
                known = {key: t for key, t in known.items() if key not in new}
            network.load_state_dict(known, strict=False)
        else:
            name, options = recipe.model, options | _sized(recipe.model, recipe) | head
            network, preprocess = build(name, pretrained=recipe.pretrained, num_classes=k, **options)
            if name.startswith(PREFIX):
                options |= configuration(network)
    if recipe.mode == "light" and name == "mlp" and not (folder / RUN).exists():
        raise InputError(
            "the hidden layers of an mlp learn in full mode, --full; light mode trains a last layer alone"
        )
    if isinstance(network, DflNet) and losses:
        raise InputError(f"a filter bank has a loss of its own, and so has {losses[0]}; choose one")
    if isinstance(network, DflNet):  # what is chosen today may be another layer tomorrow
        options["head"] = {**options["head"], "tap": network.tap.removeprefix("backbone.network.")}
    if recipe.size is not None:
        preprocess = replace(preprocess, size=recipe.size)
    net = around(
        network,
        name=name,
        labels=splits.labels,
        preprocess=preprocess,
        activation="sigmoid" if splits.multiple else "softmax",
    )
    net.options = options
    return net


def _sized(name: str, recipe: Recipe) -> dict[str, Any]:
    """The option of a network that is built for pictures of one size."""
    return {"size": list(recipe.size)} if name in SIZED and recipe.size is not None else {}


def _deciding_of(network: nn.Module) -> Iterator[Tensor]:
    """What is of the classes, and new where they are."""
    parts = (
        [deciding(network)]
        if not isinstance(network, DflNet)
        else [deciding(network.general), network.bank, network.patches]
    )
    for part in parts:
        yield from part.state_dict(keep_vars=True).values()


def _begin_filters(
    net: Classifier, recipe: Recipe, splits: Splits, state: Path, watch: Watch, grids: Grids | None = None
) -> None:
    """Give a filter bank something to begin with, but where it has learned already."""
    folder = Path(recipe.model)
    if recipe.filter_start == "random" or not isinstance(net.network, DflNet):
        return
    if (folder / RUN).exists():
        old = load_run(folder)
        same = isinstance(old.network, DflNet) and old.network.bank.weight.shape == net.network.bank.weight.shape
        if same and list(old.labels) == list(splits.labels):
            return
    initialize_filters(
        net,
        splits.train,
        state / FILTERS,
        unit=recipe.filter_start == "directions",
        seed=recipe.seed,
        read=None if grids is None else lambda index: grids.at(0, [index])[0],
        seen=lambda n, of: watch("finding patches to begin with", n, of),
    )


def _light_bank(net: Classifier, recipe: Recipe, splits: Splits, state: Path, watch: Watch) -> list[dict[str, Any]]:
    """Fit the last layer of G, and the filter bank beside it; rows of metrics."""
    grids = grids_of(
        net,
        splits.train,
        state / f"train-{rank()}",
        mirrored=recipe.flip,
        features=state / FEATURES if rank() == 0 else None,
        seen=lambda n, of: watch("computing grids", n, of),
    )
    _begin_filters(net, recipe, splits, state, watch, grids)
    rows = [_light(net, recipe, splits, state, watch)]
    held = None
    if splits.validation is not None:
        seen = grids_of(net, splits.validation, state / f"validation-{rank()}", mirrored=False)
        held = (seen, splits.validation.targets())
    return rows + fit_bank(
        net,
        grids,
        splits.train.targets(),
        recipe,
        held,
        seen=lambda n, of: watch("training the filter bank", n, of),
    )


def _begin_words(net: Classifier, recipe: Recipe, splits: Splits, state: Path, watch: Watch) -> None:
    """Learn the dictionary of a bag of words, but where it has one already."""
    if isinstance(net.network, VisualWords) and not net.network.dictionary.words.any():
        learn_words(
            net,
            splits.train,
            state / WORDS,
            seed=recipe.seed,
            seen=lambda n, of: watch("looking for words", n, of),
        )


def _light(net: Classifier, recipe: Recipe, splits: Splits, state: Path, watch: Watch) -> dict[str, Any]:
    """Fit the last layer; a row of metrics."""
    fitted = general_of(net) if isinstance(net.network, DflNet) else net
    features = features_of(
        fitted,
        splits.train,
        state / FEATURES if rank() == 0 else None,
        mirrored=recipe.flip,
        seen=lambda n, of: watch("computing features", n, of),
    )
    choice = fit_last_layer(
        fitted,
        features,
        splits.train.targets(),
        decay=recipe.decay,
        adjustment=recipe.adjustment,
        smoothing=recipe.smoothing if recipe.mode == "full" else 0.0,  # where the loop would take it at once
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
    boxed: Dataset | None,
    task: Task,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    watch: Watch,
) -> Classifier:
    """Calibrate, measure, and write all down; run.toml comes last, and says that the run is whole."""
    notes, found, by_class = list(splits.notes), dict[str, Any](), dict[str, Any]()
    try:
        if boxed is not None:
            watch("choosing thresholds", 0, 1)
            calibrate(net, boxed, recipe.methods)
        if splits.test is not None:
            watch("measuring", 0, 1)
            evaluation = evaluate(net, splits.test, plan_of(recipe.methods))
            write_evaluation(evaluation, net, splits.test, out / REPORT)
            found = {name: one.value for name, one in evaluation.classification.items()}
            by_class = per_class(evaluation, len(net.labels))
            for method in recipe.methods:
                found |= {f"{method} {name}": one.value for name, one in evaluation.where(method).items()}
    except WhatWhereError as error:  # the weights are worth more than what is measured of them
        notes.append(f"not measured: {error}")
        watch(notes[-1], 0, 0)
    write_metrics(out / METRICS, rows)
    net.about = {
        "training": replace(recipe, size=(net.preprocess.size[-2], net.preprocess.size[-1])).plain(),
        "data": {
            "root": str(task.data),
            "train": len(splits.train),
            "validation": 0 if splits.validation is None else len(splits.validation),
            "held_out": splits.share,
            "measured_is_validation": splits.test is not None
            and splits.validation is not None
            and {one.name for one in splits.validation.samples} <= {one.name for one in splits.test},
            "per_class": [int(count) for count in splits.train.targets().sum(0)],
            "notes": notes,
            "unreadable": [printable(why) for why in sorted(splits.unreadable.values())],
        }
        | ({"layout": task.layout} if task.layout else {}),
        "measured": ({"on": splits.test.name, "date": date.today().isoformat()} if splits.test is not None else {})
        | {name: float(value) for name, value in found.items() if value == value},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("whatwhere", "torch", "torchvision", "timm")},
            **({"lightning": version("lightning")} if recipe.mode == "full" else {}),
        },
    }
    if by_class:
        net.about["by_class"] = by_class
    write_card(net, out)
    save(net, out)
    cleared(out, whole=True)
    return net
