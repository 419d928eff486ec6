"""An explanation under another threshold, and what a person takes home of it; without a new look."""

import io
import json
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from whatwhere.explanation import Explanation
from whatwhere.regions.components import components
from whatwhere.regions.rle import encode
from whatwhere.regions.threshold import Threshold
from whatwhere.reports.picture import outline, overlay
from whatwhere.types import Pixels

_LONGEST = 16_383  # pixels of a side that WebP holds


def at_threshold(one: Explanation, threshold: Threshold) -> Explanation:
    """The same explanation with another threshold; its heat, which may have cost much, goes with it."""
    found = replace(one, threshold=threshold)
    vars(found)["heat"] = one.heat  # where the cached property keeps it
    return found


def shown(one: Explanation, opacity: float) -> Pixels:
    """The heat over the picture and the boxes around it, (H W 3) in the original's pixels."""
    picture = Image.fromarray(overlay(one, opacity=opacity))
    pen, thick = ImageDraw.Draw(picture), max(2, round(max(one.size) / 240))
    for rank, box in reversed(list(enumerate(one.boxes))):
        outline(pen, box, (255, 255, 255), thick=thick if rank == 0 else max(1, thick // 3))
    return np.asarray(picture)


def reduced(pixels: Pixels) -> UInt8[np.ndarray, "h w 3"]:
    """A picture no longer than a page's WebP may be, in proportion."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST, _LONGEST))
    return np.asarray(picture)


def as_png(pixels: UInt8[np.ndarray, "H W ..."]) -> bytes:
    """A picture's file; (H W) becomes a grey one."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def as_npy(one: Explanation) -> bytes:
    """The heat as NumPy's file: (H W) float32 in [0, 1]."""
    out = io.BytesIO()
    np.save(out, one.heat.astype(np.float32), allow_pickle=False)
    return out.getvalue()


def as_coco(one: Explanation) -> bytes:
    """The regions as COCO's annotations of one image: a box [x, y, width, height] and a mask each, largest first."""
    height, width = one.size
    parts = components(one.mask)
    annotations = [
        {
            "id": number + 1,
            "image_id": 1,
            "category_id": one.index + 1,
            "bbox": [box.x0, box.y0, box.width, box.height],
            "segmentation": encode(parts.mask(number)),
            "area": int(parts.mask(number).sum()),
            "iscrowd": 0,
            "score": one.probability,
        }
        for number, box in enumerate(parts.boxes)
    ]
    found = {
        "images": [{"id": 1, "file_name": "image.png", "width": width, "height": height}],
        "categories": [{"id": one.index + 1, "name": one.label}],
        "annotations": annotations,
    }
    return json.dumps(found).encode()
