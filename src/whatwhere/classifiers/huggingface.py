"""Image classifiers of Hugging Face's transformers: a folder or a hub's name -> a network and its preprocessing."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import logits_of
from whatwhere.errors import DataError, UnsupportedError, WhatWhereError, extra
from whatwhere.images import Preprocess, printable

PREFIX = "hf:"
_SIDE, _BAR = 1024, 256
"""Pixels of the pictures that an image processor is asked about, and of a bar in the middle, which no crop cuts."""


def transformers_network(
    name: str, pretrained: bool, *, config: str | None = None, preprocess: Preprocess | None = None
) -> tuple[nn.Module, Preprocess]:
    """An image classifier in evaluation mode, and how photos become its input.

    Args:
        name: "hf:" and a folder of ``save_pretrained``, of model and image processor, or a name on the hub.
        pretrained: whether it gets its weights or random ones.
        config: what ``configuration`` has said of the network; then neither folder nor hub is asked.
        preprocess: instead of what the image processor does.

    Raises:
        DataError: no such folder, something in it is missing or damaged, or its weights are of another network.
        UnsupportedError: it is no image classifier, or its image processor does what ``Preprocess`` cannot.
        MissingExtraError: transformers is not installed.
    """
    with extra("hf", name):
        transformers: Any = importlib.import_module("transformers")
    where = name.removeprefix(PREFIX)
    nowhere = not where or Path(where).exists() or where.count("/") > 1 or where[0] in "./~"  # no name on the hub
    if config is None and nowhere and not Path(where or "?").is_dir():
        raise DataError(f"{printable(name)}: wanted a folder of save_pretrained, or a name on the hub; none is there")
    known = transformers.AutoModelForImageClassification
    with _blamed(name), _quiet(transformers):
        if config is not None:
            settings = transformers.AutoConfig.for_model(**json.loads(config))
            network = known.from_config(settings)
            side = getattr(settings, "image_size", None) or Preprocess.size
            return network.eval(), Preprocess(size=(side, side) if isinstance(side, int) else tuple(side))
        settings = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if type(settings) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            what = ", ".join(settings.architectures or ()) or type(settings).__name__
            raise UnsupportedError(f"{printable(name)}: wanted an image classifier of transformers, got {what}")
        try:  # which colour comes first is asked in any case
            processor = transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
            measured, blue_first = _preprocess_of(processor, name)
        except Exception:
            if preprocess is None:
                raise
            measured, blue_first = preprocess, False
        preprocess = preprocess or measured
        if blue_first and not pretrained:
            raise UnsupportedError(
                f"{printable(name)}: it takes blue first, and is turned round with its own weights alone; "
                "save others into its folder"
            )
        if not pretrained:
            return known.from_config(settings).eval(), preprocess
        network, found = known.from_pretrained(
            where, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    kind = ", ".join(settings.architectures or ["another network"])
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise DataError(
            f"{printable(name)}: its weights are not those of an image classifier: {len(lacking)} are missing, or of "
            f"another shape, {sorted(map(str, lacking))[:3]}; it holds {kind}"
        )
    network = network.float().eval()
    if blue_first:
        _take_red_first(network, preprocess, name)
    return network, preprocess


def configuration(network: nn.Module) -> dict[str, Any]:
    """What ``transformers_network`` takes besides a name to build such a network again; nothing of other networks."""
    configs = (getattr(module, "config", None) for module in network.modules())
    found = next((one for one in configs if hasattr(one, "to_json_string")), None)
    return {} if found is None else {"config": found.to_json_string(use_diff=False)}


def _preprocess_of(processor: Any, name: str) -> tuple[Preprocess, bool]:
    """What an image processor does, measured on plain pictures and a bar; and whether it gives blue first."""

    def given(*colour: int, columns: int = _SIDE) -> Float[Tensor, "d h w"]:
        image = Image.new("RGB", (_SIDE, _SIDE))
        image.paste(colour, ((_SIDE - columns) // 2, 0, (_SIDE + columns) // 2, _SIDE))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        if pixels.shape[:2] != (1, 3) or pixels.ndim != 4:
            raise UnsupportedError(
                f"{printable(name)}: its {type(processor).__name__} gives {tuple(pixels.shape)} for a picture, not "
                "(1, 3, h, w); pass preprocess=... that fits the network"
            )
        colours: Tensor = pixels[0].double()
        return colours

    black, white, red = given(0, 0, 0), given(255, 255, 255), given(255, 0, 0)
    low, high = black[:, 0, 0], white[:, 0, 0]
    even = all((values == values[:, :1, :1]).all() for values in (black, white, red))
    order = [bool(value) for value in red[:, 0, 0] == high]
    if not even or sorted(order) != [False, False, True] or order[1]:
        raise UnsupportedError(
            f"{printable(name)}: its {type(processor).__name__} does more than resize, crop and normalize; pass "
            "preprocess=... that fits the network"
        )
    std = 1 / (high - low)
    mean = -low * std + 0.0  # no -0
    if order[2]:
        std, mean = std.flip(0), mean.flip(0)
    told = getattr(processor, "resample", None)
    size = black.shape[1], black.shape[2]
    bar = ((given(255, 255, 255, columns=_BAR)[0].mean() - low[0]) / (high[0] - low[0])).item()
    shorter = round(bar * size[1] * _SIDE / _BAR)  # what it resizes a picture's shorter side to
    kept: dict[str, Any] = {} if told is None else {"interpolation": Image.Resampling(int(told)).name.lower()}
    return Preprocess(
        size=size,
        mean=tuple(float(f"{one:.7g}") for one in mean),
        std=tuple(float(f"{one:.7g}") for one in std),
        crop_fraction=min(1.0, max(size) / shorter),
        **kept,
    ), order[2]


def _take_red_first(network: nn.Module, preprocess: Preprocess, name: str) -> None:
    """Turn the first convolution of a network that takes blue first, so that it is the same of red first."""
    image = probe(3, preprocess.size)
    first = next((one for one in network.modules() if isinstance(one, nn.Conv2d) and one.in_channels == 3), None)
    with torch.no_grad():
        before = logits_of(network(image.flip(1)))
        if first is not None:
            first.weight.copy_(first.weight.flip(1))
        if not torch.allclose(logits_of(network(image)), before, rtol=1e-4, atol=1e-5):
            raise UnsupportedError(
                f"{printable(name)}: its image processor gives blue first, and its first layer cannot be turned"
            )


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """What transformers says of a folder that it cannot use, as one line that names it."""
    where = name.removeprefix(PREFIX)
    try:
        yield
    except WhatWhereError:
        raise
    except Exception as error:
        if not Path(where).is_dir():  # of the hub
            raise
        needed = [file for file in ("config.json", "preprocessor_config.json") if not Path(where, file).is_file()]
        lacks = f"has no {' and no '.join(needed)}; write model and image processor there with save_pretrained: "
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{printable(name)}: {lacks if needed else 'cannot be loaded: '}{type(error).__name__}: {said}"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no warnings of weights that are missing, which is an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
