"""An evaluation -> a table, a file of numbers, and one page that a person can read."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from whatwhere.classifiers.classifier import Classifier
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import DataError, InputError, WhatWhereError, nearest
from whatwhere.evaluation.agreement import stretched
from whatwhere.evaluation.classification import average_precision, confused
from whatwhere.evaluation.localization import HITS, SHARES, iou
from whatwhere.evaluation.results import Evaluation, iou_at
from whatwhere.evaluation.tally import Measure
from whatwhere.explanation import THRESHOLD, Explanation, explain
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.maps import METHODS
from whatwhere.presets import PRESETS
from whatwhere.reports.page import data_uri, pages
from whatwhere.reports.picture import coloured, outline, textured

COLUMNS = (
    "MaxBoxAccV2", "MaxBoxAcc", "GT-known loc", "top-1 loc", "top-5 loc", "mean IoU", "trust ROC AUC",
    "trusted half", "PxAP", "pixel ROC AUC", "mask IoU", "TPR", "FPR", "pointing", "energy", "KL", "CC", "SIM", "NSS",
    "average drop", "average increase", "insertion", "deletion", "ROAD most", "ROAD least", "sensitivity",
    "CC when randomized",
)  # fmt: skip
"""Of the table, as far as they were measured."""
CLASSIFICATION = ("top-1", "top-5", "mean per class", "mAP", "map-scored top-1", "map-scored top-5")
"""What it says, of all methods alike; better when it is higher."""
PLAIN = ("KL", "CC", "SIM", "NSS", "sensitivity", "CC when randomized")
"""Numbers that are no shares."""
LOWER = ("KL", "FPR", "average drop", "deletion", "ROAD most", "sensitivity", "CC when randomized")
"""Numbers that are better when they are lower."""
SIDE = 224
"""Pixels of a gallery picture's longer side."""
RENDERINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "map": lambda pixels, heat: coloured(pixels, heat),
    "stretched": lambda pixels, heat: coloured(pixels, stretched(heat)),
    "texture": lambda pixels, heat: textured(pixels, heat),
}
"""How a map is shown: pixels (H W 3) and heat (H W) -> picture."""
PALETTE = ("#2a7de1", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285", "#c2255c", "#5f3dc4")


class Tile(NamedTuple):
    """One picture of the gallery."""

    name: str
    text: str
    pictures: dict[str, str]
    """Rendering -> data URI."""


def rows_of(evaluation: Evaluation) -> list[tuple[str, dict[str, Measure]]]:
    """Methods with their numbers, by falling MaxBoxAccV2 or else as they were given; then the baselines."""
    methods = [(name, evaluation.where(name)) for name in evaluation.methods]
    methods.sort(key=lambda row: -row[1]["MaxBoxAccV2"].value if "MaxBoxAccV2" in row[1] else 0)
    return methods + [(name, evaluation.where(name)) for name in evaluation.settings["baselines"]]


def columns_of(rows: Sequence[tuple[str, dict[str, Measure]]]) -> list[str]:
    """The columns of which some row has a number."""
    return [name for name in COLUMNS if any(name in found for _, found in rows)]


def said(name: str, one: Measure | None, *, interval: bool = False) -> str:
    """A number as people read it: shares in per cent."""
    if one is None or math.isnan(one.value):
        return ""
    scale, digits = (1, 2) if name in PLAIN else (100, 1)
    text = f"{scale * one.value:.{digits}f}"
    if interval and not math.isnan(one.low):
        text += f" ({scale * one.low:.{digits}f} to {scale * one.high:.{digits}f})"
    return text


def bounds_of(words: Sequence[str]) -> dict[str, float]:
    """What numbers are to reach at least, as it is written: ``MaxBoxAccV2=60``, shares in per cent.

    Raises:
        InputError: no name and number; a number that is better when it is lower, or that nobody measures.
    """
    known = {_plainly(name): name for name in (*CLASSIFICATION, *COLUMNS)}
    found = {}
    for word in words:
        name, _, value = word.rpartition("=")
        if _plainly(name) not in known:
            raise InputError(
                f"a bound is NAME=NUMBER, maxboxaccv2=60 say, got {word!r}; nearest: {nearest(name, known)}"
            )
        full = known[_plainly(name)]
        try:
            found[full] = float(value)
        except ValueError:
            raise InputError(f"{full}: wanted a number, got {value!r}") from None
        if full in LOWER:
            raise InputError(f"{full} is better when it is lower; a bound from below says nothing of it")
    return found


def below(evaluation: Evaluation, bounds: Mapping[str, float]) -> list[str]:
    """What does not reach its bound, in a line each; of several methods each has to.

    Args:
        evaluation: what was measured.
        bounds: as ``bounds_of`` gives them.
    """
    lines = []
    rows = {name: evaluation.where(name) for name in evaluation.methods}
    for name, bound in bounds.items():
        of = {"": evaluation.classification} if name in CLASSIFICATION else rows
        for method, numbers in of.items():
            one, title = numbers.get(name), f"{method}, {name}" if method else name
            if one is None or math.isnan(one.value):
                lines.append(f"{title}: wanted at least {bound:g}, and it was not measured")
            elif one.value * (1 if name in PLAIN else 100) < bound:
                lines.append(f"{title}: wanted at least {bound:g}, got {said(name, one)}")
    return lines


def _plainly(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


def numbers_of(evaluation: Evaluation) -> dict[str, Any]:
    """All results as plain data for JSON: every number with its 95 % interval."""
    rows = rows_of(evaluation)
    return {
        "settings": evaluation.settings,
        "left_out": evaluation.left_out,
        "failed": evaluation.failed,
        "thresholds": {name: evaluation.threshold(name) for name in evaluation.methods},
        "classification": {name: _plain(one) for name, one in evaluation.classification.items()},
        "localization": {name: {key: _plain(one) for key, one in found.items()} for name, found in rows},
        "agreement": [
            {"methods": list(pair), **{key: _plain(one) for key, one in found.items()}}
            for pair, found in evaluation.agreement.items()
        ],
        "shortcuts": {
            name: [
                {**one._asdict(), "label": evaluation.settings["classes"][one.label]}
                for one in evaluation.shortcuts(name)
            ]
            for name in evaluation.methods
        },
    }


def _plain(one: Measure) -> list[float | None]:
    return [None if math.isnan(value) else value for value in one]


def write_evaluation(evaluation: Evaluation, net: Classifier, dataset: Dataset, folder: Path) -> Path:
    """Write ``results.json``, ``images.csv`` and ``index.html``, each aside and renamed.

    Args:
        evaluation: what was measured.
        net: the classifier, which looks again at the pictures of the gallery.
        dataset: that was evaluated.
        folder: made where it is missing.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = pages.get_template("evaluation.html.j2").render(_content(evaluation, net, dataset))
    texts = {
        "results.json": json.dumps(numbers_of(evaluation), indent=1),
        "images.csv": _table_of_images(evaluation),
        "index.html": page,
    }
    for name, text in texts.items():
        with aside(folder / name) as file:
            file.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return folder / "index.html"


def _table_of_images(evaluation: Evaluation) -> str:
    """A row for every image, class and method; the overlap is that at the split's threshold, rounded down to .02."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ("name", "class", "predicted", "probability", "confidence", "method", "iou", "energy", "pointing")
    writer.writerow(head)
    for row in evaluation.rows:
        for method in evaluation.methods:
            iou, notes = _overlap(evaluation, row, method), row["where"].get(method, {})
            writer.writerow(
                [
                    row["name"],
                    evaluation.settings["classes"][row["class"]],
                    row["label"],
                    row["probability"],
                    row["confidence"],
                    method,
                    "" if iou is None else round(iou, 3),
                    notes.get("energy", ""),
                    notes.get("pointing", ""),
                ]
            )
    return file.getvalue()


def _overlap(evaluation: Evaluation, row: dict[str, Any], method: str) -> float | None:
    threshold = evaluation.threshold(method)
    return iou_at(row, method, THRESHOLD if threshold is None else threshold)


def _content(evaluation: Evaluation, net: Classifier, dataset: Dataset) -> dict[str, Any]:
    rows = rows_of(evaluation)
    columns = columns_of(rows)
    first = rows[0][0]
    best = {}
    for name in columns:
        known = [found[name].value for method, found in rows if name in found and method in evaluation.methods]
        best[name] = (min if name in LOWER else max)(known) if len(known) > 1 else None
    classes = evaluation.settings["classes"]
    known_maps = bool(evaluation.rows)
    can_look = known_maps and all(name in METHODS or name in PRESETS for name in evaluation.methods)
    shortcuts = evaluation.shortcuts(first) if known_maps else []
    return {
        "settings": evaluation.settings,
        "evaluation": evaluation,
        "images": len({row["name"] for row in evaluation.rows}),
        "rows": rows,
        "columns": columns,
        "best": best,
        "lower": LOWER,
        "said": said,
        "thresholds": {name: evaluation.threshold(name) for name in evaluation.methods},
        "first": first,
        "shortcuts": [(classes[one.label], one) for one in shortcuts],
        "flagged": [(classes[one.label], one) for one in shortcuts if one.reasons],
        "curves": list(_curves(evaluation)),
        "renderings": list(RENDERINGS),
        "galleries": _galleries(evaluation, net, dataset, first) if can_look else {},
        "grid": _grid(evaluation, net, dataset) if can_look and len(evaluation.methods) > 1 else [],
        "classes": _of_classes(evaluation, first),
        "confused": [
            (classes[true], net.labels[said_], count)
            for true, said_, count in confused(
                evaluation.tally.part("what"), np.array(evaluation.settings["indices"])
            )
        ]
        if "what/confusion" in evaluation.tally
        else [],
    }


def _of_classes(evaluation: Evaluation, method: str) -> list[dict[str, Any]]:
    """Of each class that is shown: images, recall, average precision, and boxes found at the method's threshold."""
    tally = evaluation.tally.part("what")
    if "shown" not in tally:
        return []
    precision = average_precision(tally)
    overlaps: dict[int, list[float]] = {}
    for row in evaluation.rows:
        iou = _overlap(evaluation, row, method)
        if iou is not None:
            overlaps.setdefault(row["class"], []).append(iou)
    found = []
    for number, name in enumerate(evaluation.settings["classes"]):
        shown = int(tally["shown"][number])
        if shown:
            own = overlaps.get(number)
            found.append(
                {
                    "name": name,
                    "label": evaluation.settings["labels"][number],
                    "images": shown,
                    "recall": float(tally["right"][number]) / shown,
                    "precision": float(precision[number]),
                    "located": None if own is None else float(np.mean([iou >= 0.5 for iou in own])),
                }
            )
    return sorted(found, key=lambda one: (one["recall"], one["name"]))


def _galleries(evaluation: Evaluation, net: Classifier, dataset: Dataset, method: str) -> dict[str, list[Tile]]:
    """Worst, best, and most confident though in the wrong place; without boxes, most confident though wrong."""
    boxed = [(row, iou) for row in evaluation.rows if (iou := _overlap(evaluation, row, method)) is not None]
    by_iou = [row for row, _ in sorted(boxed, key=lambda pair: pair[1])]
    misplaced = [row for row, iou in boxed if iou < 0.3 and row["predicted"] == _index(evaluation, row)]
    wrong = [row for row in evaluation.rows if row["predicted"] != _index(evaluation, row)]
    orders = {
        "Worst boxes": by_iou,
        "Best boxes": by_iou[::-1],
        "Most confident in the right class, at the wrong place": sorted(misplaced, key=_doubt),
        "Most confident in a wrong class": sorted(wrong, key=_doubt),
    }
    samples = {sample.name: sample for sample in dataset}
    found = {}
    for title, rows in orders.items():
        tiles = (tile for row in rows if (tile := _tile(evaluation, net, samples, row, method)) is not None)
        found[title] = list(islice(tiles, 8))
    return {title: tiles for title, tiles in found.items() if tiles}


def _doubt(row: dict[str, Any]) -> float:
    return -float(row["confidence"])


def _index(evaluation: Evaluation, row: dict[str, Any]) -> int:
    index: int = evaluation.settings["indices"][row["class"]]
    return index


def _tile(
    evaluation: Evaluation, net: Classifier, samples: dict[str, Any], row: dict[str, Any], method: str
) -> Tile | None:
    seen = _seen(evaluation, net, samples, row, method)
    if seen is None:
        return None
    one, boxes = seen
    array = np.array([one.box.to_list()] if one.box else [[0.0] * 4])
    truth = np.array([box.to_list() for box in boxes]).reshape(-1, 4)
    overlap = f", IoU {iou(array, truth).max():.2f}" if len(truth) else ""
    text = f"{evaluation.settings['classes'][row['class']]}; said: {row['label']} {row['confidence']:.0%}{overlap}"
    return Tile(row["name"], text, {name: _drawn(one, boxes, render) for name, render in RENDERINGS.items()})


def _seen(
    evaluation: Evaluation, net: Classifier, samples: dict[str, Any], row: dict[str, Any], method: str
) -> tuple[Explanation, Sequence[Box]] | None:
    """The explanation of a row once more, and the true boxes; None where the picture is gone or has changed."""
    sample = samples.get(row["name"])
    if sample is None:
        return None
    index, threshold = _index(evaluation, row), evaluation.threshold(method)
    try:
        photo = sample.photo()
        (one,) = explain(net, photo, target=index, method=method, threshold=threshold)
        label = evaluation.settings["numbers"][row["class"]]
        boxes = sample.boxes_of(label, sample.truth(label, photo.size))
    except DataError:
        return None
    return one, boxes


def _drawn(one: Explanation, boxes: Sequence[Box], render: Callable[..., np.ndarray]) -> str:
    """The picture with the true boxes green, and the predicted one white."""
    picture = Image.fromarray(render(one.pixels, one.heat))
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        outline(pen, _scaled(box, one, size), (60, 255, 90))
    if one.box:
        outline(pen, _scaled(one.box, one, size), (255, 255, 255))
    return data_uri(picture)


def _scaled(box: Box, one: Explanation, size: tuple[int, int]) -> Box:
    x, y = size[0] / one.size[1], size[1] / one.size[0]
    return Box(box.x0 * x, box.y0 * y, box.x1 * x, box.y1 * y)


def _grid(evaluation: Evaluation, net: Classifier, dataset: Dataset, count: int = 6) -> list[dict[str, Any]]:
    """Images in rows and methods in columns: images evenly from the worst to the best of the first method."""
    first = evaluation.methods[0]
    rows = sorted(evaluation.rows, key=lambda row: (_overlap(evaluation, row, first) or 0, row["name"]))
    picked = [rows[round(at * (len(rows) - 1) / max(count - 1, 1))] for at in range(min(count, len(rows)))]
    samples = {sample.name: sample for sample in dataset}
    found = []
    for row in picked:
        tiles = []
        for method in evaluation.methods:
            try:
                tiles.append(_tile(evaluation, net, samples, row, method))
            except WhatWhereError:
                tiles.append(None)
        found.append({"name": row["name"], "tiles": tiles})
    return found


def _curves(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Lines of shares over shares, each a list of points in a square of 100."""
    names = [*evaluation.methods, *evaluation.settings["baselines"]]
    boxed = {name: tally for name in names if "hits" in (tally := evaluation.tally.part(name))}
    if boxed:
        hits = {name: tally["hits"][0] / max(tally["boxed"][0], 1) for name, tally in boxed.items()}
        largest = {name: rows[HITS.index("largest 0.5")] for name, rows in hits.items()}
        yield _chart("Boxes of the largest component with IoU ≥ 0.5", "threshold", "share of images", SHARES, largest)
        rows = hits[names[0]]
        some = {f"IoU ≥ {at}": rows[HITS.index(f"any {at}")] for at in (0.3, 0.5, 0.7)}
        yield _chart(f"Any component's box, {names[0]}", "threshold", "share of images", SHARES, some)
    pixels = {name: tally["pixels"][0] for name in names if "pixels" in (tally := evaluation.tally.part(name))}
    if pixels:
        lines = {}
        for name, levels in pixels.items():
            above = levels[:, ::-1].cumsum(1)
            lines[name] = (above[1] / max(above[1, -1], 1), above[1] / np.maximum(above.sum(0), 1))
        yield _chart("Pixels: precision over recall", "recall", "precision", None, lines)
    if "what/confidence" in evaluation.tally:
        count, right, _ = evaluation.tally["what/confidence"][0]
        bins = (np.arange(len(count)) + 0.5) / len(count)
        known = count > 0
        lines = {
            "accuracy": (bins[known], right[known] / count[known]),
            "calibrated": (np.array([0, 1]), np.array([0, 1])),
        }
        yield _chart("Calibration", "confidence", "accuracy", None, lines)


def _chart(title: str, x: str, y: str, at: np.ndarray | None, lines: dict[str, Any]) -> dict[str, Any]:
    drawn = []
    for number, (name, line) in enumerate(lines.items()):
        xs, ys = (at, line) if at is not None else line
        steps = np.unique(np.linspace(0, len(xs) - 1, 200).round().astype(int))
        points = " ".join(f"{100 * xs[i]:.1f},{100 - 100 * ys[i]:.1f}" for i in steps)
        drawn.append({"name": name, "points": points, "colour": PALETTE[number % len(PALETTE)]})
    return {"title": title, "x": x, "y": y, "lines": drawn}
