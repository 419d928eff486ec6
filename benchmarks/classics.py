"""The classics beside networks: top-1, MaxBoxAccV2 of the map that is exact for each, and what training costs.

    OMP_NUM_THREADS=1 python benchmarks/classics.py [--data ../shared/data] [--runs FOLDER] [--only WORD ...]

Each run is a folder below --runs that is gone on with if it was cut off, and one row in ``benchmarks/classics.csv``
when it is whole; what has a row is not done again, and ``benchmarks/classics.md`` is made of the rows. Of
tiny-imagenet 50 training pictures a class are taken. Settings were chosen by cross-validation on training splits of
flowers17 and cub60, as the table's text says; the test splits are looked at once, here. Of flowers17 and cub60 the
rows of the pretrained network are those of ``benchmarks/training.csv``.
"""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import Rows
from timing import machine

from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import open_dataset
from whatwhere.training.fit import train
from whatwhere.training.folder import REPORT
from whatwhere.training.recipe import Recipe

HERE = Path(__file__).parent
TABLE = HERE / "classics.md"
DATA = ("flowers17", "cub60", "tiny-imagenet")
CENTRE = "centre Gaussian"
FIELDS = ["data", "what", "top-1", "MaxBoxAccV2", CENTRE, "method", "minutes", "machine"]
ROWS = Rows(HERE / "classics.csv", FIELDS)
A_CLASS = 50
"""Training pictures of tiny-imagenet."""

LIGHT = Recipe(validation=0.0)
FULL = replace(LIGHT, mode="full", epochs=20, lr=1e-3, batch=32, light_start=False, layer_decay=1.0, workers=0)
RECIPES: dict[str, Recipe] = {
    "linear": replace(LIGHT, model="linear", decay=1e-3, methods=("hirescam",)),
    "mlp": replace(FULL, model="mlp", methods=("hirescam",)),
    "color-histogram": replace(LIGHT, model="color-histogram", decay=3e-5, methods=("cam",)),
    "hog": replace(LIGHT, model="hog", decay=1e-3, methods=("hirescam",)),
    "visual-words": replace(LIGHT, model="visual-words", decay=3e-5, methods=("cam",)),
    "visual-words, pyramid": replace(
        LIGHT, model="visual-words", options={"levels": 2}, decay=3e-5, methods=("hirescam",)
    ),
    "lenet5": replace(FULL, model="lenet5", size=(64, 64)),
    "efficientnet-lite0, pretrained, last layer": replace(LIGHT, size=(224, 224), methods=("cam",)),
}
"""What is trained; settings that are not here are the defaults."""


class Run(NamedTuple):
    """One training."""

    data: str
    what: str
    recipe: Recipe


def runs() -> Iterator[Run]:
    """All that are wanted, the quick ones first."""
    for data in DATA:
        for what, recipe in RECIPES.items():
            if what.startswith("efficientnet") and data != "tiny-imagenet":
                continue
            yield Run(data, what, replace(recipe, test="val" if data == "tiny-imagenet" else "test"))


def do(run: Run, root: Path, folder: Path) -> dict[str, object]:
    """Train, or go on; the row."""
    out = folder / f"{run.data}-{run.what}".replace(" ", "_").replace(",", "")
    clock = out.with_name(f"{out.name}.seconds")
    before = float(clock.read_text()) if clock.exists() else 0.0

    def watch(what: str, done: int, total: int) -> None:
        if what != "measuring":  # the last that is heard is when training is done
            clock.write_text(str(before + sum(os.times()[:4])))

    begun = sum(os.times()[:4])
    before -= begun
    net = train(data_at(run.data, root, folder), out, run.recipe, resume=True, watch=watch)
    measured = net.about["measured"]
    (method,) = run.recipe.methods
    row: dict[str, Any] = {"data": run.data, "what": run.what, "top-1": round(100 * measured["top-1"], 2)}
    if (found := measured.get(f"{method} MaxBoxAccV2")) is not None:
        row["MaxBoxAccV2"] = round(100 * found, 2)
        where = json.loads((out / REPORT / "results.json").read_text())["localization"]
        row[CENTRE] = round(100 * where[CENTRE]["MaxBoxAccV2"][0], 2)
    return row | {"method": method, "minutes": round(float(clock.read_text()) / 60, 2), "machine": machine()}


def data_at(data: str, root: Path, folder: Path) -> Path:
    """The folder of a data set; of tiny-imagenet one of links to some of its pictures, with all boxes."""
    if data != "tiny-imagenet":
        return root / data
    place = folder / f"data-{data}"
    if not place.exists():
        scratch = folder / f"data-{data}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        for split, count in (("train", A_CLASS), ("val", None)):
            samples: dict[int, list[Path]] = {}
            for sample in open_dataset(root / data, split):
                samples.setdefault(sample.labels[0], []).append(sample.path)
            for several in samples.values():
                for path in sorted(several)[:count]:
                    link = scratch / path.relative_to(root / data)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
        for name in ("boxes.csv", "classes.csv"):
            if (root / data / name).exists():
                shutil.copy(root / data / name, scratch)
        scratch.rename(place)
    return place


def trained() -> Iterator[dict[str, str]]:
    """The pretrained network on the other data, as the study of training has measured it; means over its seeds."""
    with (HERE / "training.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if (row["study"], row["what"]) == ("bars", "light")]
    for data in DATA:
        several = [row for row in found if row["data"] == data]
        if several:
            means = {
                name: str(round(sum(float(row[name]) for row in several) / len(several), 2))
                for name in ("top-1", "MaxBoxAccV2", "minutes")
                if all(row[name] for row in several)
            }
            yield {"data": data, "what": list(RECIPES)[-1], "method": "gradcam", **means}


def table() -> str:
    """A row a model, columns a data set."""
    found = {(row["data"], row["what"]): row for row in [*trained(), *ROWS.all()]}
    head = [f"{data} {name}" for data in DATA for name in ("top-1", "MaxBoxAccV2", "minutes")]
    text = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for what in RECIPES:
        cells = []
        for data in DATA:
            row = found.get((data, what), {})
            cells += [
                f"{float(row[name]):.1f}" if row.get(name) else "" for name in ("top-1", "MaxBoxAccV2", "minutes")
            ]
        text.append(f"| {what} | {' | '.join(cells)} |")
    cells = []
    for data in DATA:
        several = [row[CENTRE] for row in ROWS.all() if row["data"] == data and row[CENTRE]]
        cells += ["", f"{float(several[0]):.1f}" if several else "", ""]
    text.append(f"| a Gaussian at the centre | {' | '.join(cells)} |")
    return "\n".join([*text, "", *sorted({row["machine"] for row in ROWS.all()})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=[], help="words that a run's data or name must have")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    options.runs.mkdir(parents=True, exist_ok=True)
    known = {(row["data"], row["what"]) for row in ROWS.all()}
    for run in runs():
        if run[:2] in known or not all(any(word in part for part in run[:2]) for word in options.only):
            continue
        ROWS.add(do(run, options.data, options.runs))
    text = TABLE.read_text().partition("\n| |")[0] if TABLE.exists() else "# The classics beside networks\n"
    TABLE.write_text(f"{text}\n{table()}\n")


if __name__ == "__main__":
    main()
