"""YOLO: ``data.yaml`` with the classes' names, ``images/`` and ``labels/``, a text file a picture.

A line is a class and a box in shares of the picture: centre x, centre y, width, height; or a class and a polygon.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from whatwhere.datasets.sample import Dataset, Sample, box_of, lines_of, the_file
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box
from whatwhere.images import image_files, printable
from whatwhere.types import Size, Truth

_ORIENTATION = 0x0112


def recognizes(root: Path) -> bool:
    """A YAML file, or a folder that has one beside its ``images``."""
    return root.suffix.lower() in {".yaml", ".yml"} or _settings(root) is not None


def _settings(root: Path) -> Path | None:
    found = sorted([*root.glob("*.yaml"), *root.glob("*.yml")]) if root.is_dir() else []
    return next((file for file in found if "names" in file.read_text(encoding="utf-8", errors="replace")), None)


def read(root: Path, split: str | None = None) -> Dataset:
    """The pictures of a split, which the YAML file says the folder of.

    Raises:
        DataError: a damaged file; names file and line.
        InputError: no such split.
    """
    file = root if root.is_file() else _settings(root)
    if file is None:
        raise DataError(f"{printable(root)}: wanted a .yaml file with the names of the classes")
    where = printable(file)
    try:
        settings: dict[str, Any] = yaml.safe_load(the_file(file).read_text(encoding="utf-8"))
        names = settings["names"]
        classes = (
            tuple(str(name) for _, name in sorted(names.items()))
            if isinstance(names, dict)
            else tuple(map(str, names))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{where}: wanted names and the folders of the splits: {error}") from error
    known = [name for name in ("test", "val", "train") if settings.get(name)]
    split = split or next(iter(known), None)
    if split not in known:
        raise InputError(f"{where} has no split {split!r}; it has {', '.join(known) or 'none'}")
    base = (file.parent / str(settings.get("path") or ".")).resolve()
    base = base if base.is_dir() else file.parent.resolve()
    # some tools write ../valid/images where the folder is beside the file
    places = [base / str(settings[split]), file.parent / str(settings[split]).removeprefix("../")]
    folder = next((place.resolve() for place in places if place.exists()), places[0])
    if folder.is_file():
        files = [(folder.parent / words[0]).resolve() for words in lines_of(folder)]
    else:
        files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise DataError(f"{printable(folder)}: no image files in this folder, which {where} names")
    return Dataset(f"{base.name}, {split}", classes, [_sample(base, path, len(classes)) for path in files])


def _sample(base: Path, path: Path, k: int) -> Sample:
    parts = list(path.parts)
    at = max(index for index, part in enumerate(parts) if part == "images") if "images" in parts else None
    notes = (
        path.with_suffix(".txt") if at is None else Path(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
    )
    name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
    if not notes.is_file():
        return Sample(name, path, ())
    try:
        with Image.open(path) as image:
            size = (image.height, image.width)
            if image.getexif().get(_ORIENTATION, 1) in {5, 6, 7, 8}:  # seen upright
                size = size[::-1]
    except (OSError, ValueError, Image.DecompressionBombError):
        return Sample(name, path, ())  # to be said when it is looked at
    shapes: dict[int, list[np.ndarray]] = {}
    boxes: dict[int, list[Box]] = {}
    for number, words in enumerate(lines_of(notes), 1):
        where = f"{printable(notes)}, line {number}"
        try:
            label, values = int(words[0]), np.array(words[1:], dtype=float)
        except ValueError:
            raise DataError(f"{where}: wanted a class and numbers, got {' '.join(words)}") from None
        if not 0 <= label < k or len(values) < 4 or (len(values) > 4 and len(values) % 2):
            raise DataError(f"{where}: wanted a class in 0..{k - 1} and a box or a polygon, got {' '.join(words)}")
        if len(values) == 4:
            (x, y), half = values[:2], values[2:] / 2
            edges = [x - half[0], y - half[1], x + half[0], y + half[1]]
        else:
            points = values.reshape(-1, 2)
            edges = [*points.min(0), *points.max(0)]
            shapes.setdefault(label, []).append(points)
        scaled = np.array(edges).clip(0, 1) * [size[1], size[0], size[1], size[0]]
        boxes.setdefault(label, []).append(box_of(scaled.tolist(), where))
    return Sample(
        name,
        path,
        tuple(sorted(boxes)),
        {label: tuple(several) for label, several in boxes.items()},
        size,
        partial(_truth, size, shapes) if shapes else None,
    )


def _truth(size: Size, shapes: Mapping[int, Sequence[np.ndarray]], label: int) -> Truth | None:
    if label not in shapes:
        return None
    truth: Truth = np.zeros(size, dtype=np.int8)
    for points in shapes[label]:  # one by one: where two overlap it stays on
        cv2.fillPoly(truth.view(np.uint8), [np.floor(points * [size[1], size[0]]).astype(np.int32)], 1)
    return truth
