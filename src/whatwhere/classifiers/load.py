"""A name, a folder or a module -> a Classifier."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum

from whatwhere.classifiers.around import around
from whatwhere.classifiers.backbones import last_layer, renewed
from whatwhere.classifiers.classifier import Activation, Classifier
from whatwhere.classifiers.huggingface import PREFIX, configuration
from whatwhere.classifiers.onnxfile import load_onnx
from whatwhere.classifiers.saved import RUN, load_run
from whatwhere.classifiers.weights import fitting, load_weights, read_weights
from whatwhere.classifiers.zoo import EMBEDDED, build, weights_called, weights_labels, weights_name
from whatwhere.errors import DataError, InputError
from whatwhere.images import Preprocess, printable

CHECKPOINTS = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
"""What files of weights alone are called."""


@torch.inference_mode(False)
def load(
    model: str | os.PathLike[str] | nn.Module | WeightsEnum = EMBEDDED,
    *,
    layer: str | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    activation: Activation | None = None,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
) -> Classifier:
    """A classifier by name, from a folder, or around a module of yours.

    Args:
        model: ``"efficientnet-lite0"``, whose weights come with the install; ``"timm/NAME"`` or
            ``"torchvision/NAME"`` (a bare name is looked up in this order), with weights from their hub;
            torchvision's own weights, ``ResNet50_Weights.IMAGENET1K_V2``, in quotes or not, or
            ``"torchvision/resnet50.IMAGENET1K_V2"``; ``"hf:FOLDER"`` or ``"hf:NAME"``, an image classifier of
            transformers; the folder of a saved run; an ``.onnx`` file of ``whatwhere export``; or an ``nn.Module``
            that gives logits (b k).
        layer: split after this layer instead of the one that is found, as in ``named_modules()``.
        labels: class names, in the order of the logits.
        preprocess: how photos become input; by default what belongs to the weights, or ImageNet's.
        activation: "sigmoid" for any number of classes an image; by default "softmax", and "sigmoid" for
            a single logit.
        weights: a file of weights of your own for a named network, or for a module, which takes them: safetensors, a
            plain state dict, or a checkpoint of Lightning, whose ``model.`` or ``module.`` before the names is taken
            off. The network has as many classes as they have.
        pretrained: whether a named network without such a file gets weights from its hub or random ones.
        device: where to put the network; by default it stays where it is.

    Raises:
        InputError: no such name (with the three nearest), or labels that do not fit.
        DataError: weights that cannot be had or read.
        UnsupportedError: a module that cannot be split by itself; says what to pass.
    """
    if not isinstance(model, str | os.PathLike | nn.Module | WeightsEnum):
        raise InputError(f"a model is a name, a folder, a module or one of torchvision's weights, got {model!r}")
    if isinstance(model, WeightsEnum):
        model = weights_name(model)
    elif isinstance(model, str) and "_Weights." in model:
        model = weights_name(weights_called(model))
    if isinstance(model, nn.Module):
        if weights is not None:
            load_weights(model, fitting(read_weights(Path(weights)), model), type(model).__name__)
        net = around(model, labels=labels, preprocess=preprocess, activation=activation, layer=layer)
    elif Path(model).suffix == ".onnx":
        if any(given is not None for given in (layer, labels, preprocess, activation, weights, device)):
            raise InputError(f"{printable(model)} has all of its own; only a model that is built takes more")
        return load_onnx(Path(model))
    elif Path(model, RUN).exists():
        if weights is not None:
            raise InputError(f"a saved run has its own weights; got {printable(weights)} besides")
        net = load_run(Path(model), labels=labels, preprocess=preprocess, activation=activation, layer=layer)
    elif Path(model).suffix in CHECKPOINTS and Path(model).is_file():
        raise InputError(
            f"{printable(model)} has weights alone; name the network that they are of, and give it as weights"
        )
    elif Path(model).is_file():
        raise InputError(f"{printable(model)}: of files, those of whatwhere export --to onnx are loaded, *.onnx")
    else:
        name = os.fspath(model)
        options: dict[str, Any] = {}
        if weights is not None and labels is not None:
            options["num_classes"] = len(labels)
        if name.startswith(PREFIX) and preprocess is not None:
            options["preprocess"] = preprocess
        try:
            network, found = build(name, pretrained=pretrained and weights is None, **options)
        except InputError:
            if Path(name).is_dir():
                hint = f"; load one of transformers as {PREFIX}FOLDER" if Path(name, "config.json").exists() else ""
                raise DataError(f"{printable(name)}: not a saved run, it has no {RUN}{hint}") from None
            raise
        if weights is not None:
            network = _with_weights(network, Path(weights), name)
        preprocess = preprocess or found
        if labels is None and weights is None:
            labels = weights_labels(name)
        net = around(network, name=name, labels=labels, preprocess=preprocess, activation=activation, layer=layer)
        net.options = configuration(network) if name.startswith(PREFIX) else {}
    if device is not None:
        try:
            net.network.to(device)
            if net.distilled is not None:
                net.distilled.to(device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(f"no device {str(device)!r} here: {str(error).splitlines()[0]}") from error
    return net


def _with_weights(network: nn.Module, file: Path, name: str) -> nn.Module:
    """A named network with the weights of a file, and as many classes as they have."""
    weights, last = fitting(read_weights(file), network), last_layer(network)
    theirs, own = (found.get(f"{last}.weight") for found in (weights, network.state_dict()))
    if theirs is not None and own is not None and len(theirs) != len(own) and theirs.shape[1:] == own.shape[1:]:
        network = renewed(network, len(theirs)).eval()
    load_weights(network, weights, f"{printable(file)} for {name}")
    return network
