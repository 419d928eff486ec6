"""What a filter bank adds to a network: accuracy of its streams, cost of a step, and where its patches are.

    python benchmarks/dfl.py light|full|grey|patches|step|table [--data ../shared/data] [--runs FOLDER] [--only WORD]

``light`` leaves the backbone as it is: G, P, G + P and G + P + side, with random filters and with those of section
3.3, on the same grids. ``full`` trains G and G + P + side with all of the network, on the same images in the same
order. Accuracy on the test split is written down at epochs 1, 3 and the last, and nothing is chosen by it. ``grey``
does as ``light`` on generated pictures of one channel, whose classes differ in one small mark. ``patches`` asks
whether the patches of what is rightly classified lie on the animal. ``step`` times a training step with and without
the bank. Each training is one row of ``benchmarks/dfl.csv``; what has a row is not done again. ``table`` makes
``benchmarks/dfl.md``.
"""

import argparse
import csv
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import Rows
from timing import in_turn, machine, ratios
from training import FEW, FULL, LIGHT, SEEDS, cell, data_at

from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import open_dataset
from whatwhere.inspection.patches import bank_of, decisions, field_of
from whatwhere.training.bank import Grids, fit_bank, general_of, grids_of
from whatwhere.training.data import split_data
from whatwhere.training.filters import initialize_filters
from whatwhere.training.fit import beginning, resolved, train
from whatwhere.training.light import features_of, fit_last_layer
from whatwhere.training.loop import Fitting, rates
from whatwhere.training.objective import measured, prior_of

HERE = Path(__file__).parent
TABLE = HERE / "dfl.md"
KEPT = ("epoch 1", "epoch 3", "end")
FIELDS = ["data", "schedule", "tap", "what", "start", "seed", *KEPT, "machine"]
ROWS = Rows(HERE / "dfl.csv", FIELDS)
STREAMS = {"P": (0, 1, 0), "G + P": (1, 1, 0), "G + P + side": (1, 1, 0.1)}
TAPS = {"cub60": ("blocks.6", "blocks.5"), "pets37": ("blocks.6", "blocks.5"), "grey": ("blocks.6",)}
"""Layers that the filters read: the default, and the block before it."""
TESTED = replace(LIGHT, validation="test", test="", head={"filters": 10})
RECIPES = {"cub60": TESTED, "pets37": TESTED, "grey": replace(TESTED, options={"in_chans": 1})}
FULLY = {"cub60": FULL, "pets37": FEW}
MARKS = 6
"""Classes of the grey pictures."""


def light(data: str, root: Path, runs: Path, missing: set[tuple[str, str, str, int]]) -> Iterator[dict[str, object]]:
    """Rows of taps, streams, starts and seeds, on grids that are computed once."""
    for tap in TAPS[data]:
        if not any(at in {tap, ""} for at, *_ in missing):
            continue
        recipe = resolved(replace(RECIPES[data], head={"filters": 10, "tap": tap}))
        splits = split_data(root, recipe)
        assert splits.validation is not None
        net = beginning(recipe, splits)
        file = runs / f"{data}.safetensors"
        grids = grids_of(net, splits.train, runs / f"{data}-train", features=file)
        features = features_of(general_of(net), splits.train, file)
        targets, wanted = splits.train.targets(), splits.validation.targets()
        tested = grids_of(net, splits.validation, runs / f"{data}-test", mirrored=False)
        pooled = features_of(general_of(net), splits.validation, mirrored=False)[:, 0]
        for seed in SEEDS:
            chosen = {(what, start) for at, what, start, number in missing if number == seed and at in {tap, ""}}
            if not chosen:
                continue
            general = general_of(net)
            fit_last_layer(general, features, targets, seed=seed)
            with torch.no_grad():
                said = general.network.head.linear(pooled[:, :, None, None]).flatten(1)  # type: ignore[operator,union-attr]
            row: dict[str, object] = {"data": data, "schedule": "light", "seed": seed, "machine": machine()}
            if ("", "G", "", seed) in missing:
                missing.remove(("", "G", "", seed))
                yield row | {"tap": "", "what": "G", "start": "", "end": round(100 * measured(said, wanted), 2)}
            for start in ("patches", "random"):
                torch.manual_seed(seed)
                begun = beginning(replace(recipe, seed=seed), splits)
                begun.network.general.load_state_dict(general.network.state_dict())  # type: ignore[union-attr]
                if start == "patches":
                    initialize_filters(begun, splits.train, seed=seed, read=partial(_picture, grids))
                for what, weights in STREAMS.items():
                    if (what, start) not in chosen:
                        continue
                    one = deepcopy(begun)
                    one.network.weights = weights  # type: ignore[assignment]
                    held = (replace(tested, general=said), wanted)
                    rows = fit_bank(one, grids, targets, replace(recipe, seed=seed), held)
                    found = [rows[number]["validation"] for number in (0, 2, -1)]
                    kept = {name: round(100 * value, 2) for name, value in zip(KEPT, found, strict=True)}
                    yield row | {"tap": tap, "what": what, "start": start} | kept


