"""Linear classifier and multilayer perceptron on pixels: the picture itself is the grid.

Rumelhart, Hinton, Williams: Learning representations by back-propagating errors, Nature 1986. Each pixel has weights
of its own, so pictures are of one size, and what a class's weights look like, laid out as a picture, is its template.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from whatwhere.classic.grids import cells_in
from whatwhere.errors import InputError
from whatwhere.types import Features, Images, Logits


class Perceptron(nn.Module):
    """Splits by itself, before its first layer.

    Without hidden layers the logits are linear in the pixels, and HiResCAM, weight times pixel, sums to the logit
    less its bias; with them, it is gradient times input.
    """

    positional = True
    """Each cell has weights of its own, whose mean says nothing."""

    def __init__(
        self, num_classes: int, size: Sequence[int], hidden: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        """A perceptron with fresh weights.

        Args:
            num_classes: k.
            size: (h, w) of the pictures.
            hidden: units of each hidden layer, ReLUs behind them; none for a linear classifier.
            dropout: of what goes into the last layer.

        Raises:
            InputError: a hidden layer of no units.
            UnsupportedError: a picture of one pixel.
        """
        super().__init__()
        if any(units < 1 for units in hidden):
            raise InputError(f"hidden layers have at least one unit, got {list(hidden)}")
        y, x = cells_in(tuple(size), 1, "a classifier of pixels")
        self.num_features = 3
        self.grid, self.flatten = nn.Identity(), nn.Flatten()
        widths = [self.num_features * y * x, *hidden]
        layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.ReLU())]
        self.hidden, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.classify = nn.Linear(widths[-1], num_classes)

    def forward_features(self, images: Images) -> Features:
        """The pixels (b 3 h w)."""
        features: Features = self.grid(images)
        return features

    def forward_head(self, features: Features) -> Logits:
        """Logits (b k)."""
        logits: Logits = self.classify(self.dropout(self.hidden(self.flatten(features))))
        return logits

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        return self.forward_head(self.forward_features(images))
