"""CUB-200-2011 as it is published (Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001)."""

from functools import partial
from pathlib import Path

from whatwhere.datasets.sample import Dataset, Sample, box_of, lines_of, read_mask, the_file
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import printable
from whatwhere.types import Truth


def recognizes(root: Path) -> bool:
    """The folder with ``images.txt`` and ``bounding_boxes.txt``, or the one that it is in."""
    return _home(root) is not None


def _home(root: Path) -> Path | None:
    files = ("images.txt", "image_class_labels.txt", "bounding_boxes.txt")
    homes = (root, root / "CUB_200_2011")
    return next((home for home in homes if all((home / name).is_file() for name in files)), None)


def read(root: Path, split: str | None = None) -> Dataset:
    """The test or the training pictures; masks where ``segmentations`` lies beside ``images`` or beside the folder.

    Raises:
        DataError: a damaged file.
        InputError: no such split.
    """
    root, split = _home(root) or root, split or "test"
    if split not in {"train", "test"}:
        raise InputError(f"{printable(root)} has no split {split!r}; it has train, test")
    files = _table(root / "images.txt")
    classes = {int(one): words[0] for one, words in _table(root / "classes.txt").items()}
    order = sorted(classes)
    labels, boxes = _table(root / "image_class_labels.txt"), _table(root / "bounding_boxes.txt")
    training = _table(root / "train_test_split.txt")
    masks = next((path for base in (root, root.parent) if (path := base / "segmentations").is_dir()), None)
    samples = []
    for number, (file, *_) in files.items():
        try:
            if (training[number][0] == "1") != (split == "train"):
                continue
            label, box = order.index(int(labels[number][0])), _box(boxes[number], number)
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"{printable(root)}: image {number} is missing from one of its tables: {error}"
            ) from error
        mask = (masks / file).with_suffix(".png") if masks else None
        truth = partial(_truth, mask) if mask and mask.is_file() else None
        samples.append(Sample(file, root / "images" / file, (label,), {label: (box,)}, read_truth=truth))
    names = tuple(classes[number] for number in order)
    plain = tuple((name.partition(".")[2].replace("_", " "),) for name in names)
    return Dataset(f"CUB-200-2011, {split}", names, samples, plain)


def _table(path: Path) -> dict[str, list[str]]:
    return {number: words for number, *words in lines_of(the_file(path))}


def _box(words: list[str], number: str) -> Box:
    x, y, width, height = map(float, words)
    return box_of((x, y, x + width, y + height), f"bounding_boxes.txt, image {number}")


def _truth(mask: Path, label: int) -> Truth:
    # values count the annotators that saw the bird there, in steps up to 255: most of them
    return read_mask(mask, {value: int(value > 127) for value in range(256)})
