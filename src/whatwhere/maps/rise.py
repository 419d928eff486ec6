"""RISE: random masks, weighted by what the network says of the image seen through them."""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from whatwhere.classifiers.classifier import Trace, full_precision
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.seen import AUTO_PIXELS, Batch, parts, per_batch, scores_seen_through
from whatwhere.maps.shape import upsample
from whatwhere.types import Maps, Score, Size


def rise(
    trace: Trace,
    score: Score,
    *,
    samples: int = 4000,
    cells: int = 7,
    share: float = 0.5,
    seed: int = 0,
    batch: Batch = "auto",
) -> Maps:
    """RISE: the mean of random masks, weighted by what is left of the score under each (Petsiuk et al., BMVC 2018).

    Petsiuk, Das, Saenko: Randomized Input Sampling for Explanation of Black-box Models. Masks are grids of 0 and 1,
    brought to a little more than the image's size bilinearly and shifted at random: ``M = sum_n S(x * m_n) m_n / (n
    p)`` (eq. 6). It needs no features and no gradient; the defaults are the paper's for VGG-16 (8000 for ResNet-50).

    Args:
        trace: what the network saw.
        score: what is explained, taken as ``scorecam`` does.
        samples: n, as many forwards.
        cells: of the grid, along the shorter side of the image.
        share: p, of the cells that are 1.
        seed: of the masks, which are the same for every image.
        batch: masked images that go through the network at once; "auto" for as many as 16 of 224 x 224.

    Returns:
        (b h w): one value a pixel of the network's input.

    Raises:
        InputError: no samples or cells, a share out of (0, 1], or a batch of less than 1.
        UnsupportedError: volumes.
    """
    if samples < 1 or cells < 1 or not 0 < share <= 1:
        raise InputError(f"wanted samples and cells of at least 1 and a share in (0, 1], got {samples, cells, share}")
    if trace.images.ndim != 4:
        raise UnsupportedError("rise takes images (b d h w), not volumes; use gradcam or eigencam")
    size = trace.images.shape[2], trace.images.shape[3]
    masks, key = _Masks(size, samples, cells, share, seed), ("rise", samples, cells, share, seed)
    at_once = per_batch(trace.images[0, 0].numel(), AUTO_PIXELS, batch)
    seen = partial(scores_seen_through, trace, score, read="probability", batch=batch, key=key)
    scores = torch.stack([seen(i, masks.__getitem__, samples) for i in range(len(trace.images))])
    maps = scores.new_zeros(len(scores), *size)
    with full_precision(scores):
        # the masks are made again, since all of them together would take more memory than anything else here
        for part in parts(samples, at_once):
            maps += torch.einsum("bn,nhw->bhw", scores[:, part.start : part.stop], masks[part].to(scores))
    return maps / (samples * share)


class _Masks:
    """Random masks of an image's size, of which only the small grids are held."""

    def __init__(self, size: Size, samples: int, cells: int, share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        side = min(size) / cells
        y, x = max(1, round(size[0] / side)), max(1, round(size[1] / side))
        self.size, self.cell = size, (math.ceil(size[0] / y), math.ceil(size[1] / x))
        self.grids = (torch.rand(samples, y, x, generator=generator) < share).float()
        self.tops = torch.randint(self.cell[0], (samples,), generator=generator).tolist()
        self.lefts = torch.randint(self.cell[1], (samples,), generator=generator).tolist()

    def __getitem__(self, part: range) -> Float[Tensor, "n h w"]:
        (h, w), (_, y, x) = self.size, self.grids.shape
        wide = upsample(self.grids[part.start : part.stop], ((y + 1) * self.cell[0], (x + 1) * self.cell[1]))
        corners = zip(self.tops[part.start : part.stop], self.lefts[part.start : part.stop], strict=True)
        shifted = [mask[top : top + h, left : left + w] for mask, (top, left) in zip(wide, corners, strict=True)]
        return torch.stack(shifted)
