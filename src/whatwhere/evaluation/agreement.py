"""How far two maps of one image say the same, whatever their scale."""

from collections.abc import Mapping
from itertools import combinations

import cv2
import numpy as np
from jaxtyping import Float

from whatwhere.evaluation.saliency import EPS
from whatwhere.types import Heat

SIDE = 224
"""Pixels of the longer side at which maps are compared."""


def stretched(heat: Heat, low: float = 1.0, high: float = 99.0) -> Heat:
    """Histogram stretching: two percentiles become 0 and 1, what is beyond is cut; a constant map is 0."""
    least, most = (float(edge) for edge in np.percentile(heat, (low, high)))
    if most <= least:  # a small hot spot in nothing
        least, most = float(heat.min()), float(heat.max())
    found: Heat = ((heat - least) / (most - least)).clip(0, 1) if most > least else np.zeros_like(heat)
    return found


def agreement(one: Heat, other: Heat, share: float = 0.25) -> dict[str, float]:
    """Numbers for two maps (H W) of an image, both stretched.

    Args:
        one: a map.
        other: another.
        share: of its maximum, above which a pixel is in a map's region.

    Returns:
        ``KL``: the mean of both divergences of one from the other, as distributions.
        ``CC``: Pearson's correlation; 0 where a map is constant.
        ``SSIM``: structural similarity (``ssim``).
        ``IoU``: of the regions; 1 where both are empty.
    """
    one, other = stretched(one), stretched(other)
    p, q = (_distribution(heat) for heat in (one, other))
    both = ((p - q) * np.log((p + EPS) / (q + EPS))).sum()
    a, b = one - one.mean(), other - other.mean()
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    regions = one > share * max(one.max(), 1e-9), other > share * max(other.max(), 1e-9)
    union = (regions[0] | regions[1]).sum()
    return {
        "KL": float(both / 2),
        "CC": float((a * b).sum() / spread) if spread > 0 else 0.0,
        "SSIM": ssim(one, other),
        "IoU": float((regions[0] & regions[1]).sum() / union) if union else 1.0,
    }


def _distribution(heat: Heat) -> Float[np.ndarray, "H W"]:
    total = float(heat.sum(dtype=np.float64))
    return heat.astype(np.float64) / total if total > 0 else np.full(heat.shape, 1 / heat.size)


def ssim(one: Heat, other: Heat) -> float:
    """Mean structural similarity of two maps in [0, 1] (Wang, Bovik, Sheikh, Simoncelli, 2004, eq. 13).

    Windows are Gaussian with sigma 1.5, 11 pixels wide, weighted without bias; constants .01 ** 2 and .03 ** 2. Only
    whole windows count; where an image has none it is one.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    moments = [_blurred(part) for part in (a, b, a * a, b * b, a * b)]
    m, n, aa, bb, ab = moments
    numerator = (2 * m * n + 1e-4) * (2 * (ab - m * n) + 9e-4)
    return float((numerator / ((m * m + n * n + 1e-4) * (aa - m * m + bb - n * n + 9e-4))).mean())


def _blurred(values: np.ndarray) -> np.ndarray:
    if min(values.shape) < 11:
        whole: np.ndarray = values.mean(keepdims=True)
        return whole
    blurred: np.ndarray = cv2.GaussianBlur(values, (11, 11), 1.5)
    return blurred[5:-5, 5:-5]


def agreements(heats: Mapping[str, Heat]) -> dict[str, float]:
    """Of every two maps of an image: ``one~other/KL`` and so on.

    Larger maps are brought to SIDE pixels at their longer side, since they come from far coarser ones.
    """
    small = {name: _at_most(heat, SIDE) for name, heat in heats.items()} if len(heats) > 1 else {}
    return {
        f"{one}~{other}/{key}": value
        for one, other in combinations(small, 2)
        for key, value in agreement(small[one], small[other]).items()
    }


def _at_most(heat: Heat, side: int) -> Float[np.ndarray, "h w"]:
    scale = side / max(heat.shape)
    if scale >= 1:
        return heat
    size = max(1, round(heat.shape[1] * scale)), max(1, round(heat.shape[0] * scale))
    smaller: np.ndarray = cv2.resize(heat, size, interpolation=cv2.INTER_AREA)
    return smaller
