"""Bags of visual words: local descriptors on a grid, each the nearest word of a dictionary, words counted.

Csurka, Dance, Fan, Willamowski, Bray: Visual Categorization with Bags of Keypoints, ECCV workshops 2004; on a dense
grid as Fei-Fei and Perona, CVPR 2005. Descriptors are DAISY (Tola, Lepetit, Fua, TPAMI 2010), by scikit-image.
"""

from collections import OrderedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classic.grids import Sees, cells_in, pixels_of, stacked
from whatwhere.classic.histograms import Histograms
from whatwhere.errors import InputError, extra
from whatwhere.types import Features, Images

RINGS, SAMPLES, ORIENTATIONS = 2, 6, 8
"""Of DAISY: rings of samples around the middle one, each a histogram of so many orientations."""
LAB = 100.0
"""What lightness goes up to; a colour is a share of it."""


class Described(nn.Module):
    """Pictures of RGB in [0, 1] -> the descriptor in the middle of each cell (b d y x).

    It is of the grey picture, its squares sum to 1; behind it stands the mean colour of what it sees, in Lab as
    shares of ``LAB``, times a weight. At the border pictures are mirrored.
    """

    sees: Sees

    def __init__(self, cell: int, radius: int, colour: float) -> None:
        super().__init__()
        if radius < max(2, cell // 2) or colour < 0:
            raise InputError(
                f"a descriptor of a cell of {cell} pixels wants a radius of {max(2, cell // 2)} or more, and colour "
                f"a weight that is not negative; got {radius} and {colour}"
            )
        with extra("classic", "a bag of visual words"):
            import skimage.feature  # noqa: F401
        self.cell, self.radius, self.colour = cell, radius, colour
        self.length = (RINGS * SAMPLES + 1) * ORIENTATIONS + 3 * (colour > 0)

    def forward(self, images: Images) -> Features:
        """(b d y x)."""
        y, x = cells_in(tuple(images.shape[2:]), self.cell, "a bag of visual words")
        return stacked([self._described(pixels, y, x) for pixels in pixels_of(images)], images)

    def _described(self, pixels: Float[np.ndarray, "h w 3"], y: int, x: int) -> Float[Tensor, "d y x"]:
        from skimage.color import rgb2gray, rgb2lab
        from skimage.feature import daisy

        wide = [(self.radius - self.cell // 2, self.radius)] * 2
        grey = np.pad(rgb2gray(pixels), wide, "symmetric")
        found = daisy(grey, self.cell, self.radius, RINGS, SAMPLES, ORIENTATIONS, normalization="l2")[:y, :x]  # type: ignore[no-untyped-call]
        grid = torch.from_numpy(found).permute(2, 0, 1).float()
        if not self.colour:
            return grid
        lab = torch.from_numpy(np.pad(rgb2lab(pixels) / LAB, [*wide, (0, 0)], "symmetric")).permute(2, 0, 1).float()
        side = 2 * self.radius
        means = nn.functional.avg_pool2d(lab, side, self.cell)[:, :y, :x]
        return torch.cat([grid, self.colour * means])


class Words(nn.Module):
    """Descriptors (b d y x) -> the nearest words of each cell (b n y x), which sum to 1.

    With one, the others are 0; with several, they are weighed by ``exp(-|d - w|^2 / s)``, s being the mean square
    distance of descriptors to their word (van Gemert et al.: Kernel Codebooks, ECCV 2008; of the nearest alone, Liu,
    Wang, Liu: In Defense of Soft-assignment Coding, ICCV 2011).

    Attributes:
        words: (n d); none is known before they are learned, and all are 0.
        spread: s.
    """

    sees: Sees

    def __init__(self, count: int, length: int, nearest: int) -> None:
        super().__init__()
        if not 1 <= nearest <= count:
            raise InputError(f"nearest is in 1..{count}, the number of words, got {nearest}")
        self.nearest = nearest
        self.words: Tensor
        self.spread: Tensor
        self.register_buffer("words", torch.zeros(count, length))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, descriptors: Float[Tensor, "b d y x"]) -> Float[Tensor, "b n y x"]:
        """How much of each cell is which word."""
        found = []
        for grid in descriptors:  # one by one: whose word it is must not hang on the rounding of a larger product
            distances = self.distances(grid.flatten(1).T)
            least = distances.topk(self.nearest, largest=False)
            weights = (-least.values / self.spread.clamp(min=1e-12)).softmax(1)
            counts = torch.zeros_like(distances).scatter_(1, least.indices, weights)
            found.append(counts.T.reshape(-1, *grid.shape[1:]))
        return torch.stack(found)

    def distances(self, points: Float[Tensor, "p d"]) -> Float[Tensor, "p n"]:
        """Square distances to the words, but for the points' own squares."""
        return self.words.square().sum(1) - 2 * points @ self.words.T


class VisualWords(Histograms):
    """Words counted in cells, and a linear or additive kernel classifier of the counts."""

    def __init__(
        self,
        num_classes: int,
        words: int = 500,
        cell: int = 4,
        radius: int = 8,
        colour: float = 2.0,
        nearest: int = 1,
        kernel: str = "hellinger",
        levels: int = 1,
    ) -> None:
        """A bag of words with fresh weights, and a dictionary that is to be learned.

        Args:
            num_classes: k.
            words: of the dictionary.
            cell: side of a cell, in pixels; maps are as coarse.
            radius: of a descriptor, from its middle to its outermost samples' middles, in pixels.
            colour: weight of the colour in a descriptor; 0 for none.
            nearest: words that a cell counts for; 1 for the nearest alone.
            kernel: "linear", "hellinger" or "chi2", of the counts.
            levels: of a spatial pyramid; 1 for one histogram of the picture.

        Raises:
            InputError: no such kernel; nothing to count.
            MissingExtraError: scikit-image is not installed.
        """
        if words < 2:
            raise InputError(f"a dictionary has at least 2 words, got {words}")
        described = Described(cell, radius, colour)
        dictionary = Words(words, described.length, nearest)
        counts = nn.Sequential(OrderedDict(described=described, dictionary=dictionary))
        super().__init__(counts, words, num_classes, kernel, levels)
        half = radius + round(4 * radius / 2) + 1  # the outermost samples are blurred by half of the radius
        sees: Sees = ((2.0 * half,) * 2, (cell,) * 2, (float(cell // 2 - half + 1),) * 2)
        self.shares.sees = described.sees = dictionary.sees = sees

    @property
    def described(self) -> Described:
        """What descriptors are made by."""
        found: Described = self.counts.described  # type: ignore[assignment]
        return found

    @property
    def dictionary(self) -> Words:
        """What they are looked up in."""
        found: Words = self.counts.dictionary  # type: ignore[assignment]
        return found
