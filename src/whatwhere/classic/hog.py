"""Histograms of oriented gradients, and weights of their own for every cell.

Dalal & Triggs: Histograms of Oriented Gradients for Human Detection, CVPR 2005; by scikit-image.
"""

from collections.abc import Sequence

import torch
from torch import nn

from whatwhere.classic.grids import Sees, cells_in, pixels_of, stacked
from whatwhere.classic.histograms import KERNELS, mapped
from whatwhere.errors import InputError, UnsupportedError, extra
from whatwhere.types import Features, Images, Logits


class OrientedCells(nn.Module):
    """Pictures of RGB in [0, 1] -> each cell's histogram of orientations, as it is in every block that has the cell.

    A cell is normalized in block x block blocks, in each of which it has another place: (b block*block*o y x), place
    by place. At the border some of these blocks do not exist, and are 0. All numbers are scikit-image's own, mapped
    for an additive kernel.
    """

    def __init__(self, orientations: int, cell: int, block: int, kernel: str = "linear") -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise InputError(f"a kernel is one of {', '.join(KERNELS)}, got {kernel!r}")
        if orientations < 1 or block < 1:
            raise InputError(f"wanted at least 1 orientation and blocks of 1 cell, got {orientations} and {block}")
        with extra("classic", "HOG"):
            import skimage.feature  # noqa: F401
        self.orientations, self.cell, self.block, self.kernel = orientations, cell, block, kernel
        side = (2 * block - 1) * cell + 2.0  # of the blocks around a cell, and a pixel for the gradient
        self.sees: Sees = ((side,) * 2, (cell,) * 2, (-(block - 1) * cell - 1.0,) * 2)

    def forward(self, images: Images) -> Features:
        """(b block*block*o y x), or for each number of the kernel's so many."""
        from skimage.feature import hog

        y, x = cells_in(tuple(images.shape[2:]), self.cell, "HOG")
        n, found = self.block, []
        if min(y, x) < n:
            raise UnsupportedError(
                f"HOG in blocks of {n} x {n} cells wants as many cells of a picture, got {y} x {x}"
            )
        for pixels in pixels_of(images):
            blocks = hog(
                pixels,
                self.orientations,
                (self.cell,) * 2,
                (n, n),
                block_norm="L2-Hys",
                feature_vector=False,
                channel_axis=-1,
            )
            cells = torch.zeros(n, n, self.orientations, y, x, dtype=torch.float32)
            for i in range(n):
                for j in range(n):
                    own = torch.from_numpy(blocks[:, :, i, j]).permute(2, 0, 1)
                    cells[i, j, :, i : y - n + 1 + i, j : x - n + 1 + j] = own
            found.append(torch.cat(mapped(cells.flatten(0, 2), self.kernel)))
        return stacked(found, images)


class Hog(nn.Module):
    """Splits by itself, behind the cells: the logits are linear in them, and HiResCAM is what each one adds."""

    positional = True
    """Each cell has weights of its own, whose mean says nothing."""

    def __init__(
        self,
        num_classes: int,
        size: Sequence[int],
        orientations: int = 9,
        cell: int = 8,
        block: int = 2,
        kernel: str = "linear",
    ) -> None:
        """HOG with fresh weights behind it.

        Args:
            num_classes: k.
            size: (h, w) of the pictures.
            orientations: of half a turn.
            cell: its side, in pixels.
            block: cells along the side of a block.
            kernel: "linear", "hellinger" or "chi2", of each number.

        Raises:
            InputError: no such kernel; no orientations.
            UnsupportedError: a picture that is smaller than a block, or no multiple of a cell.
            MissingExtraError: scikit-image is not installed.
        """
        super().__init__()
        y, x = cells_in(tuple(size), cell, "HOG")
        self.cells, self.flatten = OrientedCells(orientations, cell, block, kernel), nn.Flatten()
        self.num_features = block * block * orientations * KERNELS[kernel]
        self.classify = nn.Linear(self.num_features * y * x, num_classes)

    def forward_features(self, images: Images) -> Features:
        """Mapped histograms of the cells (b c y x)."""
        features: Features = self.cells(images)
        return features

    def forward_head(self, features: Features) -> Logits:
        """Logits (b k)."""
        logits: Logits = self.classify(self.flatten(features))
        return logits

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        return self.forward_head(self.forward_features(images))
