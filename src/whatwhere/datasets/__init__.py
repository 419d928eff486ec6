"""Pictures and what is known of them: one file a layout, ``read(root, split) -> Dataset``."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from whatwhere.datasets import coco, cub, folder, imagenet, pets, places, tiny_imagenet, voc, yolo
from whatwhere.datasets.sample import Dataset, Sample
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.images import printable

__all__ = ["LAYOUTS", "Dataset", "Sample", "open_dataset", "open_splits", "read_mapping", "read_pairs"]

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


def open_splits(root: str | Path, splits: Sequence[str] = (), layout: str | None = None) -> Dataset:
    """Several splits as one data set, whose samples say their split; boxes and masks are left out.

    Args:
        root: its folder or file.
        splits: as they are called there; by default all of the usual names, or a folder without any.
        layout: as of ``open_dataset``.

    Raises:
        DataError: there is nothing, or something that cannot be read; names the file.
        InputError: no such layout or split.
    """
    root, found = Path(root), dict[str, Dataset]()
    plain = None if splits else open_dataset(root, None, layout)
    if plain and root.suffix.lower() == ".json":  # one file, whatever split is asked for
        return plain
    damaged: DataError | None = None
    for name in splits or USUAL:
        try:
            found[name] = open_dataset(root, name, layout)
        except (InputError, DataError) as error:
            if splits:
                raise
            damaged = error if isinstance(error, DataError) else damaged
    samples, names = dict[Path, Sample](), set[str]()
    every = dict.fromkeys(name for one in found.values() for name in one.classes)
    numbers = {name: number for number, name in enumerate(every)}
    words = dict[str, tuple[str, ...]]()
    for split, one in found.items():
        words |= dict(zip(one.classes, one.synonyms, strict=False))
        for sample in one:
            if sample.path not in samples:
                labels = tuple(sorted(numbers[one.classes[label]] for label in sample.labels))
                name = f"{split}/{sample.name}" if sample.name in names else sample.name
                names.add(name)
                samples[sample.path] = replace(
                    sample, name=name, labels=labels, boxes={}, read_truth=None, split=split
                )
    if plain and not samples.keys() >= {sample.path for sample in plain}:  # what looked like a split is a class
        return plain
    if damaged:
        raise damaged
    title = f"{root.resolve().name}, {', '.join(found)}"
    return Dataset(title, tuple(numbers), list(samples.values()), tuple(words.get(name, ()) for name in numbers))


USUAL = ("train", "trainval", "val", "valid", "validation", "test")
"""Names of splits, what is trained on first."""


def read_mapping(path: Path) -> dict[str, int | str]:
    """The first two columns of a CSV file with a first row: a data set's class, and a classifier's, name or index.

    Raises:
        DataError: it cannot be read, or a row has no two columns.
    """
    found = read_pairs(path, "a class of the data set and of the model")
    return {name: int(word) if word.isdecimal() else word for name, word in found.items()}


def read_pairs(path: Path, what: str) -> dict[str, str]:
    """The first two columns of a CSV file with a first row.

    Raises:
        DataError: it cannot be read, or a row has no two columns; says what was wanted in them.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read: {error}") from error
    short = next((number for number, row in enumerate(rows, 2) if len(row) < 2), None)
    if short:
        raise DataError(f"{printable(path)}, row {short}: wanted two columns, {what}")
    return {row[0]: row[1].strip() for row in rows}
