"""Pascal VOC: an XML file a picture (Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010).

Its boxes count pixels from 1 and include the last: they begin one earlier as pixel edges. Objects marked as difficult
are left out, and pictures that show nothing else. In its masks 255 is not counted. Other classes than the twenty are
taken as they come.
"""

import glob
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from whatwhere.datasets.sample import Boxes, Dataset, Sample, box_of, lines_of, read_mask
from whatwhere.errors import DataError, InputError
from whatwhere.images import printable
from whatwhere.types import Size, Truth

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""In the order of the masks' values, which begin at 1."""


def recognizes(root: Path) -> bool:
    """VOCdevkit, the folder that it is in, or a year's folder."""
    return _year(root) is not None


def read(root: Path, split: str | None = None) -> Dataset:
    """The pictures of one list in ``ImageSets/Main``, of the latest year that is there.

    Raises:
        DataError: a damaged file.
        InputError: no such split.
    """
    year = _year(root)
    if year is None:
        raise DataError(f"{printable(root)}: no VOCdevkit with a year's folder in it")
    lists = year / "ImageSets" / "Main"
    for wanted in [split] if split else ["test", "val", "trainval", "train"]:
        if (lists / f"{wanted}.txt").is_file():
            split = wanted
            break
    else:
        known = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        raise InputError(f"{printable(year)} has no split {split!r}; it has {', '.join(known) or 'none'}")
    notes = [year / "Annotations" / f"{words[0]}.xml" for words in lines_of(lists / f"{split}.txt")]
    found = [(path, *objects_in(path, first=1)) for path in notes]
    names = {name for *_, named, _ in found for name in named}
    classes = CLASSES if names <= set(CLASSES) else tuple(sorted(names))
    samples = []
    for path, size, named, hard in found:
        if not named and hard:  # nothing but difficult objects
            continue
        boxes = {classes.index(name): several for name, several in named.items()}
        images = sorted(year.glob(f"JPEGImages/{glob.escape(path.stem)}.*"))
        image = next((one for one in images if one.stem == path.stem), year / "JPEGImages" / f"{path.stem}.jpg")
        mask = year / "SegmentationClass" / f"{path.stem}.png"
        truth = partial(_truth, mask) if mask.is_file() and classes is CLASSES else None
        samples.append(Sample(f"JPEGImages/{image.name}", image, tuple(sorted(boxes)), boxes, size, truth))
    return Dataset(f"{year.name}, {split}", classes, samples)


def _year(root: Path) -> Path | None:
    for base in (root, root / "VOCdevkit"):
        years = [base, *sorted(base.glob("VOC2*"), reverse=True)]
        for year in years:
            if (year / "Annotations").is_dir() and (year / "JPEGImages").is_dir():
                return year.resolve()
    return None


def _truth(mask: Path, label: int) -> Truth:
    return read_mask(mask, {value: int(value == label + 1) for value in range(len(CLASSES) + 1)})


def objects_in(path: Path, *, first: int) -> tuple[Size | None, dict[str, Boxes], set[str]]:
    """The picture's (H, W); by name, the boxes of an XML file; and the names of the difficult ones, which have none.

    Args:
        path: of the file.
        first: what the first pixel is called, 1 where the last one is counted in, 0 where edges are given.

    Raises:
        DataError: it cannot be read, or a box has no area.
    """
    where = printable(path)
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    found: dict[str, Boxes] = {}
    hard = set()
    for one in root.iter("object"):
        name = (one.findtext("name") or "").strip()
        if (one.findtext("difficult") or "0").strip() == "1":
            hard.add(name)
            continue
        edges = [one.findtext(f"bndbox/{edge}") or "" for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            low = [float(edge) - first for edge in edges[:2]]
        except ValueError:
            raise DataError(f"{where}: wanted a box with xmin, ymin, xmax and ymax, got {edges}") from None
        found[name] = (*found.get(name, ()), box_of([*low, *edges[2:]], where))
    try:
        height, width = (round(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except ValueError:
        height = width = 0
    return (height, width) if height and width else None, found, hard
