"""Folders of classes: ``[split/]class/file``, with ``boxes.csv`` and ``masks/`` beside where there are any.

Pictures in no class's folder have the classes that ``boxes.csv`` gives them.

boxes.csv      path,class,x0,y0,x1,y1: pixel edges of the upright picture, half-open; a row a box
classes.csv    class,name: another word for a class, by which a classifier may know it
masks/         the same paths, with the suffix .png: 255 object, 0 background, anything else is not counted
"""

import csv
from collections import defaultdict
from functools import partial
from pathlib import Path

from whatwhere.datasets.sample import Dataset, Sample, box_of, read_mask
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import image_files, printable
from whatwhere.types import Truth

SPLITS = ("test", "val", "valid", "validation", "train")
"""In the order in which one is taken where none is asked for: what was not trained on comes first."""


def recognizes(root: Path) -> bool:
    """Whether there are folders of pictures."""
    return root.is_dir()


def read(root: Path, split: str | None = None) -> Dataset:
    """Folders of classes, in a folder for each split where there are such.

    Raises:
        DataError: no pictures, or a damaged table; names file and row.
        InputError: there is no such split.
    """
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"masks"}
    found = [name for name in SPLITS if name in folders] if folders <= set(SPLITS) else []
    if split is None and found:
        split = found[0]
    if split is not None and not (root / split).is_dir():
        raise InputError(f"{printable(root)} has no split {split!r}; it has {', '.join(found) or 'none'}")
    base = root / split if split else root
    files = [file for file in image_files(base) if "masks" not in file.relative_to(base).parts[:1]]
    if not files:
        raise DataError(f"{printable(base)}: no image files in this folder")
    rows = _rows(root / "boxes.csv", ("path", "class", "x0", "y0", "x1", "y1"))
    boxed = {row["path"] for row in rows}
    loose = {file for file in files if file.parent == base}
    if lost := [file for file in sorted(loose) if file.relative_to(root).as_posix() not in boxed]:
        raise DataError(
            f"{printable(lost[0])}: wanted it in a folder named after its class, or in a row of boxes.csv"
        )
    # of all splits, so that a class has one number in each
    inner = [path for one in (found if split in found else [""]) for path in (root / one).iterdir() if path.is_dir()]
    names = {path.name for path in inner if not path.name.startswith(".")} - {"masks"}
    names |= {file.relative_to(base).parts[0] for file in files if file not in loose}
    inside = {file.relative_to(root).as_posix() for file in files}
    if rows and not any((root / path).is_file() for path in boxed):
        raise DataError(f"{printable(root)}/boxes.csv: no row's path is a file; the first is {rows[0]['path']}")
    names |= {row["class"] for row in rows if row["path"] in inside}
    classes = tuple(sorted(names))
    index = {name: number for number, name in enumerate(classes)}
    boxes: dict[str, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, 2):
        if row["path"] in inside:
            box = box_of(
                [row[edge] for edge in ("x0", "y0", "x1", "y1")], f"{printable(root)}/boxes.csv, row {number}"
            )
            boxes[row["path"]][index[row["class"]]].append(box)
    samples = []
    for file in files:
        name = file.relative_to(root).as_posix()
        of_classes = {label: tuple(several) for label, several in boxes[name].items()}
        own = set(of_classes) if file in loose else {index[file.relative_to(base).parts[0]]}
        mask = (root / "masks" / file.relative_to(root)).with_suffix(".png")
        truth = partial(_truth, mask, own) if mask.is_file() else None
        samples.append(Sample(name, file, tuple(sorted({*own, *of_classes})), of_classes, read_truth=truth))
    words = {row["class"]: row["name"] for row in _rows(root / "classes.csv", ("class", "name"))}
    synonyms = tuple(tuple(word.strip() for word in words.get(name, "").split(",")) for name in classes)
    title = f"{root.resolve().name}, {split}" if split else root.resolve().name
    return Dataset(title, classes, samples, synonyms if words else ())


def _truth(mask: Path, own: set[int], label: int) -> Truth | None:
    return read_mask(mask, {255: 1, 0: 0}) if label in own else None


def _rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in fields if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{printable(path)}: wanted the columns {', '.join(fields)}; there is no {missing[0]}"
                )
            rows = list(reader)
            for number, row in enumerate(rows, 2):
                if any(row[name] is None for name in fields):
                    raise DataError(f"{printable(path)}, row {number}: wanted {', '.join(fields)}; it is too short")
            return rows
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read: {error}") from error
