"""Oxford-IIIT Pet as it is published, with trimaps (Parkhi et al., Cats and Dogs, CVPR 2012).

Its XML files have boxes around heads; the boxes here are around the whole animal, from the trimap.
"""

from functools import partial
from pathlib import Path

from whatwhere.datasets.sample import Dataset, Sample, lines_of, read_mask
from whatwhere.errors import DataError, InputError
from whatwhere.images import printable
from whatwhere.types import Truth


def recognizes(root: Path) -> bool:
    """The folder with ``images`` and ``annotations``, or the one that it is in, as torchvision has it."""
    return _home(root) is not None


def read(root: Path, split: str | None = None) -> Dataset:
    """The pictures of ``annotations/test.txt`` or ``trainval.txt``.

    Raises:
        DataError: a damaged file; names file and line.
        InputError: no such split.
    """
    home, split = _home(root), split or "test"
    split = "trainval" if split == "train" else split
    if home is None or not (home / "annotations" / f"{split}.txt").is_file():
        raise InputError(f"{printable(root)} has no split {split!r}; it has test and trainval")
    names: dict[int, str] = {}
    rows = []
    for list_ in ("trainval", "test"):
        path = home / "annotations" / f"{list_}.txt"
        for number, words in enumerate(lines_of(path) if path.is_file() else [], 1):
            if len(words) < 2 or not words[1].isdecimal():
                raise DataError(f"{printable(path)}, line {number}: wanted a picture and the number of its class")
            names[int(words[1])] = words[0].rpartition("_")[0]
            rows += [(words[0], int(words[1]))] if list_ == split else []
    order = sorted(names)
    samples = []
    for stem, number in rows:
        trimap = home / "annotations" / "trimaps" / f"{stem}.png"
        truth = partial(_truth, trimap) if trimap.is_file() else None
        path = home / "images" / f"{stem}.jpg"
        samples.append(Sample(f"images/{path.name}", path, (order.index(number),), read_truth=truth))
    return Dataset(f"Oxford-IIIT Pet, {split}", tuple(names[number] for number in order), samples)


def _home(root: Path) -> Path | None:
    for home in (root, root / "oxford-iiit-pet"):
        if (home / "annotations" / "trainval.txt").is_file() and (home / "images").is_dir():
            return home
    return None


def _truth(trimap: Path, label: int) -> Truth:
    return read_mask(trimap, {1: 1, 2: 0, 3: -1})
