"""A saved run: a folder with ``model.safetensors`` and ``run.toml``, and no pickle in it."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import tomli_w
import torch

from whatwhere.classifiers.around import around
from whatwhere.classifiers.classifier import Activation, Classifier
from whatwhere.classifiers.distilled import DistilledHead
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.labels import Labels
from whatwhere.classifiers.weights import load_weights, read_weights, write_weights
from whatwhere.classifiers.zoo import build
from whatwhere.errors import DataError, InputError
from whatwhere.files import aside
from whatwhere.images import Preprocess, printable

_OWN = ("model", "preprocess", "labels", "thresholds", "trust", "distilled")
"""Tables that say how to build it."""
_MEASURED = ("measured", "by_class")
"""Tables that say how good it was: as it was saved, and not otherwise."""
WEIGHTS, DISTILLED, RUN = "model.safetensors", "distilled.safetensors", "run.toml"


def save(net: Classifier, folder: str | os.PathLike[str]) -> Path:
    """Write a classifier to a folder that ``load`` takes: weights, labels, preprocessing, split, what was measured.

    Only named networks can be built again from their name; others keep their own code.

    Raises:
        InputError: the classifier is around a module of yours, which has no name to build it by.
    """
    folder = Path(folder)
    try:
        again, _ = build(net.name, pretrained=False, num_classes=len(net.labels), **net.options)
    except InputError:
        raise InputError(f"only networks that have a name in a library can be saved, got {net.name!r}") from None
    state = net.network.state_dict()
    load_weights(again, state, net.name)
    run: dict[str, Any] = {
        "model": {"name": net.name, "activation": net.activation},
        "preprocess": asdict(net.preprocess),
        "labels": {"names": list(net.labels), "synonyms": [list(words) for words in net.labels.synonyms]},
    }
    if net.options:
        run["model"]["options"] = net.options
    if isinstance(net, HookedClassifier):
        run["model"]["layer"] = net.layer
    if net.thresholds:
        run["thresholds"] = net.thresholds
    if net.trusts:
        run["trust"] = {method: list(numbers) for method, numbers in net.trusts.items()}
    head = net.distilled
    if head is not None:
        run["distilled"] = {"layers": list(head.layers), "channels": list(head.channels), "width": head.width}
    run |= {key: told for key, told in net.about.items() if key not in run}
    folder.mkdir(parents=True, exist_ok=True)
    with aside(folder / RUN) as run_file:  # the last to be there, so that a run that has it is whole
        write_weights(folder / WEIGHTS, state)
        if head is not None:
            write_weights(folder / DISTILLED, head.state_dict())
        run_file.write_text(tomli_w.dumps(run), encoding="utf-8")
    return folder


def check_no_other(net: Classifier, folder: str | os.PathLike[str]) -> None:
    """Refuse to write a classifier over the run of another one, whose weights would be lost.

    Raises:
        InputError: the folder holds a run with other weights.
        DataError: it holds a run whose weights cannot be read.
    """
    folder = Path(folder)
    if not (folder / RUN).exists():
        return
    there, own = read_weights(folder / WEIGHTS), net.network.state_dict()
    if there.keys() != own.keys() or not all(torch.equal(there[name], own[name].cpu()) for name in own):
        raise InputError(f"{printable(folder)} holds the run of another model; choose another folder")


def load_run(
    folder: Path,
    *,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    activation: Activation | None = None,
    layer: str | None = None,
) -> Classifier:
    """The classifier in a folder that ``save`` wrote; what is given here stands in for what is there.

    With another layer, preprocessing or activation, nothing is said of how good it is.

    Raises:
        DataError: the folder is no saved run, or a damaged one.
    """
    name = printable(folder)
    try:
        run = tomllib.loads((folder / RUN).read_text(encoding="utf-8"))
        model, words = run["model"], run["labels"]
        settings: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in run["preprocess"].items()
        }
        preprocess = preprocess or Preprocess(**settings)
        labels = labels if labels is not None else Labels(words["names"], words["synonyms"])
        options = dict(model.get("options", {}))
        network, _ = build(model["name"], pretrained=False, num_classes=len(words["names"]), **options)
        activation = activation or model["activation"]
        if activation not in get_args(Activation):
            raise ValueError(f"activation = {activation!r}")
        thresholds = {str(method): float(share) for method, share in run.get("thresholds", {}).items()}
        head = DistilledHead(**run["distilled"]) if "distilled" in run else None
        trusts = {str(method): tuple(map(float, numbers)) for method, numbers in run.get("trust", {}).items()}
        if any(len(numbers) != 5 for numbers in trusts.values()):
            raise ValueError(f"trust = {trusts}, wanted four weights and a bias")
    except FileNotFoundError as error:
        raise DataError(f"{name}: not a saved run, it has no {RUN}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise DataError(f"{name}: its {RUN} is damaged: {error}") from error
    load_weights(network, read_weights(folder / WEIGHTS), name)
    net = around(
        network,
        name=model["name"],
        labels=labels,
        preprocess=preprocess,
        activation=activation,
        layer=layer or model.get("layer"),
    )
    net.options = options
    net.about = {key: told for key, told in run.items() if key not in _OWN}
    is_itself = layer in {None, model.get("layer")}
    if not is_itself or preprocess != Preprocess(**settings) or activation != model["activation"]:
        for key in _MEASURED:
            net.about.pop(key, None)
    if is_itself:
        net.thresholds, net.trusts = thresholds, trusts
        if head is not None:
            load_weights(head, read_weights(folder / DISTILLED), f"{name}/{DISTILLED}")
            net.distilled = head.eval()
    return net
