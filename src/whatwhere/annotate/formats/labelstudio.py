"""Label Studio's tasks with predictions, as JSON: a rectangle and a brush a region, in per cent of the sides.

The brush is the packing of Label Studio's own editor (``rle-pack`` of @thi.ng/umbrella), of all four channels.
"""

import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Picture, Row

TASKS, CONFIG = "tasks.json", "label_config.xml"
LENGTHS = (3, 4, 8, 16)
"""Bits in which lengths of runs are packed: the shortest that holds one."""


def write(found: Annotations, folder: Path) -> None:
    """``tasks.json``, and ``label_config.xml`` for the project.

    Pictures are named as local files, ``/data/local-files/?d=...``, from the folder that holds the source's root, or
    from ``/`` where a list names them elsewhere; those at an address in a store by that address.
    """
    with (folder / TASKS).open("w", encoding="utf-8") as file:
        file.write("[")
        comma = "\n"
        for picture in found:
            if picture.size is not None:
                file.write(comma + json.dumps(_task(picture, found.told.root, found.told.version)))
                comma = ",\n"
        file.write("\n]\n")
    (folder / CONFIG).write_bytes(_config(found.told.labels.values()))


def _task(picture: Picture, root: str, model: str) -> dict[str, Any]:
    return {"data": {"image": _address(root, picture.path)}, "predictions": [prediction(picture, model)]}


def _address(root: str, path: str) -> str:
    if "://" in path:
        return path
    if "://" in root:
        return f"{root}/{path}"
    root = Path(root).as_posix()
    held = posixpath.dirname(root).rstrip("/") + "/"
    name = posixpath.normpath(posixpath.join(root, path)).removeprefix(held).lstrip("/")
    return f"/data/local-files/?d={quote(os.fsencode(name))}"


def prediction(picture: Picture, model: str) -> dict[str, Any]:
    """Label Studio's prediction of a picture: its regions, and the trust in the most trusted.

    Args:
        picture: one that could be used.
        model: what Label Studio calls the model, and tells its predictions from others' by.
    """
    results = [one for number, row in enumerate(picture.regions) for one in _results(picture, row, number)]
    score = max((row.trust or 0.0 for row in picture.regions), default=0.0)
    return {"model_version": model, "score": score, "result": results}


def _results(picture: Picture, row: Row, number: int) -> Iterator[dict[str, Any]]:
    assert picture.size is not None
    assert row.box is not None
    assert row.mask is not None
    (height, width), box = picture.size, row.box
    both: dict[str, Any] = {
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": row.trust,
    }
    rectangle = {
        "x": 100 * box.x0 / width,
        "y": 100 * box.y0 / height,
        "width": 100 * box.width / width,
        "height": 100 * box.height / height,
        "rotation": 0,
        "rectanglelabels": [row.label],
    }
    yield both | {"id": f"box-{number}", "type": "rectanglelabels", "from_name": "box", "value": rectangle}
    brush = {"format": "rle", "rle": list(packed(row.mask)), "brushlabels": [row.label]}
    yield both | {"id": f"mask-{number}", "type": "brushlabels", "from_name": "mask", "value": brush}


def packed(mask: dict[str, Any]) -> bytes:
    """COCO's run lengths (column by column) -> the editor's packing of 0 and 255 (row by row, four channels)."""
    from whatwhere.regions.rle import decode, encode

    height, width = mask["size"]
    turned = encode(decode(mask).T)["counts"]  # row by row
    bits = [f"{4 * height * width:032b}", f"{8 - 1:05b}", *(f"{length - 1:04b}" for length in LENGTHS)]
    value = 0
    for run in turned:
        left = 4 * run
        while left > 0:
            some = min(left, 1 << LENGTHS[-1])
            kind = next(i for i, length in enumerate(LENGTHS) if some <= 1 << length)
            bits.append(f"1{kind:02b}{some - 1:0{LENGTHS[kind]}b}{value:08b}")
            left -= some
        value = 255 - value
    text = "".join(bits)
    size = -(-len(text) // 8)
    return int(text.ljust(8 * size, "0"), 2).to_bytes(size, "big")


def _config(labels: Any) -> bytes:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image", zoom="true")
    names = list(dict.fromkeys(labels))
    for tag, name in (("RectangleLabels", "box"), ("BrushLabels", "mask")):
        group = ElementTree.SubElement(view, tag, name=name, toName="image")
        for label in names:
            ElementTree.SubElement(group, "Label", value=label)
    ElementTree.indent(view)
    found: bytes = ElementTree.tostring(view, encoding="utf-8")
    return found
