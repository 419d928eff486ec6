"""Heat -> mask: which pixels belong."""

import re

import cv2
import numpy as np

from whatwhere.errors import InputError
from whatwhere.types import Heat, Mask

Threshold = float | str
"""A fraction of the maximum in [0, 1), "otsu", or "p90" for the 90th percentile."""


def mask_of(heat: Heat, threshold: Threshold) -> Mask:
    """The mask by a fraction of the maximum, by Otsu's rule or by a percentile.

    Args:
        heat: (H W), not negative.
        threshold: 0.2, "otsu" or "p90".

    Raises:
        InputError: anything else.
    """
    threshold = parsed(threshold)
    if isinstance(threshold, float):
        return fraction(heat, threshold)
    return otsu(heat) if threshold == "otsu" else percentile(heat, float(threshold[1:]))


def parsed(threshold: Threshold) -> Threshold:
    """A threshold as it is kept: a float, "otsu" or a percentile such as "p90".

    Raises:
        InputError: anything else.
    """
    try:
        share = float(threshold)
    except (TypeError, ValueError):
        share = -1.0
        found = re.fullmatch(r"p(\d+(?:\.\d+)?)", str(threshold))
        if threshold == "otsu" or (found and float(found[1]) < 100):
            return threshold
    if not 0 <= share < 1:
        raise InputError(f'a threshold is a fraction in [0, 1), "otsu" or "p90", got {threshold!r}')
    return share


def fraction(heat: Heat, share: float) -> Mask:
    """Pixels strictly above a share of the maximum (Zhou et al. 2016, section 3.2, use 0.2).

    Heat that is nowhere positive gives an empty mask.
    """
    if not 0 <= share < 1:
        raise InputError(f"a threshold is a fraction of the maximum in [0, 1), got {share}")
    return heat > share * max(float(heat.max()), 0.0)


def otsu(heat: Heat) -> Mask:
    """The two classes of pixels that differ most (Otsu 1979), on 256 levels between 0 and the maximum."""
    top = float(heat.max())
    if top <= 0:
        return np.zeros(heat.shape, dtype=bool)
    levels = np.round(heat.clip(0) * (255 / top)).astype(np.uint8)
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    mask: Mask = levels > level
    return mask


def percentile(heat: Heat, percent: float) -> Mask:
    """Pixels strictly above a percentile of all of them."""
    if not 0 <= percent < 100:
        raise InputError(f"a percentile is in [0, 100), got {percent}")
    mask: Mask = heat > np.percentile(heat, percent)
    return mask
