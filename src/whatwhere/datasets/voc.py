"""Pascal VOC: an XML file a picture (Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010).

Its boxes count pixels from 1 and include the last: they begin one earlier as pixel edges. Objects marked as difficult
are left out, as in the challenge. In its masks 255 is not counted.
"""

from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from whatwhere.datasets.sample import Boxes, Dataset, Sample, box_of, read_mask
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
    number = year.name.removeprefix("VOC")
    if year.parent.name == "VOCdevkit":
        there = VOCDetection(str(year.parent.parent), year=number, image_set=split)
        pairs = [(Path(image), Path(notes)) for image, notes in zip(there.images, there.annotations, strict=True)]
    else:
        stems = [line.split()[0] for line in (lists / f"{split}.txt").read_text().splitlines() if line.strip()]
        pairs = [(year / "JPEGImages" / f"{stem}.jpg", year / "Annotations" / f"{stem}.xml") for stem in stems]
    return Dataset(f"{year.name}, {split}", CLASSES, [_sample(year, *pair) for pair in pairs])


def _year(root: Path) -> Path | None:
    for base in (root, root / "VOCdevkit"):
        years = [base, *sorted(base.glob("VOC2*"), reverse=True)]
        for year in years:
            if (year / "Annotations").is_dir() and (year / "JPEGImages").is_dir():
                return year.resolve()
    return None


def _sample(year: Path, image: Path, notes: Path) -> Sample:
    size, named = objects_in(notes, first=1)
    boxes: dict[int, Boxes] = {}
    for name, several in named.items():
        if name not in CLASSES:
            raise DataError(f"{printable(notes)}: {name!r} is no class of Pascal VOC")
        boxes[CLASSES.index(name)] = several
    mask = year / "SegmentationClass" / f"{image.stem}.png"
    truth = partial(_truth, mask) if mask.is_file() else None
    return Sample(f"JPEGImages/{image.name}", image, tuple(sorted(boxes)), boxes, size, truth)


def _truth(mask: Path, label: int) -> Truth:
    return read_mask(mask, {value: int(value == label + 1) for value in range(len(CLASSES) + 1)})


def objects_in(path: Path, *, first: int) -> tuple[Size | None, dict[str, Boxes]]:
    """The picture's (H, W) and, by name, the boxes of an XML file; without difficult ones.

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
    for one in root.iter("object"):
        if (one.findtext("difficult") or "0").strip() == "1":
            continue
        edges = [one.findtext(f"bndbox/{edge}") or "" for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            low = [float(edge) - first for edge in edges[:2]]
        except ValueError:
            raise DataError(f"{where}: wanted a box with xmin, ymin, xmax and ymax, got {edges}") from None
        name = (one.findtext("name") or "").strip()
        found[name] = (*found.get(name, ()), box_of([*low, *edges[2:]], where))
    height, width = (int(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    return (height, width) if height and width else None, found
