"""What is found in a labelled data set -> one page, and a row of a table for each picture and class."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from whatwhere.curation.duplicates import originals
from whatwhere.curation.groups import Grouping, Groups
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.images import printable
from whatwhere.reports.page import data_uri, pages
from whatwhere.reports.picture import outline

SIDE = 112
"""Pixels of a thumbnail's longer side."""
DOUBTED, SETS, OF_A_SET = 60, 60, 8
"""Labels, sets of copies, and pictures of a set that the page shows."""
OF_A_GROUP, FAR = 8, 4
"""Pictures nearest to the centre of a group, and those far from it, that the page shows where there is room."""
THUMBNAILS = 2000
"""Of the groups, at most: about 10 MB."""
BOX = (255, 255, 255)
COLUMNS = (
    "path", "split", "label", "likelier", "doubt", "rank", "group", "distance", "outlier", "duplicate_of",
)  # fmt: skip
Key = tuple[int, Box | None]
"""A picture, and the box that is drawn on it."""


def write_groups(found: Groups, folder: Path, *, model: str, data: str) -> Path:
    """``index.html`` with doubted labels, copies and groups, and ``groups.csv`` with all there is to say.

    Args:
        found: by ``find_groups``.
        folder: made where it is missing.
        model: named on the page.
        data: named on the page.

    Returns:
        The page. What does not fit on it is said there, and is in the table.

    Raises:
        DataError: a picture has gone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        aside(folder / "groups.csv") as written,
        written.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows_of(found))
    doubted, sets = doubted_of(found), _sets(found)
    classes, left_out = _classes(found)
    keys = {_key(found, entry) for entry in doubted[:DOUBTED]}
    keys |= {(picture, None) for pictures in sets[:SETS] for picture in pictures[:OF_A_SET]}
    keys |= {_key(found, entry) for one in classes for group in one["groups"] for entry in group["shown"]}
    shown = dict(_thumbnails(found, keys))
    page = folder / "index.html"
    with aside(page) as written, written.open("w", encoding="utf-8", errors="backslashreplace") as out:
        template = pages.get_template("groups.html.j2")
        for text in template.generate(
            model=model,
            data=data,
            pictures=len(found.pooled.samples),
            unknown=found.pooled.unknown,
            all_unknown=len(found.pooled.unknown) == len(found.groupings),
            judged=int(np.isfinite(found.doubts.doubt).sum()),
            doubted=[_doubt(found, entry, shown) for entry in doubted[:DOUBTED]],
            doubted_in_all=len(doubted),
            sets=[_set(found, pictures, shown) for pictures in sets[:SETS]],
            sets_in_all=len(sets),
            classes=[_with_pictures(found, one, shown) for one in classes],
            left_out=left_out,
            failed=[printable(why) for why in found.pooled.failed.values()],
        ):
            out.write(text)
    return page


def rows_of(found: Groups) -> Iterator[dict[str, Any]]:
    """A row for each picture and class, in the order of the pictures; what is not known is empty."""
    pooled, doubts = found.pooled, found.doubts
    first = originals(len(pooled.samples), found.pairs)
    rank = np.argsort(doubts.ranked()) + 1
    places = {entry: (one, place) for one in found.groupings for place, entry in enumerate(one.entries.tolist())}
    for entry in np.argsort(pooled.pictures, kind="stable").tolist():
        picture, judged = int(pooled.pictures[entry]), not math.isnan(doubts.doubt[entry])
        grouping, place = places[entry]
        sample, group = pooled.samples[picture], int(grouping.group[place])
        yield {
            "path": sample.name,
            "split": sample.split,
            "label": pooled.classes[pooled.labels[entry]],
            "likelier": pooled.classes[doubts.likelier[entry]] if judged else "",
            "doubt": f"{doubts.doubt[entry]:.4f}" if judged else "",
            "rank": rank[entry] if judged else "",
            "group": grouping.names[group] if group >= 0 else "",
            "distance": f"{grouping.distance[place]:.4f}",
            "outlier": int(grouping.outlier[place]),
            "duplicate_of": pooled.samples[first[picture]].name if first[picture] != picture else "",
        }


def doubted_of(found: Groups) -> list[int]:
    """Entries of which another class is likelier than their label, most doubted first."""
    doubts = found.doubts
    return [
        entry
        for entry in doubts.ranked().tolist()
        if not math.isnan(doubts.doubt[entry]) and doubts.likelier[entry] != found.pooled.labels[entry]
    ]


def _sets(found: Groups) -> list[list[int]]:
    """Pictures that are one, those first that have different labels, then those in different splits."""
    pooled = found.pooled
    first = originals(len(pooled.samples), found.pairs)
    sets: dict[int, list[int]] = {}
    for picture in np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1).tolist():
        sets.setdefault(int(first[picture]), []).append(picture)
    order = {"labels": 0, "split": 1}
    return sorted(
        sets.values(), key=lambda several: min([order[word] for word in _differing(found, several)], default=2)
    )


def _differing(found: Groups, pictures: Sequence[int]) -> list[str]:
    samples = [found.pooled.samples[picture] for picture in pictures]
    return [word for word in ("labels", "split") if len({getattr(sample, word) for sample in samples}) > 1]


def _set(found: Groups, pictures: Sequence[int], shown: dict[Key, str]) -> dict[str, Any]:
    inside = [pair for pair in found.pairs if pair.first in pictures and pair.second in pictures]
    alike = [pair for pair in inside if not pair.identical]
    words = ["identical"] if len(alike) < len(inside) else []
    if alike:
        words.append(f"the same picture, correlation {min(pair.correlation for pair in alike):.3f}")
    if any(pair.mirrored for pair in inside):
        words.append("mirrored")
    differing = _differing(found, pictures)
    return {
        "words": ", ".join(words),
        "alarm": {"labels": "different labels", "split": "in different splits"},
        "differing": differing,
        "more": max(0, len(pictures) - OF_A_SET),
        "pictures": [_caption(found, picture) | {"picture": shown[picture, None]} for picture in pictures[:OF_A_SET]],
    }


def _caption(found: Groups, picture: int) -> dict[str, str]:
    sample = found.pooled.samples[picture]
    labels = ", ".join(found.pooled.classes[label] for label in sample.labels) or "no class"
    return {"name": printable(sample.name), "label": labels, "split": sample.split}


def _doubt(found: Groups, entry: int, shown: dict[Key, str]) -> dict[str, Any]:
    likelier = found.pooled.classes[found.doubts.likelier[entry]]
    return _caption(found, int(found.pooled.pictures[entry])) | {
        "picture": shown[_key(found, entry)],
        "likelier": likelier,
        "doubt": float(found.doubts.doubt[entry]),
    }


def _classes(found: Groups) -> tuple[list[dict[str, Any]], int]:
    """The classes, those with several groups first, with the entries to show; and how many there is no room for."""
    order = sorted(found.groupings, key=lambda one: (len(one.names) < 2, found.pooled.classes[one.label]))
    groups = sum(len(_numbers(one)) for one in order)
    each = max(2, min(OF_A_GROUP, THUMBNAILS // max(1, groups) - FAR))
    room, classes = THUMBNAILS, list[dict[str, Any]]()
    for one in order:
        shown = [_group(one, number, each) for number in _numbers(one)]
        needed = sum(len(group["shown"]) for group in shown)
        if needed > room:
            break
        room -= needed
        classes.append({"grouping": one, "groups": shown})
    return classes, len(order) - len(classes)


def _numbers(one: Grouping) -> list[int]:
    return sorted(set(one.group.tolist()), key=lambda number: (number < 0, number))


def _group(one: Grouping, number: int, each: int) -> dict[str, Any]:
    """A group, its entries nearest to the centre first, and those far from it, the farthest first."""
    own = np.flatnonzero(one.group == number)
    own = own[np.argsort(one.distance[own], kind="stable")]
    near, far = own[~one.outlier[own]][:each], own[one.outlier[own]][::-1]
    some = far[: FAR if number >= 0 else each]
    return {
        "name": one.names[number] if number >= 0 else "",
        "count": len(own),
        "near": one.entries[near].tolist(),
        "far": one.entries[some].tolist(),
        "outliers": len(far),
        "shown": one.entries[[*near, *some]].tolist(),
    }


def _with_pictures(found: Groups, one: dict[str, Any], shown: dict[Key, str]) -> dict[str, Any]:
    grouping: Grouping = one["grouping"]

    def figures(entries: Iterable[int]) -> list[dict[str, str]]:
        return [
            _caption(found, int(found.pooled.pictures[entry])) | {"picture": shown[_key(found, entry)]}
            for entry in entries
        ]

    return {
        "name": found.pooled.classes[grouping.label],
        "count": len(grouping.entries),
        "kinds": len(grouping.names),
        "silhouette": "" if math.isnan(grouping.silhouette) else f"{grouping.silhouette:.2f}",
        "groups": [group | {"near": figures(group["near"]), "far": figures(group["far"])} for group in one["groups"]],
    }


def _key(found: Groups, entry: int) -> Key:
    return int(found.pooled.pictures[entry]), found.pooled.boxes[entry]


def _thumbnails(found: Groups, keys: Iterable[Key]) -> Iterator[tuple[Key, str]]:
    """Each picture is read once."""
    wanted: dict[int, list[Box | None]] = {}
    for picture, box in keys:
        wanted.setdefault(picture, []).append(box)
    for picture, boxes in sorted(wanted.items()):
        photo = found.pooled.samples[picture].photo()
        whole = Image.fromarray(photo.pixels)
        whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        x, y = whole.width / photo.size[1], whole.height / photo.size[0]
        for box in boxes:
            image = whole.copy()
            if box is not None:
                outline(ImageDraw.Draw(image), Box(box.x0 * x, box.y0 * y, box.x1 * x, box.y1 * y), BOX)
            yield (picture, box), data_uri(image)
