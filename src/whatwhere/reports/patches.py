"""What a filter bank looks for, class by class, and what decided in some pictures -> one page."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from whatwhere.classifiers.classifier import Classifier
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import InputError
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.images import Photo, printable
from whatwhere.inspection.patches import Best, Decision, Patch, bank_of, decisions
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.reports.page import data_uri, pages
from whatwhere.reports.picture import outline
from whatwhere.types import Pixels

SIDE = 72
"""Pixels of a patch on the page."""
DRAWN = 3
"""Patches that are drawn on a picture."""
COLOURS = ((42, 125, 225), (217, 72, 15), (43, 138, 62))


def write_patches(
    net: Classifier,
    dataset: Dataset,
    best: Best,
    field: ReceptiveField,
    folder: Path,
    photos: Iterable[Photo] = (),
) -> Path:
    """``index.html`` with every class's filters and their patches, and ``patches.json`` with where those are.

    Args:
        net: around a ``DflNet``.
        dataset: that the patches are from.
        best: from ``best_patches``, of the network's ``responses``.
        field: what the cells see that the filters read.
        folder: made where it is missing.
        photos: pictures for which the page says what decided, and what would have to be there for the runner-up.

    Returns:
        The page.

    Raises:
        UnsupportedError: the network has no filter bank.
        DataError: a picture has gone.
    """
    n, folder = bank_of(net).filters, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    crops, known = crops_of(best.patches, dataset), dict[int, int]()
    with suppress(InputError):  # pictures of anything will do
        known = dataset.indices_in(net.labels)
    shown = {sample.name: {known[label] for label in sample.labels if label in known} for sample in dataset}
    classes = []
    for label, name in enumerate(net.labels):
        filters = []
        for unit in range(label * n, (label + 1) * n):
            own = [label in shown[patch.image] for patch in best.patches[unit]]
            filters.append({"crops": crops[unit], "own": sum(own), "of": len(own) if known else 0})
        classes.append({"name": name, "filters": filters})
    with aside(folder / "patches.json") as file:
        said = [[asdict(patch) for patch in own] for own in best.patches]
        file.write_text(json.dumps({"filters": n, "classes": list(net.labels), "patches": said}))
    page = folder / "index.html"
    with aside(page) as written, written.open("w", encoding="utf-8", errors="backslashreplace") as out:
        entries = (_entry(net, photo, field, crops) for photo in photos)
        template = pages.get_template("patches.html.j2")
        for text in template.generate(
            model=net.name, data=dataset.name, entries=entries, classes=classes, window=_window(field)
        ):
            out.write(text)
    return page


def crops_of(patches: Sequence[Sequence[Patch]], dataset: Dataset) -> list[list[str]]:
    """For each unit its patches, as addresses of small JPEGs. Each photograph is read once."""
    wanted: dict[str, list[tuple[int, int, Box]]] = {}
    for unit, several in enumerate(patches):
        for rank, patch in enumerate(several):
            wanted.setdefault(patch.image, []).append((unit, rank, patch.box))
    found = [[""] * len(several) for several in patches]
    for sample in dataset:
        if sample.name in wanted:
            pixels = sample.photo().pixels
            for unit, rank, box in wanted[sample.name]:
                found[unit][rank] = crop(pixels, box)
    return found


def crop(pixels: Pixels, box: Box) -> str:
    """A part of a picture (H W 3), ``SIDE`` pixels high, as the address of a JPEG."""
    height, width = pixels.shape[:2]
    x0, y0 = min(math.floor(box.x0), width - 1), min(math.floor(box.y0), height - 1)
    x1, y1 = max(x0 + 1, math.ceil(box.x1)), max(y0 + 1, math.ceil(box.y1))
    part = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    wide = min(2 * SIDE, max(SIDE // 3, round(SIDE * part.width / part.height)))
    return data_uri(part.resize((wide, SIDE), Image.Resampling.LANCZOS))


def _entry(net: Classifier, photo: Photo, field: ReceptiveField, crops: Sequence[Sequence[str]]) -> dict[str, Any]:
    found = decisions(net, photo, field)
    return {"source": printable(photo.source), "decisions": list(_said(net, photo, found, crops))}


def _said(
    net: Classifier, photo: Photo, found: Sequence[Decision], crops: Sequence[Sequence[str]]
) -> Iterator[dict[str, Any]]:
    for one in found:
        rows = [
            {
                "here": crop(photo.pixels, patch.box),
                "best": crops[patch.unit],
                "response": patch.response,
                "adds": adds,
                "colour": "rgb({}, {}, {})".format(*COLOURS[rank]) if rank < DRAWN else "",
            }
            for rank, (patch, adds) in enumerate(zip(one.patches, one.contributions, strict=True))
        ]
        yield {
            "label": net.labels[one.label],
            "probability": one.probability,
            "streams": one.streams,
            "picture": data_uri(_drawn(photo, one.patches[:DRAWN])),
            "rows": rows,
        }


def _drawn(photo: Photo, patches: Sequence[Patch]) -> Image.Image:
    """The picture, 400 pixels at its longer side, with the windows of some patches on it."""
    image = Image.fromarray(photo.pixels)
    image.thumbnail((400, 400), Image.Resampling.LANCZOS)
    (H, W), pen = photo.size, ImageDraw.Draw(image)
    x, y = image.width / W, image.height / H
    for patch, colour in reversed(list(zip(patches, COLOURS, strict=False))):
        box = patch.box
        outline(pen, Box(box.x0 * x, box.y0 * y, box.x1 * x, box.y1 * y), colour, thick=3)
    return image


def _window(field: ReceptiveField) -> str:
    return " x ".join(f"{side:.0f}" for side in field.size) if math.isfinite(sum(field.size)) else "all"
