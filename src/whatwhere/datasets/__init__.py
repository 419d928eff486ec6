"""Pictures and what is known of them: one file a layout, ``read(root, split) -> Dataset``."""

import csv
from pathlib import Path
from types import ModuleType

from whatwhere.datasets import coco, cub, folder, imagenet, pets, places, tiny_imagenet, voc, yolo
from whatwhere.datasets.sample import Dataset, Sample
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.images import printable

__all__ = ["LAYOUTS", "Dataset", "Sample", "open_dataset", "read_mapping"]

LAYOUTS: dict[str, ModuleType] = {
    "coco": coco,
    "voc": voc,
    "yolo": yolo,
    "imagenet": imagenet,
    "cub": cub,
    "tiny-imagenet": tiny_imagenet,
    "pets": pets,
    "places": places,
    "folder": folder,
}
"""By name; of several that recognize a folder the first."""


def open_dataset(root: str | Path, split: str | None = None, layout: str | None = None) -> Dataset:
    """A data set of any layout known here.

    Args:
        root: its folder or file.
        split: as it is called there; by default what was not trained on: test, or else val.
        layout: a name in ``LAYOUTS``; by default what the files look like.

    Raises:
        DataError: there is nothing, or something that cannot be read; names the file.
        InputError: no such layout or split.
    """
    root = Path(root)
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"no layout is called {layout!r}; nearest: {nearest(layout, LAYOUTS)}")
    if not root.exists():
        raise DataError(f"{printable(root)}: there is no such file or folder")
    for name, module in LAYOUTS.items():
        if name == layout or (layout is None and module.recognizes(root)):
            found: Dataset = module.read(root, split)
            if not found.samples:
                raise DataError(f"{printable(root)}: no pictures in it")
            return found
    raise DataError(f"{printable(root)}: neither a folder of pictures nor one of {', '.join(LAYOUTS)}")


def read_mapping(path: Path) -> dict[str, int | str]:
    """The first two columns of a CSV file with a first row: a data set's class, and a classifier's, name or index.

    Raises:
        DataError: it cannot be read, or a row has no two columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read: {error}") from error
    short = next((number for number, row in enumerate(rows, 2) if len(row) < 2), None)
    if short:
        raise DataError(
            f"{printable(path)}, row {short}: wanted two columns, a class of the data set and of the model"
        )
    return {row[0]: int(row[1]) if row[1].strip().isdecimal() else row[1].strip() for row in rows}
