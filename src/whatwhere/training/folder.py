"""What lies in the folder of a training: what it was told, what it goes on from, what was measured on the way."""

import csv
import io
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from whatwhere.errors import DataError, InputError
from whatwhere.files import aside
from whatwhere.images import printable
from whatwhere.training.recipe import Recipe, recipe_of

STARTED, STATE, METRICS, REPORT = "recipe.toml", "state", "metrics.csv", "report"
DATA = "data.sha256"

Watch = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much; of nothing, what is said is news."""


def unwatched(what: str, done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Task:
    """What a training was told."""

    data: Path
    recipe: Recipe
    layout: str | None = None


def rank() -> int:
    """Which of the processes of one training this is, as torchrun, SLURM or Lightning say it."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK") or 0) + int(os.environ.get("NODE_RANK") or 0)


def begun(out: Path, task: Task | None) -> Task:
    """What a training is told: written down when it begins, and taken from there when it is resumed.

    Raises:
        InputError: there is nothing to resume, or it was begun with other settings.
        DataError: what was written down is damaged.
    """
    file, told = out / STARTED, dict[str, Any]()
    if not file.exists():
        if task is None:
            raise InputError(f"there is no training in {printable(out)} to resume; say what to train")
        told = {"data": str(task.data), "training": task.recipe.plain()}
        with aside(file) as place:
            place.write_text(tomli_w.dumps(told | ({"layout": task.layout} if task.layout else {})), encoding="utf-8")
        return task
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
        old = Task(Path(told["data"]), recipe_of(told["training"]), told.get("layout"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{printable(file)}: damaged: {error}") from error
    if task is not None and task != old:
        plain, before = task.recipe.plain(), old.recipe.plain()
        what = [key for key in sorted(plain | before) if plain.get(key) != before.get(key)]
        what += [name for name in ("data", "layout") if getattr(task, name) != getattr(old, name)]
        raise InputError(
            f"the training in {printable(out)} was begun with other settings: {', '.join(what)}; choose another "
            "folder"
        )
    return old


def absolute(task: Task) -> Task:
    """The same, whatever folder it is resumed from."""
    places: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name in ("model", "boxes")
        if (value := getattr(task.recipe, name)) is not None and Path(value).exists()
    }
    return replace(task, data=task.data.resolve(), recipe=replace(task.recipe, **places))


def same_data(out: Path, digest: str) -> None:
    """See that a training goes on with the pictures that it began with.

    Raises:
        DataError: it does not.
    """
    file = out / STATE / DATA
    if file.exists() and file.read_text() != digest:
        raise DataError(f"the pictures are not those that the training in {printable(out)} began with; begin another")
    if not file.exists():
        with aside(file) as place:
            place.write_text(digest)


def cleared(out: Path, *, whole: bool) -> None:
    """Remove what only a training needs; what was half written where it was killed in any case."""
    for left in out.glob(".whatwhere-*"):
        shutil.rmtree(left)
    if whole:
        shutil.rmtree(out / STATE, ignore_errors=True)
        (out / STARTED).unlink(missing_ok=True)


def write_metrics(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of all that was measured on the way."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    with aside(file) as place:
        place.write_text(text.getvalue(), encoding="utf-8", newline="")
