"""What a training is told, as plain data: a small file of differences from what stands here."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from whatwhere.classifiers.zoo import EMBEDDED
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.images import printable

Mode = Literal["light", "full"]
Loss = Literal["image", "dense"]
FilterStart = Literal["patches", "directions", "random"]
Selection = Literal["accuracy", "localization"]


@dataclass(frozen=True)
class Recipe:
    """All that a training is told. The same recipe, data and seed give the same run.

    Attributes:
        model: as ``whatwhere.load`` takes it; a saved run goes on from its weights.
        pretrained: begin with weights from the install or the hub, where there are any, or with random ones.
        options: what the model's constructor takes besides: ``norm``, ``antialias``, ``output_stride``, ...
        head: ``pool``, ``order``, ``dropout``, ``scaled``, ``units``, ``branches`` of a head of ours, ``filters``,
            ``tap``, ``weights``, ``scales`` of a filter bank; by default the model's own with a new last layer.
        size: (h, w) of the network's input; by default what belongs to the weights.
        split: what is trained on, as the data set calls it; by default train or trainval, or all there is.
        validation: a split, or a share of each class that is held out of training; 0 for none. By default the
            folder's validation split, or a tenth where each class has twenty images, or none.
        test: a split to measure at the end and write a report of; "" for none, by default one that is there.
        mode: "light" trains the last layer on features that are computed once, and a filter bank on grids that
            are, of the pictures and their mirror images; "full" all of it after that.
        seed: of everything that is drawn.
        adjustment: how far rare classes are made up for, from 0 (not) to 1 (as if all were as frequent): by the logit
            adjustment of Menon et al. (ICLR 2021, eq. 10).
        decay: of the last layer's weights in light mode; 0 for what cross-validation finds best.
        epochs: how often each image is seen.
        batch: images a step, on all devices together.
        optimizer: "adamw" or "sgd" (Nesterov momentum of .9).
        lr: of the head, at its highest.
        backbone_lr: of the last layers before the head, as a share of the head's.
        layer_decay: from each block to the one before it the rate falls by this factor (Howard & Ruder 2018).
        weight_decay: of weights with more than one axis.
        warmup: epochs in which the rate rises to its highest; after them it falls along a cosine.
        head_epochs: a first phase of so many epochs, in which only the head is trained.
        frozen: share of the backbone's layers, from the input on, that stay as they are; by default a quarter, or
            none where the weights begin at random.
        frozen_norm: share of the epochs in which batch normalization keeps its statistics, before they are released;
            by default all of them, or none where the weights begin at random.
        light_start: begin with the last layer that light mode finds.
        filter_start: what the filters of a bank begin as: "patches" of each class, compared as they are or by
            "directions", or "random". Those of a run that is gone on with, for the same classes, stay.
        filter_lr: share of ``lr`` that filters, and what reads them, get.
        loss: "image", once for the logits of each image, or "dense", for each cell of the grid.
        smoothing: of the labels (Szegedy et al. 2016, section 7).
        mixup: Beta(a, a) of mixed pairs of images (Zhang et al. 2018); 0 for none.
        ema: the run is the exponential moving average of its weights, by this factor a step; 0 for none.
        crop: smallest share of an image that a random crop keeps; 1 for none.
        flip: mirror every second image.
        augment: "none", "trivial" (TrivialAugment) or "rand" (RandAugment), of torchvision.
        balanced: draw images of each class equally often.
        aids: names in ``AIDS``: what makes a network look at more than the most telling part.
        aid_options: by the name of an aid, its options.
        patience: stop after so many epochs without a better one; 0 for never.
        select: what the best epoch is best in: accuracy on the validation images, or MaxBoxAccV2 on ``boxes``; by
            default the second where there are boxes.
        boxes: a data set with boxes, on which thresholds are calibrated.
        methods: map methods that are calibrated and reported.
        precision: as Lightning's Trainer takes it: "32-true", "bf16-mixed", ...
        workers: processes that read images; -1 for as many as fit the machine.
        log: "csv", or "tensorboard" besides.
    """

    model: str = EMBEDDED
    pretrained: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    split: str | None = None
    validation: str | float | None = None
    test: str | None = None
    mode: Mode = "light"
    seed: int = 0
    adjustment: float = 1.0
    decay: float = 0.0
    epochs: int = 16
    batch: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 7e-4
    backbone_lr: float = 1.0
    layer_decay: float = 0.9
    weight_decay: float = 0.05
    warmup: float = 1.0
    head_epochs: int = 0
    frozen: float | None = None
    frozen_norm: float | None = None
    light_start: bool = True
    filter_start: FilterStart = "patches"
    filter_lr: float = 1.0
    loss: Loss = "image"
    smoothing: float = 0.1
    mixup: float = 0.0
    ema: float = 0.98
    crop: float = 0.5
    flip: bool = True
    augment: Literal["none", "trivial", "rand"] = "none"
    balanced: bool = False
    aids: tuple[str, ...] = ()
    aid_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    patience: int = 0
    select: Selection | None = None
    boxes: str | None = None
    methods: tuple[str, ...] = ("gradcam",)
    precision: str = "32-true"
    workers: int = -1
    log: Literal["csv", "tensorboard"] = "csv"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Recipe).items():
            object.__setattr__(self, name, _as(getattr(self, name), hint, name))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is in {low}..{high}, got {value}")
        if isinstance(self.validation, float | int) and not 0 <= self.validation < 1:
            raise InputError(f"validation is a split or a share in 0..1, got {self.validation}")
        unused = [name for name in self.aid_options if name not in self.aids]
        if unused or not all(isinstance(one, dict) for one in self.aid_options.values()):
            raise InputError(f"aid_options has a table for each of {', '.join(self.aids) or 'no aids'}, got {unused}")
        if self.select == "localization" and self.boxes is None:
            raise InputError("select = localization needs boxes, a data set that has them")

    def plain(self) -> dict[str, Any]:
        """As TOML takes it: what is None is left out."""
        return {key: _plain(value) for key, value in asdict(self).items() if value is not None}


_ANY = float("inf")
_RANGES = [
    *((name, 0.0, 1.0) for name in ("adjustment", "frozen", "frozen_norm", "layer_decay", "smoothing", "crop")),
    *((name, 0.0, _ANY) for name in ("decay", "lr", "backbone_lr", "filter_lr", "weight_decay", "warmup", "mixup")),
    *((name, 0, _ANY) for name in ("head_epochs", "patience", "seed")),
    *((name, 1, _ANY) for name in ("epochs", "batch")),
    ("ema", 0.0, 0.99999),
    ("workers", -1, _ANY),
]


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """A recipe of plain values, as they stand in a file.

    Raises:
        InputError: a name that is none of a recipe's (with the three nearest), or a value of another kind.
    """
    hints = get_type_hints(Recipe)
    if not isinstance(given, Mapping):
        raise InputError(f"a recipe is a table, got {given!r}")
    for key in given:
        if key not in hints:
            raise InputError(f"a recipe has no {key!r}; nearest: {nearest(key, hints)}")
    return Recipe(**{key: _as(value, hints[key], key) for key, value in given.items()})


def read_recipe(file: Path) -> Recipe:
    """The recipe in a TOML file, its [training] table if it has one, as a run's has.

    Raises:
        DataError: it cannot be read.
        InputError: as ``recipe_of``.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(file)}: cannot be read as TOML: {error}") from error
    try:
        return recipe_of(found.get("training", found))
    except InputError as error:
        raise InputError(f"{printable(file)}: {error}") from None


