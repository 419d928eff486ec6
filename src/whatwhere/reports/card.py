"""A run -> its model card: what it was trained on, what was measured, where it fails, how to use it.

All of it stands in the run; what was not measured is not in the card.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import yaml
from markupsafe import Markup

from whatwhere.classifiers.classifier import Classifier
from whatwhere.evaluation.classification import confused
from whatwhere.evaluation.results import Evaluation
from whatwhere.evaluation.tally import Measure
from whatwhere.files import aside
from whatwhere.reports.evaluation import said
from whatwhere.reports.page import pages

CARD = "card.md"
WORST = 10
"""Classes, and pairs of them, that are shown as those where it fails."""
_WHAT = {
    "top-1": "accuracy",
    "mean per class": "balanced accuracy",
    "mAP": "mean average precision",
    "calibration error": "expected calibration error",
}
"""What numbers are called outside."""
_INDEXED = {"top-1": "accuracy", "mean per class": "balanced_accuracy", "mAP": "mean_average_precision"}


def per_class(evaluation: Evaluation, classes: int) -> dict[str, Any]:
    """What is kept of an evaluation in a run, as plain data.

    Args:
        evaluation: on the run's own classes.
        classes: how many the classifier has.

    Returns:
        ``shown`` and ``right``, images of each of the classifier's classes, and ``confused``, the most frequent
        mistakes: class, what it was taken for, images.
    """
    tally, indices = evaluation.tally.part("what"), np.array(evaluation.settings["indices"])
    if "shown" not in tally:
        return {}
    found: dict[str, Any] = {}
    for name in ("shown", "right"):
        counts = np.zeros(classes, dtype=int)
        counts[indices] = tally[name]
        found[name] = counts.tolist()
    pairs = confused(tally, indices, WORST)
    return {**found, "confused": [[int(indices[label]), taken, images] for label, taken, images in pairs]}


def write_card(net: Classifier, folder: Path) -> Path:
    """Write ``card.md`` into a run's folder, with the front matter of Hugging Face's model cards.

    Args:
        net: the run's classifier, with what is said about it.
        folder: of the run.

    Raises:
        OSError: it cannot be written; one that was there stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with aside(folder / CARD) as written:
        written.write_text(card(net, folder.resolve().name), encoding="utf-8", errors="backslashreplace")
    return folder / CARD


def card(net: Classifier, name: str) -> str:
    """The text of a run's card.

    Args:
        net: the run's classifier.
        name: what the run is called.
    """
    about, labels = net.about, [_plainly(label) for label in net.labels]
    data, training, measured = (about.get(key, {}) for key in ("data", "training", "measured"))
    root = str(data.get("root", ""))
    rows = _classes(about, labels)
    failing = sorted((row for row in rows if row["shown"] and row["right"] < row["shown"]), key=_accuracy)
    matter = {
        "library_name": "whatwhere",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "weakly-supervised-localization", "class-activation-map"],
        **_index(name, root, data, measured),
    }
    return pages.get_template("card.md.j2").render(
        matter=Markup(yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)),
        name=_plainly(name),
        path=Markup(name.replace("\\", "\\\\").replace('"', '\\"')),
        net=net,
        network=_plainly(net.name),
        labels=labels,
        data=data,
        root=_plainly(root),
        data_name=_plainly(Path(root).name),
        held_out=said("", Measure(data.get("held_out", 0.0), np.nan, np.nan)),
        notes=[_plainly(note) for note in data.get("notes", ())],
        training=training,
        recipe=Markup(tomli_w.dumps(training).replace("```", "'''")),
        on=_plainly(str(measured.get("on", ""))),
        date=measured.get("date", ""),
        numbers=_numbers(measured),
        rows=rows,
        failing=failing[:WORST],
        confused=[
            {"label": labels[label], "taken": labels[taken], "images": images, "shown": rows[label]["shown"]}
            for label, taken, images in about.get("by_class", {}).get("confused", ())
        ],
        versions=", ".join(f"{what} {number}" for what, number in about.get("versions", {}).items()),
    )


def _plainly(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split()))


def _numbers(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and numbers, shares in per cent."""
    found = []
    for name, value in measured.items():
        if isinstance(value, float | int):
            text = said(name.rpartition(" ")[2] if name not in _WHAT else name, Measure(float(value), np.nan, np.nan))
            found.append((_plainly(_WHAT.get(name, name)), text))
    return found


def _classes(about: dict[str, Any], labels: list[str]) -> list[dict[str, Any]]:
    """A row for each class: images trained on, shown when it was measured, and right."""
    by_class, none = about.get("by_class", {}), [0] * len(labels)
    columns = about.get("data", {}).get("per_class", none), by_class.get("shown", none), by_class.get("right", none)
    rows = [
        {"label": label, "train": train, "shown": shown, "right": right}
        for label, train, shown, right in zip(labels, *columns, strict=True)
    ]
    return [row | {"accuracy": said("", Measure(_accuracy(row), np.nan, np.nan))} for row in rows]


def _accuracy(row: dict[str, Any]) -> float:
    return float(row["right"] / row["shown"]) if row["shown"] else float("nan")


def _index(name: str, root: str, data: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's ``model-index`` of what was measured, or nothing."""
    kinds = {key: kind for key, kind in _INDEXED.items() if isinstance(measured.get(key), float)}
    if not kinds:
        return {}
    metrics = [{"type": kind, "name": _WHAT[key], "value": round(measured[key], 4)} for key, kind in kinds.items()]
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"type": data.get("layout", "imagefolder"), "name": Path(root).name, "split": str(measured["on"])},
        "metrics": metrics,
    }
    return {"metrics": list(kinds.values()), "model-index": [{"name": name, "results": [result]}]}