def _picture(grids: Grids, index: int) -> torch.Tensor:
    return grids.at(0, [index])[0]


def full(data: str, root: Path, runs: Path, missing: set[tuple[str, str, str, int]]) -> Iterator[dict[str, object]]:
    """Rows of whole trainings, with the bank and without."""
    for tap, what, start, seed in sorted(missing, key=lambda one: one[3]):
        head = {"pool": "mean"} if what == "G" else {"filters": 10, "tap": tap}
        recipe = replace(FULLY[data], seed=seed, validation="test", test="", head=head)
        out = runs / f"{data}-{what}-{seed}".replace(" ", "")
        train(root, out, recipe, resume=True)
        with (out / "metrics.csv").open(newline="") as file:
            said = [float(row["validation"]) for row in csv.DictReader(file) if row["phase"] == "full"]
        kept = {name: round(100 * said[number], 2) for name, number in zip(KEPT, (0, 2, -1), strict=True)}
        row = {"data": data, "schedule": "full", "tap": tap, "what": what, "start": start, "seed": seed}
        yield row | kept | {"machine": machine()}


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
        recipe = replace(RECIPES["pets37"], seed=seed)
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


def table() -> str:
    """Means and standard deviations over seeds."""
    several: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in ROWS.all():
        several.setdefault(tuple(row[name] for name in ("data", "schedule", "what", "tap", "start")), []).append(row)
    text = [
        "Top-1 on the test split in per cent, means and standard deviations over seeds (`python benchmarks/dfl.py`).",
        "",
        f"| data | trained | streams | filters read | begin as | seeds | {' | '.join(KEPT)} |",
        "|---" * (6 + len(KEPT)) + "|",
    ]
    order = sorted(several, key=lambda one: (list(TAPS).index(one[0]), one[1] == "full", one[3], one[4]))
    for data, schedule, what, tap, start in order:
        same = several[data, schedule, what, tap, start]
        cells = [cell([float(row[name]) for row in same]) if same[0][name] else "" for name in KEPT]
        text.append(f"| {data} | {schedule} | {what} | {tap} | {start} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join([*text, "", f"Machine: {', '.join(sorted({row['machine'] for row in ROWS.all()}))}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["light", "full", "grey", "patches", "step", "table"])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=[], help="data, tap, streams, start or seed")
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.study in {"step", "patches"}:
        step(options.data) if options.study == "step" else on_the_animal(options.data, options.runs)
        return
    known = {tuple(row[name] for name in ("data", "schedule", "tap", "what", "start", "seed")) for row in ROWS.all()}
    schedule = "full" if options.study == "full" else "light"
    for data in {"light": ("cub60", "pets37"), "full": tuple(FULLY), "grey": ("grey",), "table": ()}[options.study]:
        root = grey(options.runs / "data-grey") if data == "grey" else data_at(data, options.data, options.runs)
        several = [("", "G", "")]
        if schedule == "full":
            several.append((TAPS[data][0], "G + P + side", "patches"))
        else:
            several += [
                (tap, what, start) for tap in TAPS[data] for what in STREAMS for start in ("patches", "random")
            ]
        missing = {
            (*one, seed)
            for seed in SEEDS
            for one in several
            if (data, schedule, *one, str(seed)) not in known
            and all(word in (data, *one, str(seed)) for word in options.only)
        }
        if not missing:
            continue
        for row in (full if schedule == "full" else light)(data, root, options.runs, missing):
            ROWS.add(row)
    TABLE.write_text(table())


if __name__ == "__main__":
    main()
