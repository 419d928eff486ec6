"""Places365 as it is published: a list of files and classes; no boxes (Zhou et al., Places, TPAMI 2017)."""

from pathlib import Path

from whatwhere.datasets.sample import Dataset, Sample, lines_of
from whatwhere.errors import DataError, InputError
from whatwhere.images import printable

_CATEGORIES = "categories_places365.txt"
_LISTS = {"val": ("places365_val.txt",), "train": ("places365_train_standard.txt", "places365_train_challenge.txt")}
_FOLDERS = {
    "val": ("val_256", "val_large", "val"),
    "train": ("data_256_standard", "data_256", "data_large_standard", "train"),
}


def recognizes(root: Path) -> bool:
    """The folder with ``categories_places365.txt``."""
    return (root / _CATEGORIES).is_file()


def read(root: Path, split: str | None = None) -> Dataset:
    """The validation or the training pictures.

    Raises:
        DataError: a damaged file; names file and line.
        InputError: no such split.
    """
    known = {
        name: (root / list_, root / folder)
        for name in _LISTS
        for list_ in reversed(_LISTS[name])
        for folder in reversed(_FOLDERS[name])
        if (root / list_).is_file() and (root / folder).is_dir()
    }
    split = split or next(iter(known), "val")
    if split not in known:
        raise InputError(f"{printable(root)} has no split {split!r}; it has {', '.join(known) or 'none'}")
    # "/a/airfield 0": a letter, a name, sometimes where it is seen from
    names = {}
    for row, words in enumerate(lines_of(root / _CATEGORIES), 1):
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f"{printable(root / _CATEGORIES)}, line {row}: wanted a class and its number")
        names[int(words[1])] = words[0].strip("/").partition("/")[2]
    order, (table, folder) = sorted(names), known[split]
    samples = []
    for row, words in enumerate(lines_of(table), 1):
        if len(words) != 2 or not words[1].isdecimal() or int(words[1]) not in names:
            raise DataError(f"{printable(table)}, line {row}: wanted a file and the number of its class")
        file = words[0].lstrip("/")
        samples.append(Sample(file, folder / file, (order.index(int(words[1])),)))
    return Dataset(f"Places365, {split}", tuple(names[number] for number in order), samples)
