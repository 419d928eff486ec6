"""Rows -> files that labelling and training tools read. One file a format: (annotations, empty folder) -> files."""

from collections.abc import Callable
from pathlib import Path

from whatwhere.annotate.formats import coco, csv, cvat, labelstudio, voc, yolo
from whatwhere.annotate.parts import Annotations

Format = Callable[[Annotations, Path], None]
FORMATS: dict[str, Format] = {
    "coco": coco.write,
    "coco-polygons": coco.write_polygons,
    "csv": csv.write,
    "cvat": cvat.write,
    "labelstudio": labelstudio.write,
    "voc": voc.write,
    "yolo": yolo.write,
    "yolo-seg": yolo.write_polygons,
}
