"""A name -> a classic, and the pictures that it takes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from whatwhere.classic.colours import ColourHistogram
from whatwhere.classic.hog import Hog
from whatwhere.classic.pixels import Perceptron
from whatwhere.classic.words import VisualWords
from whatwhere.errors import InputError
from whatwhere.images import Preprocess
from whatwhere.types import Size

NAMES: dict[str, tuple[Callable[..., nn.Module], Size]] = {
    "linear": (Perceptron, (32, 32)),
    "mlp": (Perceptron, (32, 32)),
    "color-histogram": (ColourHistogram, (64, 64)),
    "hog": (Hog, (64, 64)),
    "visual-words": (VisualWords, (128, 128)),
}
"""What makes each of them, and the size of its pictures where nothing else is said."""
SIZED = ("linear", "mlp", "hog")
"""Those with weights for every cell, which take pictures of one size."""
HIDDEN = (256,)
"""Of an mlp where nothing else is said."""


def classic(
    name: str, classes: int, size: Sequence[int] | None = None, **options: Any
) -> tuple[nn.Module, Preprocess]:
    """A classic with fresh weights, and how photos become its input: RGB in [0, 1], of pixels alone around grey.

    Args:
        name: in ``NAMES``.
        classes: k.
        size: (h, w) of the pictures.
        options: what its constructor takes besides.

    Raises:
        InputError: a value that it does not take.
        UnsupportedError: a size that does not fall into its cells.
        MissingExtraError: what it counts by is not installed.
    """
    make, usual = NAMES[name]
    h, w = size or usual
    if name in SIZED:
        options["size"] = (h, w)
    if name == "linear" and "hidden" in options:
        raise InputError("linear has no hidden layers; mlp has")
    if name == "mlp":
        options.setdefault("hidden", HIDDEN)
    if make is Perceptron:
        preprocess = Preprocess(size=(h, w), mean=(0.5,) * 3, std=(0.25,) * 3)
    else:
        preprocess = Preprocess(size=(h, w), mean=(0.0,) * 3, std=(1.0,) * 3)
    return make(classes, **options), preprocess
