"""Tiny-ImageNet-200 as it is published: 64 x 64 pictures with boxes whose last pixel is counted in."""

from pathlib import Path

from whatwhere.datasets.sample import Dataset, Sample, box_of, lines_of, the_file
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import image_files, printable


def recognizes(root: Path) -> bool:
    """The folder with ``wnids.txt``."""
    return (root / "wnids.txt").is_file()


def read(root: Path, split: str | None = None) -> Dataset:
    """The validation or the training pictures; the test ones have no labels.

    Raises:
        DataError: a damaged file; names file and line.
        InputError: no such split.
    """
    split = split or "val"
    if split not in {"val", "train"} or not (root / split).is_dir():
        known = [name for name in ("val", "train") if (root / name).is_dir()]
        raise InputError(f"{printable(root)} has no split {split!r}; it has {', '.join(known) or 'none'}")
    classes = tuple(sorted(words[0] for words in lines_of(root / "wnids.txt")))
    notes = {root / "val" / "val_annotations.txt": ""}
    if split == "train":
        notes = {root / "train" / name / f"{name}_boxes.txt": name for name in classes}
    placed: dict[str, tuple[int, Box]] = {}
    for path, name in notes.items():
        for number, (own_file, *words) in enumerate(lines_of(the_file(path)), 1):
            own = [name, *words] if name else words
            if len(own) != 5 or own[0] not in classes:
                raise DataError(f"{printable(path)}, line {number}: wanted a file, its class and its box")
            where = f"{printable(path)}, line {number}"
            try:
                high = [float(edge) + 1 for edge in own[3:]]
            except ValueError:
                raise DataError(f"{where}: wanted a box x0 y0 x1 y1, got {' '.join(own[1:])}") from None
            placed[own_file] = (classes.index(own[0]), box_of([*own[1:3], *high], where))
    samples = []
    for file in image_files(root / split):
        if file.name not in placed:
            raise DataError(f"{printable(file)}: no line says its class and its box")
        label, box = placed[file.name]
        samples.append(Sample(file.relative_to(root).as_posix(), file, (label,), {label: (box,)}))
    named = {}
    if (root / "words.txt").is_file():
        lines = (root / "words.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        named = dict(line.split("\t", 1) for line in lines if "\t" in line)
    synonyms = tuple(tuple(word.strip() for word in named.get(name, name).split(",")) for name in classes)
    return Dataset(f"Tiny-ImageNet-200, {split}", classes, samples, synonyms)
