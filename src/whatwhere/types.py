"""The axes and the few array aliases: the glossary.

    b   image of the batch          k   class            c   channel of the features
                                                     d   channel of the input
    h w network input, in pixels    y x feature grid, in cells
    H W original image, in pixels   n   region

Sizes are (height, width), points (x, y). Boxes are pixel edges, half-open.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

Images = Float[Tensor, "b d h w"]
"""A preprocessed batch, as the network takes it."""
Features = Float[Tensor, "b c y x"]
"""Activations at the layer where the network is split."""
Logits = Float[Tensor, "b k"]
"""The network's output, before any softmax or sigmoid."""
Scores = Float[Tensor, "b"]
"""The one number an image that is explained."""
Maps = Float[Tensor, "b y x"]
"""Evidence for the score: raw, signed, one value a cell."""
ClassMaps = Float[Tensor, "b k y x"]
"""One map a class."""

Pixels = UInt8[np.ndarray, "H W 3"]
"""An original image, upright, RGB."""
Heat = Float[np.ndarray, "H W"]
"""A map brought to the original image's pixels, in [0, 1]."""
Mask = Bool[np.ndarray, "H W"]
"""Pixels of the original image that belong to a region."""

Size = tuple[int, int]
"""(height, width)"""
Score = Callable[[Logits], Scores]
"""What is explained: logits -> one number an image, differentiable."""
