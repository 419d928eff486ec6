"""A name, a folder or a module -> a Classifier."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from whatwhere.classifiers.around import around
from whatwhere.classifiers.classifier import Activation, Classifier
from whatwhere.classifiers.huggingface import PREFIX, configuration
from whatwhere.classifiers.onnxfile import load_onnx
from whatwhere.classifiers.saved import RUN, load_run
from whatwhere.classifiers.weights import load_weights, read_weights
from whatwhere.classifiers.zoo import EMBEDDED, build
from whatwhere.errors import DataError, InputError
from whatwhere.images import Preprocess, printable


@torch.inference_mode(False)
def load(
    model: str | os.PathLike[str] | nn.Module = EMBEDDED,
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
            ``"hf:FOLDER"`` or ``"hf:NAME"``, an image classifier of transformers; the folder of a saved run; an ``.onnx`` file of ``whatwhere export``; or an ``nn.Module`` that gives
            logits (b k).
        layer: split after this layer instead of the one that is found, as in ``named_modules()``.
        labels: class names, in the order of the logits.
        preprocess: how photos become input; by default what belongs to the weights, or ImageNet's.
        activation: "sigmoid" for any number of classes an image; by default "softmax", and "sigmoid" for
            a single logit.
        weights: a file of weights of your own for a named network, safetensors or a plain state dict; with
            ``labels``, of a network of so many classes.
        pretrained: whether a named network without such a file gets weights from its hub or random ones.
        device: where to put the network; by default it stays where it is.

    Raises:
        InputError: no such name (with the three nearest), or labels that do not fit.
        DataError: weights that cannot be had or read.
        UnsupportedError: a module that cannot be split by itself; says what to pass.
    """
    if isinstance(model, nn.Module):
        if weights is not None:
            raise InputError("weights go with a name; load them into a module before passing it")
        net = around(model, labels=labels, preprocess=preprocess, activation=activation, layer=layer)
    elif Path(model).suffix == ".onnx":
        if any(given is not None for given in (layer, labels, preprocess, activation, weights, device)):
            raise InputError(f"{printable(model)} has all of its own; only a model that is built takes more")
        return load_onnx(Path(model))
    elif Path(model, RUN).exists():
        if weights is not None:
            raise InputError(f"a saved run has its own weights; got {printable(weights)} besides")
        net = load_run(Path(model), labels=labels, preprocess=preprocess, activation=activation, layer=layer)
    else:
        name = os.fspath(model)
        classes = None if weights is None or labels is None else len(labels)
        told = {"preprocess": preprocess} if name.startswith(PREFIX) and preprocess is not None else {}
        try:
            network, found = build(name, pretrained=pretrained and weights is None, num_classes=classes, **told)
        except InputError:
            if Path(name).is_dir():
                hint = f"; load one of transformers as {PREFIX}FOLDER" if Path(name, "config.json").exists() else ""
                raise DataError(f"{printable(name)}: not a saved run, it has no {RUN}{hint}") from None
            raise
        if weights is not None:
            load_weights(network, read_weights(Path(weights)), name)
        preprocess = preprocess or found
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
