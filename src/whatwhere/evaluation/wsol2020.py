"""The WSOL benchmark's own rules (Choe et al., CVPR 2020), with all that differs from ours.

The map is resized bicubically to 224 x 224 and brought to [0, 1] by its least and largest value; nan, or a constant
map, is 0 everywhere. Then it is cut to 256 levels. Boxes are those around OpenCV's contours, of holes too, and end at
223 at the latest; the largest is that of the largest area inside the contour's line. No contour is the box of the
first pixel. Overlaps count both edges in: boxes that come out half-open are a pixel wider and higher there. True
boxes are scaled to 224 x 224 and cut to whole numbers.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, Int8, UInt8

from whatwhere.errors import InputError
from whatwhere.evaluation.localization import SHARES, Overlaps
from whatwhere.geometry import Box
from whatwhere.types import Heat, Pixels, Size, Truth

SIDE = 224


def heat_of(map: Float[np.ndarray, "y x"]) -> Heat:
    """A raw map in the protocol's pixels, (224 224)."""
    if not np.isfinite(map).all() or map.min() == map.max():  # which resizing would turn into rounding
        return np.zeros((SIDE, SIDE), dtype=np.float32)
    resized = cv2.resize(map.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    low, high = resized.min(), resized.max()
    heat: Heat = (resized - low) / (high - low)
    return heat


def pixels_of(pixels: Pixels) -> UInt8[np.ndarray, "h w 3"]:
    """An image in the protocol's pixels, (224 224 3)."""
    found: np.ndarray = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return found


def scaled(boxes: Sequence[Box], size: Size) -> Float[np.ndarray, "n 4"]:
    """True boxes of an image of (H, W) pixels in the protocol's."""
    edges = np.array([box.to_list() for box in boxes]) * SIDE / [size[1], size[0], size[1], size[0]]
    whole: np.ndarray = np.trunc(edges)
    return whole


def truth_of(truth: Truth) -> Int8[np.ndarray, "h w"]:
    """A mask in the protocol's pixels: of each the nearest."""
    found: np.ndarray = cv2.resize(truth, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return found


def overlaps(heat: Heat, truth: Float[np.ndarray, "n 4"], name: str = "image") -> Overlaps:
    """How well a map's boxes fit the true ones, at every threshold.

    Raises:
        InputError: no true box.
    """
    if not len(truth):
        raise InputError(f"{name}: wanted at least one true box")
    levels = (heat * 255).astype(np.uint8)
    cuts = (SHARES * levels.max()).astype(np.int64)
    distinct, back = np.unique(cuts, return_inverse=True)
    found = np.array([_at(levels, int(cut), truth) for cut in distinct])
    return Overlaps(found[back, 0], found[back, 1])


def _at(levels: np.ndarray, cut: int, truth: np.ndarray) -> tuple[float, float]:
    """IoU of the largest contour's box, and of any one's."""
    _, mask = cv2.threshold(levels, cut, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        alone = float(inclusive_iou(np.zeros((1, 4)), truth).max())
        return alone, alone
    edges = np.array([cv2.boundingRect(contour) for contour in contours], dtype=float)
    edges[:, 2:] = np.minimum(edges[:, :2] + edges[:, 2:], [levels.shape[1] - 1, levels.shape[0] - 1])
    best = inclusive_iou(edges, truth).max(1)
    largest = max(range(len(contours)), key=lambda number: cv2.contourArea(contours[number]))
    return float(best[largest]), float(best.max())


def inclusive_iou(boxes: Float[np.ndarray, "n 4"], truth: Float[np.ndarray, "g 4"]) -> Float[np.ndarray, "n g"]:
    """Intersection over union where the last edge is a pixel that counts."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    common = (high - low + 1).clip(0).prod(2)
    areas = [(part[:, 2:] - part[:, :2] + 1).prod(1) for part in (boxes, truth)]
    found: np.ndarray = common / (areas[0][:, None] + areas[1][None] - common)
    return found


def levels_of(heat: Heat) -> np.ndarray:
    """Of every pixel, the last threshold that it reaches, where one that is equal counts; 1 is a level of its own."""
    levels: np.ndarray = np.searchsorted(SHARES, heat, side="right") - 1 + (heat >= 1)
    return levels
