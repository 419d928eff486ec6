"""Oxford-IIIT Pet as it is published, with trimaps (Parkhi et al., Cats and Dogs, CVPR 2012).

Its XML files have boxes around heads; the boxes here are around the whole animal, from the trimap.
"""

from functools import partial
from pathlib import Path

from torchvision.datasets import OxfordIIITPet

from whatwhere.datasets.sample import Dataset, Sample, read_mask
from whatwhere.errors import DataError, InputError
from whatwhere.images import printable
from whatwhere.types import Truth


def recognizes(root: Path) -> bool:
    """The folder ``oxford-iiit-pet``, or the one that it is in."""
    return _home(root) is not None


def read(root: Path, split: str | None = None) -> Dataset:
    """The pictures of ``annotations/test.txt`` or ``trainval.txt``.

    Raises:
        DataError: a damaged file.
        InputError: no such split.
    """
    home, split = _home(root), split or "test"
    split = "trainval" if split == "train" else split
    if home is None or not (home / "annotations" / f"{split}.txt").is_file():
        raise InputError(f"{printable(root)} has no split {split!r}; it has test and trainval")
    try:
        there = OxfordIIITPet(str(home.parent), split=split, target_types="category")
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{printable(home)}: {error}") from error
    samples = []
    for path, label in zip(map(Path, there._images), there._labels, strict=True):
        trimap = home / "annotations" / "trimaps" / f"{path.stem}.png"
        truth = partial(_truth, trimap) if trimap.is_file() else None
        samples.append(Sample(f"images/{path.name}", path, (int(label),), read_truth=truth))
    return Dataset(f"Oxford-IIIT Pet, {split}", tuple(there.classes), samples)


def _home(root: Path) -> Path | None:
    for home in (root, root / "oxford-iiit-pet"):
        if (home / "annotations" / "trainval.txt").is_file() and (home / "images").is_dir():
            return home if home.name == "oxford-iiit-pet" else None
    return None


def _truth(trimap: Path, label: int) -> Truth:
    return read_mask(trimap, {1: 1, 2: 0, 3: -1})
