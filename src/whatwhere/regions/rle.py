"""Masks as COCO's uncompressed run lengths: column by column, beginning with the pixels that are off."""

from typing import Any

import numpy as np

from whatwhere.errors import DataError
from whatwhere.types import Mask


def encode(mask: Mask) -> dict[str, Any]:
    """``{"size": [H, W], "counts": [off, on, off, ...]}``, which pycocotools' ``frPyObjects`` reads."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(edges, prepend=0, append=flat.size)
    return {"size": [int(side) for side in mask.shape], "counts": [int(count) for count in counts]}


def decode(rle: dict[str, Any]) -> Mask:
    """The mask (H W) of run lengths.

    Raises:
        DataError: the runs do not fill the size.
    """
    (H, W), counts = rle["size"], rle["counts"]
    if sum(counts) != H * W:
        raise DataError(f"run lengths for {H} x {W} pixels sum to {sum(counts)}, wanted {H * W}")
    on = np.arange(len(counts)) % 2 == 1
    mask: Mask = np.repeat(on, counts).reshape((H, W), order="F")
    return mask
