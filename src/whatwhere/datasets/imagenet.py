"""ImageNet-LOC as it is published: ``ILSVRC/Data/CLS-LOC``, ``ILSVRC/Annotations/CLS-LOC``, tables of boxes beside.

Boxes are taken as pixel edges: they begin at 0 and reach the picture's width. Where there is an XML file it is read,
for pictures without one the table ``LOC_val_solution.csv`` or ``LOC_train_solution.csv``.
"""

import csv
from collections import defaultdict
from pathlib import Path

from whatwhere.datasets.sample import Boxes, Dataset, Sample, box_of
from whatwhere.datasets.voc import objects_in
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import image_files, printable


def recognizes(root: Path) -> bool:
    """Kaggle's folder, or ``ILSVRC`` in it."""
    return any((base / "Data" / "CLS-LOC").is_dir() for base in (root, root / "ILSVRC"))


def read(root: Path, split: str | None = None) -> Dataset:
    """The validation or the training pictures; the test ones have no labels.

    Raises:
        DataError: a damaged file, or a picture of which no class is known; names file and row.
        InputError: no such split.
    """
    base = root if (root / "Data").is_dir() else root / "ILSVRC"
    known = [name for name in ("val", "train") if (base / "Data" / "CLS-LOC" / name).is_dir()]
    split = split or next(iter(known), None)
    if split not in known:
        raise InputError(f"{printable(root)} has no split {split!r}; it has {', '.join(known) or 'none'}")
    folder, notes = base / "Data" / "CLS-LOC" / split, base / "Annotations" / "CLS-LOC" / split
    table = _table(base.parent / f"LOC_{split}_solution.csv")
    found = []
    for file in image_files(folder):
        place = file.relative_to(folder)
        written = next(
            (path for path in (notes / place, notes / place.name) if path.with_suffix(".xml").is_file()), None
        )
        if written:
            size, boxes, _ = objects_in(written.with_suffix(".xml"), first=0)
        else:
            size, boxes = None, table.get(file.stem, {})
        names = set(boxes) or ({place.parts[0]} if len(place.parts) > 1 else set())
        if not names:
            raise DataError(f"{printable(file)}: neither a folder, an XML file nor a table says its class")
        found.append((place.as_posix(), file, size, boxes, names))
    mapping = next(iter(base.parent.glob("LOC_synset_mapping.txt")), None)
    words = _words(mapping) if mapping else {}
    classes = tuple(sorted({name for *_, names in found for name in names} | set(words)))
    index = {name: number for number, name in enumerate(classes)}
    samples = [
        Sample(
            name,
            file,
            tuple(sorted(index[one] for one in names)),
            {index[one]: several for one, several in boxes.items()},
            size,
        )
        for name, file, size, boxes, names in found
    ]
    return Dataset(f"ImageNet, {split}", classes, samples, tuple(words.get(name, ()) for name in classes))


def _table(path: Path) -> dict[str, dict[str, Boxes]]:
    """Rows of an id and groups of five words: class x0 y0 x1 y1."""
    if not path.is_file():
        return {}
    table = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            words = (row.get("PredictionString") or "").split()
            if len(words) % 5:
                raise DataError(f"{printable(path)}, row {number}: wanted groups of class x0 y0 x1 y1")
            boxes: dict[str, list[Box]] = defaultdict(list)
            for at in range(0, len(words), 5):
                where = f"{printable(path)}, row {number}"
                boxes[words[at]].append(box_of(words[at + 1 : at + 5], where))
            table[row.get("ImageId") or ""] = {name: tuple(several) for name, several in boxes.items()}
    return table


def _words(path: Path) -> dict[str, tuple[str, ...]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return {pair[0]: tuple(word.strip() for word in pair[-1].split(",")) for pair in pairs}
