"""What a filter bank adds to a network: accuracy of its streams, cost of a step, and where its patches are.

    python benchmarks/dfl.py streams|grey|patches|step [--data ../shared/data] [--runs FOLDER] [--only WORD ...]

``streams`` trains G, P, G + P and G + P + side, with random filters and with those of section 3.3, on the same
images in the same order; the accuracy on the test split is written down at epochs 1, 3 and the last, and nothing is
chosen by it. ``grey`` does so on generated grey pictures, whose classes differ in one small mark. ``patches`` asks
whether the patches of what is rightly classified lie on the animal. ``step`` times a training step with and without
the bank. Each training is one row of ``benchmarks/dfl.csv``; what has a row is not done again. ``table`` makes
``benchmarks/dfl.md``.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import in_turn, machine, ratios
from training import FEW, FULL, SEEDS, cell, data_at

from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import open_dataset
from whatwhere.inspection.patches import bank_of, decisions, field_of
from whatwhere.training.fit import train
from whatwhere.training.recipe import Recipe

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "dfl.csv", HERE / "dfl.md"
KEPT = ("epoch 1", "epoch 3", "end")
FIELDS = ["data", "what", "start", "seed", *KEPT, "machine"]
STREAMS = {"P": [0, 1, 0], "G + P": [1, 1, 0], "G + P + side": [1, 1, 0.1]}
RECIPES = {
    "cub60": replace(FULL, size=(224, 224), epochs=8),
    "pets37": FEW,
    "grey": replace(FULL, size=(224, 224), epochs=8),
}
MARKS = 6
"""Classes of the grey pictures."""


def trainings(data: str) -> Iterator[tuple[str, str, Recipe]]:
    """What is trained, how its filters begin, and the recipe."""
    for seed in SEEDS:
        recipe = replace(RECIPES[data], seed=seed, validation="test", test="")
        yield "G", "", replace(recipe, head={"pool": "mean"})
        for what, weights in STREAMS.items():
            bank = replace(recipe, head={"filters": 10, "weights": weights})
            yield what, "patches", bank
            yield what, "random", replace(bank, filter_start="random")


def done(data: str, what: str, start: str, recipe: Recipe, root: Path, out: Path) -> dict[str, object]:
    """Train, or go on; the row."""
    train(root, out, recipe, resume=True)
    with (out / "metrics.csv").open(newline="") as file:
        said = [float(row["validation"]) for row in csv.DictReader(file) if row["phase"] == "full"]
    found = dict(zip(KEPT, (said[0], said[2], said[-1]), strict=True))
    row: dict[str, object] = {"data": data, "what": what, "start": start, "seed": recipe.seed}
    return row | {name: round(100 * value, 2) for name, value in found.items()} | {"machine": machine()}


def grey(folder: Path, train: int = 20, test: int = 30) -> Path:
    """Generated pictures of one channel: textures in which one of six small marks lies somewhere."""
    if folder.exists():
        return folder
    y, x = np.mgrid[:15, :15] - 7
    round_, square = np.hypot(y, x), np.maximum(abs(y), abs(x))
    marks = [
        (round_ < 7) & (round_ > 4),
        round_ < 4.6,
        (square < 7) & (square > 4),
        (abs(y) < 2) | (abs(x) < 2),
        abs(abs(y) - abs(x)) < 2,
        abs(y) % 5 < 2,
    ]
    made = folder.with_suffix(".tmp")
    for split, count in (("train", train), ("test", test)):
        for kind, mark in enumerate(marks):
            for number in range(count):
                draw = np.random.default_rng([kind, number, split == "test"])
                coarse = Image.fromarray(draw.uniform(40, 200, (12, 16)).astype(np.float32)).resize((320, 240), 3)
                pixels = np.asarray(coarse) + draw.normal(0, 12, (240, 320))
                for _ in range(6):  # what every picture has, of any class
                    top, left = draw.integers(0, 225), draw.integers(0, 305)
                    pixels[top : top + 15, left : left + 15][square < draw.integers(3, 7)] += 50
                top, left = draw.integers(10, 215), draw.integers(10, 295)
                pixels[top : top + 15, left : left + 15][mark] += 50
                place = made / split / f"mark {kind}" / f"{number:03}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)
    made.rename(folder)
    return folder


def on_the_animal(root: Path, runs: Path) -> None:
    """Shares of patches whose centre is on the animal's mask, of rightly classified images of pets37's test split."""
    folder, first, every = root / "pets37", [], []
    for seed in SEEDS:
        recipe = replace(RECIPES["pets37"], seed=seed, head={"filters": 10})
        net = train(folder, runs / f"pets37-patches-{seed}", recipe, resume=True)
        dataset = open_dataset(folder)
        field, index = field_of(net, bank_of(net).read, dataset), dataset.indices_in(net.labels)
        winning, all_of_class = [], []
        for sample in dataset:
            photo, label = sample.photo(), sample.labels[0]
            truth = sample.truth(label, photo.size)
            found = decisions(net, photo, field)[0]
            if truth is None or found.label != index[label]:
                continue
            hits = []
            for patch in found.patches:
                x, y = (min(int(at), side - 1) for at, side in zip(patch.centre, photo.size[::-1], strict=True))
                hits.append(float(truth[y, x]) if truth[y, x] >= 0 else float("nan"))  # what is neither says nothing
            winning.append(hits[0])
            all_of_class += hits
        first.append(100 * float(np.nanmean(winning)))
        every.append(100 * float(np.nanmean(all_of_class)))
    text = f"Centre of the patch on the animal: {cell(first)} % of winning filters, {cell(every)} % of all of a class"
    (HERE / "dfl_patches.txt").write_text(f"{text}.\n{machine()}\n")
    print(text)


def step(root: Path) -> None:
    """A training step, forward, backward and update, with the bank and without, at the same input."""
    from whatwhere.training.data import split_data
    from whatwhere.training.fit import beginning, resolved
    from whatwhere.training.loop import Fitting, rates
    from whatwhere.training.objective import prior_of

    runs = {}
    for name, head in (("G", {"pool": "mean"}), ("G + P + side", {"filters": 10})):
        recipe = resolved(replace(FULL, head=head, frozen=0.0, ema=0.0))
        splits = split_data(root / "cub60", recipe)
        net = beginning(recipe, splits)
        network = net.network.to(memory_format=torch.channels_last).train()
        fitting = Fitting(net, recipe, prior_of(splits.train.targets()))
        optimizer = torch.optim.AdamW(rates(network, recipe))
        images = torch.rand(recipe.batch, 3, 256, 256).to(memory_format=torch.channels_last)
        targets = splits.train.targets()[: recipe.batch]

        def one(fitting=fitting, optimizer=optimizer, images=images, targets=targets) -> None:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            fitting.loss(images, targets).backward()
            optimizer.step()

        runs[name] = one
    middle, low, high = ratios(in_turn(runs, rounds=9, warmup=1), "G")["G + P + side"]
    print(f"{machine()}\nstep with the bank / without: {middle:.3f} ({low:.3f} to {high:.3f})")


def rows() -> list[dict[str, str]]:
    """What is measured."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))


