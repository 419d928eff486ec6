"""Mask -> connected components -> boxes."""

from dataclasses import dataclass

import cv2
import numpy as np

from whatwhere.geometry import Box
from whatwhere.types import Mask

FEW = 8
"""Components, and what is none."""


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
    count, numbered = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    if count <= FEW:  # measuring each of them alone is faster than OpenCV's table of all
        found = [_measured(numbered == number, number) for number in range(1, count)]
    else:
        _, numbered, table, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        found = [(-area, y, x, number, w, h) for number, (x, y, w, h, area) in enumerate(table[1:].tolist(), 1)]
    found.sort()
    boxes = tuple(Box(x, y, x + width, y + height) for _, y, x, _, width, height in found)
    return Components(boxes, tuple(-one[0] for one in found), numbered, tuple(one[3] for one in found))


def _measured(part: Mask, number: int) -> tuple[int, int, int, int, int, int]:
    """What components are ordered by, then the number, width and height."""
    pixels = part.view(np.uint8)
    x, y, width, height = cv2.boundingRect(pixels)
    return -cv2.countNonZero(pixels), y, x, number, width, height
