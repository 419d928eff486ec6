"""The axes and the few array aliases: the glossary.

    b   image of the batch          k   class            c   channel of the features
                                                     d   channel of the input
    h w network input, in pixels    y x feature grid, in cells
    H W original image, in pixels   n   region

Sizes are (height, width), points (x, y). Boxes are pixel edges, half-open. Where the network takes volumes, a z
stands before h w and before y x: ``*hw`` and ``*yx`` are two axes or three.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

Images = Float[Tensor, "b d *hw"]
"""A preprocessed batch, as the network takes it."""
Features = Float[Tensor, "b c *yx"]
"""Activations at the layer where the network is split."""
Variants = Float[Tensor, "n c *yx"]
"""Features to put in the place of one image's."""
Logits = Float[Tensor, "b k"]
"""The network's output, before any softmax or sigmoid."""
Scores = Float[Tensor, "b"]
"""The one number an image that is explained."""
Maps = Float[Tensor, "b *yx"]
"""Evidence for the score: raw, signed, one value a cell."""
ClassMaps = Float[Tensor, "b k *yx"]
"""One map a class."""
Weights = Float[Tensor, "b c ..."]
"""What each channel, or each activation, counts for in a map: (b c) or (b c *yx)."""

Pixels = UInt8[np.ndarray, "H W 3"]
"""An original image, upright, RGB."""
Heat = Float[np.ndarray, "H W"]
"""A map brought to the original image's pixels, in [0, 1]."""
Mask = Bool[np.ndarray, "H W"]
"""Pixels of the original image that belong to a region."""
Truth = Int8[np.ndarray, "H W"]
"""What a data set says of each pixel: 1 on the object, 0 off it, -1 where that is not known."""

Size = tuple[int, int]
"""(height, width)"""
Extent = tuple[int, ...]
"""(height, width), or (depth, height, width) of a volume."""
Score = Callable[[Logits], Scores]
"""What is explained: logits -> one number an image, differentiable."""