def with_settings(recipe: Recipe, words: Sequence[str], **given: Any) -> Recipe:
    """The recipe with things set as on a command line: ``lr=0.01``, ``head.pool=max``, ``aids=cutmix``.

    Args:
        recipe: what they are changes of.
        words: NAME=VALUE; values as TOML has them, or text.
        given: the same as plain values.

    Raises:
        InputError: no such thing, or a value of another kind.
    """
    plain, hints = recipe.plain(), get_type_hints(Recipe)
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise InputError(f"wanted NAME=VALUE, got {word!r}")
        *tables, key = name.strip().split(".")
        place = plain
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise InputError(f"{table} is no table, got {word!r}")
        place[key] = text if not tables and hints.get(key) in {str, str | None} else _value(text)
    return recipe_of(plain | given)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as(value: Any, hint: Any, key: str) -> Any:
    """A value as the kind that a field has.

    Raises:
        InputError: it is of another.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        for one in sorted(inner, key=lambda one: one is str):
            try:
                return _as(value, one, key)
            except InputError:
                continue
    elif hint is NoneType:
        if value is None:
            return None
    elif origin is Literal:
        if value in inner:
            return value
        raise InputError(f"{key} is one of {', '.join(map(str, inner))}, got {value!r}")
    elif origin is tuple:
        several = [value] if isinstance(value, str) else value
        if isinstance(several, list | tuple) and (inner[-1] is Ellipsis or len(several) == len(inner)):
            return tuple(_as(one, inner[0], key) for one in several)
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise InputError(f"{key} is a value of the kind {wanted}, got {value!r}")


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
