"""YOLO's layout: ``images/``, ``labels/`` of the same names, ``data.yaml``; a line a region, in shares of sides."""

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from whatwhere.annotate.formats.beside import Pictures
from whatwhere.annotate.formats.polygons import polygons
from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Row

Size = tuple[int, int]


def write(found: Annotations, folder: Path) -> None:
    """For detection: class, then centre and sides of the box."""
    _write(found, folder, _box)


def write_polygons(found: Annotations, folder: Path) -> None:
    """For segmentation: class, then the corners of a polygon, within a pixel and with holes filled."""
    _write(found, folder, _outlines)


def _write(found: Annotations, folder: Path, lines: Callable[[Row, Size], Iterator[list[float]]]) -> None:
    """Pictures without a region are left out: an empty file would say that there is nothing in them."""
    pictures = Pictures(found, folder / "images")
    numbers = {index: number for number, index in enumerate(found.told.labels)}
    (folder / "labels").mkdir()
    for picture in found:
        if picture.size is None or not picture.regions:
            continue
        _, label = pictures.put(picture, folder / "labels", ".txt")
        with label.open("w", encoding="ascii") as file:
            for row in picture.regions:
                assert row.class_index is not None
                for values in lines(row, picture.size):
                    file.write(
                        " ".join([str(numbers[row.class_index]), *(f"{value:.6f}" for value in values)]) + "\n"
                    )
    told = {"train": "images", "val": "images", "names": dict(enumerate(found.told.labels.values()))}
    # it has no path: the folders are beside it, and "." would be where the reader runs
    (folder / "data.yaml").write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _box(row: Row, size: Size) -> Iterator[list[float]]:
    assert row.box is not None
    (height, width), box = size, row.box
    yield [(box.x0 + box.x1) / 2 / width, (box.y0 + box.y1) / 2 / height, box.width / width, box.height / height]


def _outlines(row: Row, size: Size) -> Iterator[list[float]]:
    assert row.pixels is not None
    for outline in polygons(row.pixels):
        yield [side for x, y in outline for side in (float(x) / size[1], float(y) / size[0])]
