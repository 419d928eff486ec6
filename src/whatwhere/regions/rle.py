"""Masks as COCO's uncompressed run lengths: column by column, beginning with the pixels that are off."""

from typing import Any

import cv2
import numpy as np

from whatwhere.errors import DataError
from whatwhere.types import Mask


def encode(mask: Mask) -> dict[str, Any]:
    """``{"size": [H, W], "counts": [off, on, off, ...]}``, which pycocotools' ``frPyObjects`` reads."""
    flat = cv2.transpose(np.ascontiguousarray(mask).view(np.uint8)).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat[0] else []
    counts = np.diff(edges, prepend=[0, *first], append=flat.size)
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
