"""COCO: one JSON file with images, annotations and categories (Lin et al., Microsoft COCO, ECCV 2014).

Crowds are not objects; where there are masks, they are not counted.
"""

import json
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.datasets.sample import Dataset, Sample, box_of, the_file
from whatwhere.errors import DataError, InputError, MissingExtraError
from whatwhere.geometry import Box
from whatwhere.images import printable
from whatwhere.regions import rle
from whatwhere.types import Mask, Size, Truth

FEW = 16
"""Pictures by which a folder is known."""


def recognizes(root: Path) -> bool:
    """A JSON file, or a folder with ``annotations/instances_*.json``."""
    return root.suffix.lower() == ".json" or bool(list(root.glob("annotations/instances_*.json")))


def read(root: Path, split: str | None = None) -> Dataset:
    """The pictures of one annotation file.

    They are sought below its folder, in ``images``, in the split's folder beside ``annotations``, or in the folder
    that its ``info`` tells as ``root``.

    Args:
        root: the file, or COCO's folder.
        split: of a folder: what stands between ``instances_`` and ``.json``; "val" is enough for "val2017".

    Raises:
        DataError: a damaged file, or pictures that are not there.
        InputError: no such split.
    """
    file = root if root.suffix.lower() == ".json" else _instances(root, split)
    where = printable(file)
    try:
        content = json.loads(the_file(file).read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda one: one["id"])
        index = {one["id"]: number for number, one in enumerate(categories)}
        classes = tuple(str(one["name"]) for one in categories)
        of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for one in content.get("annotations", ()):
            of_image[one["image_id"]].append(one)
        folder = _folder(file, [one["file_name"] for one in content["images"]], content.get("info"))
        samples = [_sample(folder, one, of_image[one["id"]], index, where) for one in content["images"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not COCO's annotations, or damaged: {type(error).__name__}: {error}") from error
    return Dataset(file.stem, classes, samples)


def _instances(root: Path, split: str | None) -> Path:
    files = sorted(root.glob("annotations/instances_*.json"))
    names = [file.stem.removeprefix("instances_") for file in files]
    if split in names:
        return files[names.index(split)]
    for wanted in [split] if split else ["test", "val", "train", ""]:
        for name, file in reversed(list(zip(names, files, strict=True))):  # the latest year first
            if name.startswith(wanted):
                return file
    raise InputError(f"{printable(root)} has no split {split!r}; it has {', '.join(names)}")


def _folder(file: Path, names: list[str], info: Any) -> Path:
    split = file.stem.removeprefix("instances_")
    up = file.parent.parent
    near = [file.parent, file.parent / "images", up / split, up / "images" / split, up / "images", up]
    told = info.get("root") if isinstance(info, dict) else None
    for folder in (*near, Path(told)) if isinstance(told, str) else near:
        if any((folder / name).is_file() for name in names[:FEW]):  # some may have gone since
            return folder
    raise DataError(f"{printable(file)}: its pictures are found nowhere near: {names[0] if names else 'it has none'}")


def _sample(
    folder: Path, image: dict[str, Any], annotations: list[dict[str, Any]], index: dict[Any, int], where: str
) -> Sample:
    boxes: dict[int, list[Box]] = defaultdict(list)
    for one in annotations:
        if not one.get("iscrowd") and one.get("bbox"):
            x, y, width, height = one["bbox"]
            if width > 0 and height > 0:  # published files have a few without
                box = box_of((x, y, x + width, y + height), f"{where}: annotation {one.get('id')}")
                boxes[index[one["category_id"]]].append(box)
    labels = {index[one["category_id"]] for one in annotations if not one.get("iscrowd")}
    size = (image["height"], image["width"]) if image.get("height") and image.get("width") else None
    truth = None
    if size and any(one.get("segmentation") for one in annotations):
        truth = partial(_truth, size, annotations, index, f"{where}: {image['file_name']}")
    return Sample(
        name=image["file_name"],
        path=folder / image["file_name"],
        labels=tuple(sorted(labels)),
        boxes={label: tuple(several) for label, several in boxes.items()},
        size=size,
        read_truth=truth,
    )


def _truth(
    size: Size, annotations: list[dict[str, Any]], index: dict[Any, int], where: str, label: int
) -> Truth | None:
    own = [one for one in annotations if index[one["category_id"]] == label and one.get("segmentation")]
    if all(one.get("iscrowd") for one in own):
        return None
    truth: Truth = np.zeros(size, dtype=np.int8)
    for meaning in (-1, 1):
        for one in own:
            if bool(one.get("iscrowd")) == (meaning == -1):
                mask = _mask(one["segmentation"], size, where)
                if mask.shape != size:
                    raise DataError(f"{where}: the image has (H, W) {size}, and a mask {mask.shape}")
                truth[mask] = meaning
    return truth


def _mask(segmentation: Any, size: Size, where: str) -> Mask:
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        return rle.decode(segmentation)
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingExtraError("masks of COCO need pycocotools; run: pip install 'whatwhere[scale]'") from error
    try:
        coded = segmentation if isinstance(segmentation, dict) else mask.merge(mask.frPyObjects(segmentation, *size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, for how pycocotools makes arrays
            found: Mask = mask.decode(coded).astype(bool)
    except Exception as error:  # pycocotools raises whatever comes to hand
        raise DataError(f"{where}: a mask cannot be read: {error}") from error
    return found
