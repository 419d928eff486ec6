"""Mask -> polygons on the edges of pixels, for formats that know no masks."""

import cv2
import numpy as np
from jaxtyping import Float

from whatwhere.types import Mask

Polygon = Float[np.ndarray, "n 2"]


def polygons(mask: Mask, tolerance: float = 1.0) -> list[Polygon]:
    """The outlines of a mask's parts, as (x, y) on edges of pixels; holes are filled.

    Args:
        mask: (H W).
        tolerance: pixels that the outline may be off (Douglas & Peucker 1973); 0 gives it exactly.
    """
    # every pixel as 2 x 2, whose outermost centres say on which edge of the pixel they lie
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, 0), 2, 1)
    outlines, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found = []
    for outline in outlines:
        edges = ((outline[:, 0] + 1) // 2).astype(np.float32)
        simpler = cv2.approxPolyDP(edges, tolerance, True)
        if len(simpler) < 3:  # too small to be simplified
            simpler = cv2.approxPolyDP(edges, 0, True)
        found.append(simpler[:, 0].astype(np.float64))
    return found
