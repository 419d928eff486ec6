"""COCO's instances as JSON (Lin et al. 2014): boxes as x, y, width, height; masks as run lengths or polygons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from whatwhere.annotate.formats.polygons import polygons
from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Row

FILE = "instances.json"


def write(found: Annotations, folder: Path) -> None:
    """Masks as uncompressed run lengths, which pycocotools takes. ``score`` is the trust.

    The names of pictures are under the source's root, which ``info`` tells as ``root``.
    """
    _write(found, folder, lambda row: row.mask)


def write_polygons(found: Annotations, folder: Path) -> None:
    """Masks as polygons, within a pixel and with holes filled."""
    _write(found, folder, _outlines)


def _write(found: Annotations, folder: Path, segmentation: Callable[[Row], Any]) -> None:
    with (folder / FILE).open("w", encoding="utf-8") as file:
        told = found.told
        about = f"whatwhere: {told.name}, {told.settings['method']}"
        info = {"description": about, "version": "1", "root": told.root}
        categories = [{"id": index + 1, "name": name, "supercategory": ""} for index, name in told.labels.items()]
        file.write(f'{{"info": {json.dumps(info)}, "licenses": [], "categories": {json.dumps(categories)},\n')
        file.write('"images": [')
        comma = _Comma(file)
        for picture in found:
            if picture.size is not None:
                height, width = picture.size
                image = {"id": picture.image + 1, "file_name": picture.path, "height": height, "width": width}
                comma.write(image)
        file.write('],\n"annotations": [')
        comma = _Comma(file)
        for picture in found:
            for row in picture.regions:
                comma.write(_annotation(row, comma.count + 1, segmentation(row)))
        file.write("]}\n")


def _annotation(row: Row, number: int, segmentation: Any) -> dict[str, Any]:
    assert row.box is not None
    assert row.class_index is not None
    assert row.mask is not None
    return {
        "id": number,
        "image_id": row.image + 1,
        "category_id": row.class_index + 1,
        "bbox": [row.box.x0, row.box.y0, row.box.width, row.box.height],
        "area": sum(row.mask["counts"][1::2]),
        "iscrowd": 0,
        "segmentation": segmentation,
        "score": row.trust,
        "probability": row.probability,
    }


def _outlines(row: Row) -> list[list[float]]:
    assert row.pixels is not None
    return [outline.ravel().tolist() for outline in polygons(row.pixels)]


class _Comma:
    """Values of a JSON list, one a line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0

    def write(self, value: Any) -> None:
        self.file.write((",\n" if self.count else "\n") + json.dumps(value))
        self.count += 1
