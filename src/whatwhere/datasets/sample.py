"""A data set: pictures, and what is known of them without looking: classes, boxes, masks."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from whatwhere.classifiers.labels import Labels
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import Photo, open_photo, printable
from whatwhere.types import Size, Truth

Boxes = tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture of a data set. Its files are read when they are asked for.

    Attributes:
        name: unique in the data set, and the same on every machine: the path below its root.
        path: the picture's file.
        labels: the classes that it shows, as indices into the data set's.
        boxes: of a class, its boxes in pixels of the picture; a class without any is missing.
        size: (H, W) that the annotations say the picture has, where they do.
        read_truth: class -> mask, where there are masks; None for a class without one.
        split: which it is in, where several are looked at together.
    """

    name: str
    path: Path
    labels: tuple[int, ...]
    boxes: Mapping[int, Boxes] = field(default_factory=dict)
    size: Size | None = None
    read_truth: Callable[[int], Truth | None] | None = None
    split: str = ""

    def photo(self) -> Photo:
        """The picture.

        Raises:
            DataError: it cannot be read, or has another size than its annotations are for.
        """
        photo = open_photo(self.path, name=self.name)
        if self.size and self.size != photo.size:
            raise DataError(
                f"{self.name}: its annotations are for {self.size[1]} x {self.size[0]} pixels, and it has "
                f"{photo.size[1]} x {photo.size[0]}"
            )
        return photo

    def truth(self, label: int, size: Size) -> Truth | None:
        """The mask of a class: 1 on it, 0 off it, -1 where that is not known; None where there is no mask.

        Raises:
            DataError: it cannot be read, or has another size than the picture.
        """
        truth = self.read_truth(label) if self.read_truth else None
        if truth is not None and truth.shape != size:
            raise DataError(f"{self.name}: its mask has (H, W) {truth.shape}, and the picture {size}")
        return truth

    def boxes_of(self, label: int, truth: Truth | None) -> Boxes:
        """The boxes of a class, or where it has none the one around its mask."""
        around = None if truth is None or label in self.boxes else box_around(truth)
        return (around,) if around else self.boxes.get(label, ())


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and the names of their classes.

    Attributes:
        name: for people.
        classes: their names, as the data set has them.
        samples: in an order that never changes.
        synonyms: other words for each class, by which a classifier may know it.
    """

    name: str
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def sampled(self, count: int) -> "Dataset":
        """So many of its samples, drawn without order, always the same ones, in the order that they have.

        Raises:
            InputError: less than 1.
        """
        if count < 1:
            raise InputError(f"wanted at least 1 image, got {count}")
        if count >= len(self.samples):
            return self
        drawn = sorted(random.Random(0).sample(range(len(self.samples)), count))
        return replace(self, name=f"{self.name}, {count} images", samples=[self.samples[number] for number in drawn])

    def indices_in(self, labels: Labels, known: Mapping[str, int | str] | None = None) -> dict[int, int]:
        """Which of a classifier's classes each class is: by ``known``, or by name and synonyms.

        Classes that a classifier does not have are missing.

        Raises:
            InputError: ``known`` names a class that one of the two does not have, or no class is found at all.
        """
        unknown = [name for name in known or {} if name not in self.classes]
        if unknown:
            raise InputError(f"{self.name} has no class {unknown[0]!r}, of {len(unknown)} such in the mapping")
        found = {}
        for index, name in enumerate(self.classes):
            if known and name in known:
                found[index] = labels.find(known[name])
                continue
            words = (name, name.replace("_", " "), *(self.synonyms[index] if self.synonyms else ()))
            for word in words:
                if word.strip().isdecimal() and word not in labels:  # a number is not meant as the classifier's
                    continue
                try:
                    found[index] = labels.find(word)
                    break
                except InputError:
                    continue
        if not found:
            raise InputError(
                f"the classifier knows none of the classes of {self.name}: {', '.join(self.classes[:3])}, ...; it "
                f"knows {', '.join(labels[:3])}, ...; say which is which with a mapping (--map)"
            )
        return found


def read_mask(path: Path, values: Mapping[int, int], *, other: int = -1) -> Truth:
    """A picture of values (H W), as what they mean: 1, 0 or -1.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            plain = image if image.mode in {"L", "P", "I", "I;16"} else image.convert("L")
            found = np.asarray(plain).astype(np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: the mask cannot be read: {error}") from error
    truth: Truth = np.full(found.shape, other, dtype=np.int8)
    for value, meaning in values.items():
        truth[found == value] = meaning
    return truth


def box_around(truth: Truth) -> Box | None:
    """Around what is on; where its outline is not known, half-way between the tight box with that and without."""
    _, parts = cv2.connectedComponents((truth != 0).astype(np.uint8), connectivity=8)
    touching = np.isin(parts, np.unique(parts[truth == 1])) & (truth != 0)
    boxes = []
    for mask in (truth == 1, touching):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(ys):
            return None
        boxes.append(np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], dtype=float))
    return Box(*((boxes[0] + boxes[1]) / 2).tolist())


def the_file(path: Path) -> Path:
    """A path at which there is a file.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        raise DataError(f"{printable(path)}: no such file, and the data set needs it")
    return path


def lines_of(path: Path) -> list[list[str]]:
    """The words of every line of a text file that has any.

    Raises:
        DataError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read: {error}") from error
    return [words for line in text.splitlines() if (words := line.split())]


def box_of(edges: Sequence[str | float], where: str) -> Box:
    """A box of four numbers x0, y0, x1, y1.

    Raises:
        DataError: they are none, or the box is empty or upside down; names where they stand.
    """
    try:
        box = Box(*(float(edge) for edge in edges))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: wanted a box x0 y0 x1 y1, got {' '.join(map(str, edges))}") from error
    if not (box.width > 0 and box.height > 0):
        raise DataError(f"{where}: a box has x0 < x1 and y0 < y1, got {' '.join(map(str, edges))}")
    return box
