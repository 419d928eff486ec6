"""What is counted in cells, and a linear or kernel classifier of the counts, whose logits fall back on the cells.

An additive kernel compares histograms bin by bin, and is a linear classifier behind a function of each bin
(Vedaldi & Zisserman: Efficient Additive Kernels via Explicit Feature Maps, TPAMI 2012). What a bin says, the cells
that fell into it said in proportion to how much of them did: ``f(h) c / h`` of a cell's count c, whose mean over the
cells is ``f(h)``, h being the mean of c. So the logits are linear in the mean of these, and plain CAM is exact. It is
what integrated gradients give along the line from an empty histogram (Sundararajan et al. 2017).
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classic.grids import Sees
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.types import Features, Images, Logits

KERNELS = {"linear": 1, "hellinger": 1, "chi2": 3}
"""By name, numbers that a bin becomes: itself; its root; those of the additive chi-squared kernel."""
INTERVAL = 0.5
"""Between samples of that kernel's spectrum, of which three are taken; as scikit-learn's default is."""


def mapped(values: Float[Tensor, "*axes"], kernel: str) -> list[Float[Tensor, "*axes"]]:
    """Numbers whose products are the kernel of counts: h h', sqrt(h h'), or nearly 2 h h' / (h + h').

    Vedaldi & Zisserman 2012, eq. 11, with three samples of ``sech(pi w)``. An empty bin is 0 in all of them.
    """
    if kernel == "linear":
        return [values]
    if kernel == "hellinger":
        return [values.sqrt()]
    logs = INTERVAL * values.clamp(min=torch.finfo(values.dtype).tiny).log()
    side = (2 * INTERVAL / math.cosh(math.pi * INTERVAL) * values).sqrt()
    return [(INTERVAL * values).sqrt(), side * logs.cos(), side * logs.sin()]


class Shares(nn.Module):
    """Counts of cells (b c y x) -> what each cell adds to the mapped histogram of its region, a level after another.

    Level l of a spatial pyramid (Lazebnik, Schmid, Ponce: Beyond Bags of Features, CVPR 2006) has 2**l x 2**l regions
    with a histogram each.
    """

    sees: Sees

    def __init__(self, kernel: str, levels: int) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise InputError(f"a kernel is one of {', '.join(KERNELS)}, got {kernel!r}")
        if not 1 <= levels <= 4:
            raise InputError(f"a pyramid has 1 to 4 levels, got {levels}")
        self.kernel, self.levels = kernel, levels

    def forward(self, counts: Float[Tensor, "b n y x"]) -> Features:
        """(b n*m*levels y x), m numbers a bin."""
        found = []
        for level in range(self.levels):
            means = regions(counts, 2**level)
            shares = [one / means.clamp(min=torch.finfo(means.dtype).tiny) for one in mapped(means, self.kernel)]
            found += [counts * spread(share, counts) for share in shares]
        return torch.cat(found, 1)


def regions(values: Features, side: int) -> Float[Tensor, "b c n n"]:
    """Means over side x side regions, of which each cell is in one.

    Raises:
        UnsupportedError: a region would have no cell.
    """
    if side == 1:
        return values.mean((2, 3), keepdim=True)
    for axis in (2, 3):
        if values.shape[axis] < side:
            raise UnsupportedError(
                f"a pyramid with {side} x {side} regions wants as many cells, got {tuple(values.shape[2:])}; use "
                "fewer levels, or larger pictures"
            )
        parts = values.tensor_split(_edges(values.shape[axis], side), axis)
        values = torch.cat([part.mean(axis, keepdim=True) for part in parts], axis)
    return values


def spread(means: Float[Tensor, "b c n n"], cells: Features) -> Features:
    """What belongs to regions, given to each of their cells."""
    side = means.shape[2]
    if side == 1:
        return means.expand_as(cells)
    for axis in (2, 3):
        edges = [0, *_edges(cells.shape[axis], side), cells.shape[axis]]
        count = torch.tensor([b - a for a, b in pairwise(edges)], device=means.device)
        means = means.repeat_interleave(count, axis)
    return means


def _edges(cells: int, side: int) -> list[int]:
    return [round(cells * part / side) for part in range(1, side)]


class Histograms(nn.Module):
    """What counts, and what decides by the counts. Splits by itself, between the two.

    Attributes:
        counts: images -> (b c y x), not negative.
    """

    def __init__(self, counts: nn.Module, bins: int, num_classes: int, kernel: str, levels: int) -> None:
        super().__init__()
        self.counts, self.shares = counts, Shares(kernel, levels)
        many = bins * KERNELS[kernel]
        self.num_features, self.positional = many * levels, levels > 1
        self.classify = nn.Linear(many * sum(4**level for level in range(levels)), num_classes)

    def forward_features(self, images: Images) -> Features:
        """What each cell adds to the mapped histograms (b c y x)."""
        features: Features = self.shares(self.counts(images))
        return features

    def forward_head(self, features: Features) -> Logits:
        """Logits (b k)."""
        levels = features.chunk(self.shares.levels, 1)
        pooled = [regions(part, 2**level).flatten(1) for level, part in enumerate(levels)]
        logits: Logits = self.classify(torch.cat(pooled, 1))
        return logits

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        return self.forward_head(self.forward_features(images))
