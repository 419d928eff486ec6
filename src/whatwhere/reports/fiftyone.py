"""Explanations, and what ``whatwhere annotate`` found -> FiftyOne's samples: classes, boxes with masks, heat.

    fo.Dataset("birds").add_samples(samples("labels"))

The samples need no database; FiftyOne's data sets and app do.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Row, rows_of
from whatwhere.annotate.sources import Item, LocalFiles, files_under
from whatwhere.errors import DataError, InputError, extra
from whatwhere.explanation import Explanation
from whatwhere.images import printable
from whatwhere.types import Size


def sample(explanations: Sequence[Explanation], path: str | os.PathLike[str] | None = None) -> Any:
    """What was explained of one picture, as a ``fiftyone.Sample``.

    Its fields: ``classes``, a classification for each explanation with the probability as confidence; ``where``, a
    detection for each region, largest first, with its mask, the class's probability as confidence, and ``trust``,
    which falls with a region's share of the largest's area; ``heat``, the first explanation's heat in [0, 1], and
    ``heat_2``, ... of the others.

    Args:
        explanations: of one picture, as ``whatwhere.explain`` gives them.
        path: of the picture's file; by default what the explanations call it.

    Raises:
        InputError: no explanations, or of several pictures.
        MissingExtraError: FiftyOne is not installed.
    """
    if not explanations or len({(one.source, one.size) for one in explanations}) > 1:
        raise InputError(f"wanted explanations of one picture, got {sorted({one.source for one in explanations})}")
    fo, first = _fiftyone(), explanations[0]
    made = _sample(fo, path or first.source, first.size)
    made["classes"] = fo.Classifications(
        classifications=[_class(fo, one.label, one.probability) for one in explanations]
    )
    regions = [row for row in rows_of(0, Item(first.source), "", explanations, "") if row.box is not None]
    for number, one in enumerate(explanations, 1):
        heat = fo.Heatmap(map=np.asarray(one.heat, np.float32), range=[0, 1], label=one.label)
        made["heat" if number == 1 else f"heat_{number}"] = heat
    made["where"] = fo.Detections(detections=[_region(fo, row) for row in regions])
    return made


def samples(folder: str | os.PathLike[str], min_trust: float = 0.0) -> Iterator[Any]:
    """What ``whatwhere annotate`` found, picture by picture, with the fields ``classes`` and ``where`` of ``sample``.

    Pictures that could not be used are left out.

    Args:
        folder: of the annotations.
        min_trust: regions of less trust are left out.

    Raises:
        DataError: the folder holds no annotations, or pictures that are no files on this machine.
        MissingExtraError: FiftyOne is not installed.
    """
    fo, found = _fiftyone(), Annotations(Path(folder), min_trust)
    files = files_under(found.told.root)
    for picture in found:
        if picture.size is None:
            continue
        item = found.item(picture)
        if not isinstance(files, LocalFiles) or item.shard:
            raise DataError(
                f"{printable(item.name)}: FiftyOne wants a file on this machine, this lies in an archive or a store"
            )
        made = _sample(fo, files.path(item.name), picture.size)
        classes = {row.label: row.probability for row in picture.regions}
        made["classes"] = fo.Classifications(classifications=[_class(fo, *one) for one in classes.items()])
        made["where"] = fo.Detections(detections=[_region(fo, row) for row in picture.regions])
        yield made


def _fiftyone() -> Any:
    with extra("fiftyone", "samples of FiftyOne"):
        return importlib.import_module("fiftyone")


def _sample(fo: Any, path: str | os.PathLike[str], size: Size) -> Any:
    metadata = fo.ImageMetadata(width=size[1], height=size[0], num_channels=3)
    return fo.Sample(filepath=str(Path(path).absolute()), metadata=metadata)


def _class(fo: Any, label: str | None, probability: float | None) -> Any:
    return fo.Classification(label=label, confidence=probability)


def _region(fo: Any, row: Row) -> Any:
    """A box in shares of the picture, from the upper left, and the mask inside it."""
    box, mask = row.box, row.pixels
    assert box is not None
    assert mask is not None
    H, W = mask.shape
    return fo.Detection(
        label=row.label,
        bounding_box=[box.x0 / W, box.y0 / H, box.width / W, box.height / H],
        mask=mask[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)],
        confidence=row.probability,
        trust=row.trust,
        method=row.method,
    )
