"""Maps against the truth as distributions: the pointing games, and the metrics of saliency benchmarks.

After Bylinskii, Judd, Oliva, Torralba, Durand: What Do Different Evaluation Metrics Tell Us About Saliency Models?
(TPAMI 2019). The truth is uniform on the object. Pixels of which it is not known are left out.
"""

import math

import cv2
import numpy as np

from whatwhere.types import Heat, Truth

EPS = 1e-7


def saliency(heat: Heat, truth: Truth) -> dict[str, float]:
    """Numbers of one image; nan where the truth has no object, or nothing beside it.

    Args:
        heat: not negative.
        truth: 1 on the object, 0 off it, -1 where that is not known.

    Returns:
        ``pointing``: 1 where the hottest pixel lies on the object (Zhang et al., Top-down Neural Attention, ECCV
        2016), 0 where the map is constant; pixels not known count as missed.
        ``energy``: share of the heat that lies on it (Wang et al., Score-CAM, 2020, section 4.2).
        ``KL``: divergence of the map from the truth, sum of q log(q / (p + EPS) + EPS), both summing to 1.
        ``CC``: Pearson's correlation of map and truth.
        ``SIM``: sum of the smaller of both, which sum to 1.
        ``NSS``: mean on the object of the map, less its mean, over its standard deviation.
    """
    heat = heat.astype(np.float32, copy=False)
    known, on = (truth >= 0).view(np.uint8), (truth == 1).view(np.uint8)
    n, total = cv2.countNonZero(on), cv2.countNonZero(known)
    if not 0 < n < total:
        return dict.fromkeys(("pointing", "energy", "KL", "CC", "SIM", "NSS"), math.nan)
    (mean,), (spread,) = (part.ravel().tolist() for part in cv2.meanStdDev(heat, mask=known))
    hit = bool(on.ravel()[heat.argmax()]) and spread > 0
    inside = heat[on.view(bool)].astype(np.float64)
    # a map of nothing is the uniform one
    p = inside / (mean * total) if mean > 0 else np.full(n, 1 / total)
    raised = (float(inside.mean()) - mean) / spread if spread > 0 else 0.0
    share = n / total
    return {
        "pointing": float(hit),
        "energy": float(p.sum()),
        "KL": float(np.log(1 / n / (p + EPS) + EPS).mean()),
        "CC": raised * math.sqrt(share / (1 - share)),
        "SIM": float(np.minimum(p, 1 / n).sum()),
        "NSS": raised,
    }
