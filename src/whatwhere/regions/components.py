"""Mask -> connected components -> boxes."""

from dataclasses import dataclass

import cv2
import numpy as np

from whatwhere.geometry import Box
from whatwhere.types import Mask


@dataclass(frozen=True, eq=False)
class Components:
    """The connected parts of a mask, eight neighbours a pixel, largest first.

    Attributes:
        boxes: the tight box of each, in pixel edges.
        areas: pixels in each.
    """

    boxes: tuple[Box, ...]
    areas: tuple[int, ...]
    _numbered: np.ndarray
    _numbers: tuple[int, ...]

    def mask(self, index: int) -> Mask:
        """The pixels of one component."""
        mask: Mask = self._numbered == self._numbers[index]
        return mask


def components(mask: Mask) -> Components:
    """Split a mask (H W) into its connected parts, by falling area; equal areas from top to bottom, left to right."""
    few = (mask.shape[0] + 1) * (mask.shape[1] + 1) // 4 < 2**16  # no two of them touch; short numbers are faster
    kind = cv2.CV_16U if few else cv2.CV_32S
    count, numbered, table, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8, ltype=kind)
    order = sorted(range(1, count), key=lambda number: (-table[number, 4], table[number, 1], table[number, 0]))
    boxes = []
    for number in order:
        x, y, width, height = (int(value) for value in table[number, :4])
        boxes.append(Box(x, y, x + width, y + height))
    areas = tuple(int(table[number, cv2.CC_STAT_AREA]) for number in order)
    return Components(tuple(boxes), areas, numbered, tuple(order))
