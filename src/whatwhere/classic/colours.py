"""Colour histograms: how much of each colour there is, and in which cells.

Swain & Ballard: Color Indexing, IJCV 1991.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classic.grids import Sees, cells_in, pixels_of, stacked
from whatwhere.classic.histograms import Histograms
from whatwhere.errors import InputError, extra
from whatwhere.types import Features, Images

SPACES = {
    "rgb": ((0.0, 1.0),) * 3,
    "hsv": ((0.0, 1.0),) * 3,
    "lab": ((0.0, 100.0), (-87.0, 99.0), (-108.0, 95.0)),
}
"""What values lie between, of colours that a screen shows."""


class ColourCells(nn.Module):
    """Pictures of RGB in [0, 1] -> how much of each cell has which colour (b c y x); sums to 1 in every cell."""

    def __init__(self, space: str, bins: Sequence[int], cell: int, soft: bool) -> None:
        super().__init__()
        if space not in SPACES:
            raise InputError(f"a space is one of {', '.join(SPACES)}, got {space!r}")
        if len(bins) != 3 or any(count < 1 for count in bins):
            raise InputError(f"bins are three numbers, of each axis of {space} one, got {list(bins)}")
        with extra("classic", "a colour histogram"):
            import skimage.color  # noqa: F401
        self.space, self.bins, self.cell, self.soft = space, tuple(bins), cell, soft
        self.sees: Sees = ((float(cell),) * 2, (cell,) * 2, (0.0, 0.0))

    def forward(self, images: Images) -> Features:
        """Shares of colours (b c y x), c by the first axis of the space, then the second, then the third."""
        from skimage import color

        y, x = cells_in(tuple(images.shape[2:]), self.cell, "a colour histogram")
        found = []
        for pixels in pixels_of(images):
            values = pixels if self.space == "rgb" else getattr(color, f"rgb2{self.space}")(pixels)
            axes = [
                weights_of(
                    (torch.from_numpy(values[..., axis]).flatten() - low) / (high - low),
                    count,
                    self.soft,
                    around=self.space == "hsv" and axis == 0,
                )
                for axis, (count, (low, high)) in enumerate(zip(self.bins, SPACES[self.space], strict=True))
            ]
            joint = torch.einsum("pi,pj,pk->pijk", *axes).reshape(y, self.cell, x, self.cell, -1)
            found.append(joint.mean((1, 3)).permute(2, 0, 1))
        return stacked(found, images)


def weights_of(values: Float[Tensor, "p"], count: int, soft: bool, *, around: bool = False) -> Float[Tensor, "p n"]:
    """How much of each bin values in [0, 1] are: of the one that they fall into, or of the two nearest.

    Args:
        values: p of them.
        count: n bins of one width.
        soft: a value counts for the two bins between whose centres it lies, more for the nearer.
        around: 1 is 0 again, as of hues.
    """
    if not soft:
        return nn.functional.one_hot((values * count).long().clamp(0, count - 1), count).to(values)
    place = values * count - 0.5
    place = place if around else place.clamp(0, count - 1)
    distance = (place[:, None] - torch.arange(count)).abs()
    if around:
        distance = torch.minimum(distance, count - distance)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class ColourHistogram(Histograms):
    """Colours counted in cells, and a linear or additive kernel classifier of the counts."""

    def __init__(
        self,
        num_classes: int,
        space: str = "lab",
        bins: Sequence[int] = (5, 8, 8),
        cell: int = 8,
        soft: bool = True,
        kernel: str = "chi2",
        levels: int = 1,
    ) -> None:
        """A colour histogram with fresh weights.

        Args:
            num_classes: k.
            space: "rgb", "hsv" or "lab".
            bins: of each of its axes.
            cell: side of a cell, in pixels; maps are as coarse.
            soft: a pixel counts for the nearest bins along each axis, not for one alone.
            kernel: "linear", "hellinger" or "chi2", of the counts.
            levels: of a spatial pyramid; 1 for one histogram of the picture.

        Raises:
            InputError: no such space or kernel; no bins.
            MissingExtraError: scikit-image is not installed.
        """
        counts = ColourCells(space, bins, cell, soft)
        super().__init__(counts, bins[0] * bins[1] * bins[2], num_classes, kernel, levels)
        self.shares.sees = counts.sees
