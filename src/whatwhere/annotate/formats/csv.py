"""A table: a row a region, and a row for each picture without one."""

import csv
import json
from pathlib import Path

from whatwhere.annotate.parts import Annotations

FILE = "annotations.csv"
COLUMNS = (
    "path", "sha256", "width", "height", "class", "probability", "trust", "x0", "y0", "x1", "y1", "rle", "error",
)  # fmt: skip


def write(found: Annotations, folder: Path) -> None:
    """Edges of boxes half-open; masks as COCO's uncompressed run lengths; UTF-8, lines as in RFC 4180."""
    with (folder / FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\r\n")
        table.writeheader()
        for picture in found:
            height, width = picture.size or ("", "")
            told = {"path": picture.path, "sha256": picture.sha256, "width": width, "height": height}
            if not picture.regions:
                table.writerow(told | {"error": picture.error})
            for row in picture.regions:
                values = {"class": row.label, "probability": row.probability, "trust": row.trust}
                edges = {edge: f"{getattr(row, edge):.12g}" for edge in ("x0", "y0", "x1", "y1")}
                table.writerow(told | values | edges | {"rle": json.dumps(row.mask)})