def table() -> str:
    """Means and standard deviations over seeds."""
    several: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows():
        several.setdefault((row["data"], row["what"], row["start"]), []).append(row)
    text = [
        "Top-1 on the test split in per cent, means and standard deviations over seeds (`python benchmarks/dfl.py`).",
        "",
        f"| data | streams | filters begin as | seeds | {' | '.join(KEPT)} |",
        "|---" * (4 + len(KEPT)) + "|",
    ]
    for (data, what, start), same in several.items():
        cells = [cell([float(row[name]) for row in same]) for name in KEPT]
        text.append(f"| {data} | {what} | {start} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join([*text, "", f"Machine: {', '.join(sorted({row['machine'] for row in rows()}))}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["streams", "grey", "patches", "step", "table"])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--only", nargs="*", default=[], help="words that a run's data, streams, start or seed is among"
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.study in {"step", "patches"}:
        step(options.data) if options.study == "step" else on_the_animal(options.data, options.runs)
        return
    known = {(row["data"], row["what"], row["start"], row["seed"]) for row in rows()}
    for data in {"streams": ("cub60", "pets37"), "grey": ("grey",), "table": ()}[options.study]:
        root = grey(options.runs / "data-grey") if data == "grey" else data_at(data, options.data, options.runs)
        for what, start, recipe in trainings(data):
            key = (data, what, start, str(recipe.seed))
            if key in known or not all(word in key for word in options.only):
                continue
            out = options.runs / f"{data}-{what}-{start}-{recipe.seed}".replace(" ", "")
            row = done(data, what, start, recipe, root, out)
            with ROWS.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
    TABLE.write_text(table())


if __name__ == "__main__":
    main()
