"""What training reaches: accuracy and localization of light and full mode, of heads, aids and small networks.

    python benchmarks/training.py bars|where|scratch|loop [--data ../shared/data] [--runs FOLDER] [--only WORD ...]

Each run is a folder below --runs that is gone on with if it was cut off, and one row in ``benchmarks/training.csv``
when it is whole; what has a row is not done again. Settings were chosen on held-out parts of the training splits;
the test splits are looked at once, here. ``loop`` times an epoch of full mode against the same in a bare loop.
``python benchmarks/training.py table`` makes ``benchmarks/training.md`` of the rows.
"""

import argparse
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rows import Rows
from timing import in_turn, machine, ratios

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import open_dataset
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.training.fit import train
from whatwhere.training.recipe import Recipe

HERE = Path(__file__).parent
TABLE = HERE / "training.md"
SEEDS = (0, 1, 2)
KEPT = {
    "top-1": "top-1",
    "mean per class": "mean per class",
    "MaxBoxAccV2": "gradcam MaxBoxAccV2",
    "PxAP": "gradcam PxAP",
}
FIELDS = ["study", "data", "what", "seed", *KEPT, "minutes", "machine"]
ROWS = Rows(HERE / "training.csv", FIELDS)

LIGHT = Recipe(size=(256, 256), validation=0.0)
FULL = replace(LIGHT, mode="full")
FEW = replace(FULL, epochs=8, lr=1e-5, crop=0.6, batch=16)
"""For a few images a class: higher rates lost on what was held out."""
KNOWN = replace(FULL, epochs=4, lr=5e-5, crop=0.6)
"""For images that the weights have seen: the same."""
SHORT = replace(FULL, epochs=8, size=(224, 224), frozen=0.5)
"""Where heads and losses are compared."""
RECIPES = {"flowers17": FULL, "pets37": FEW, "pets37+pets3": FEW, "imagenette": KNOWN, "cub60": FULL}


class Run(NamedTuple):
    """One training."""

    study: str
    data: str
    what: str
    recipe: Recipe


def bars() -> Iterator[Run]:
    """Light and full mode on each data set, three seeds."""
    for mode in ("light", "full"):
        for seed in SEEDS:
            for data, full in RECIPES.items():
                test = "val" if data == "imagenette" else None
                recipe = LIGHT if mode == "light" else full
                yield Run("bars", data, mode, replace(recipe, seed=seed, test=test))


def reference(root: Path) -> dict[str, object]:
    """The embedded network with its 1000 classes on imagenette, whose folders have their WordNet ids."""
    found = evaluate(
        whatwhere.load(), open_dataset(root / "imagenette", "val"), plan_of(["gradcam"], baselines=False)
    )
    values = {"top-1": found.classification["top-1"], "mean per class": found.classification["mean per class"]}
    values["MaxBoxAccV2"] = found.where("gradcam")["MaxBoxAccV2"]
    row: dict[str, object] = {"study": "bars", "data": "imagenette", "what": "embedded, 1000 classes", "seed": ""}
    return row | {name: round(100 * one.value, 2) for name, one in values.items()} | {"machine": machine()}


def where() -> Iterator[Run]:
    """Heads, losses and aids on flowers17: how well the map of the class lies on the flower."""
    ours = {"mean": {"pool": "mean"}, "max, before": {"pool": "max"}}
    for pool in ("max", "lse", "topk", "noisy-or", "attention"):
        ours[pool] = {"pool": pool, "order": "linear-pool"}
    ours["scale and offset"] = {"scaled": True}
    for pool in ("mean", "max"):
        ours[f"3 x 3 convolution, {pool}"] = {"units": 512, "pool": pool}
    for seed in SEEDS:
        for name, head in ours.items():
            yield Run("where", "flowers17", f"head: {name}", replace(SHORT, head=head, seed=seed))
        yield Run("where", "flowers17", "dense loss", replace(SHORT, loss="dense", seed=seed))
        for aid in ("has", "cutmix", "adl", "acol", "spg"):
            yield Run("where", "flowers17", f"aid: {aid}", replace(SHORT, aids=(aid,), seed=seed))


def scratch() -> Iterator[Run]:
    """Small networks from random weights on small pictures: normalization and anti-aliased pooling."""
    plain = Recipe(
        mode="full",
        pretrained=False,
        light_start=False,
        validation=0.0,
        test="val",
        size=(64, 64),
        batch=64,
        lr=2e-3,
        layer_decay=1.0,
    )
    resnet = {"channels": [16, 32, 64, 128], "output_stride": 16}
    for seed in SEEDS:
        for model, options, epochs in (("lenet5", {}, 10), ("timm/resnet10t", resnet, 6)):
            for norm in ("batch", "layer", "group", "none"):
                for antialias in (False, True):
                    what = f"{model}, {norm}{', blurred' if antialias else ''}"
                    chosen = {**options, "norm": norm, "antialias": antialias}
                    recipe = replace(plain, model=model, options=chosen, epochs=epochs, seed=seed)
                    yield Run("scratch", "tiny-imagenet", what, recipe)


def do(run: Run, root: Path, runs: Path) -> dict[str, object]:
    """Train, or go on; the row."""
    out = folder_of(run, runs)
    clock = out.with_name(f"{out.name}.seconds")
    before = float(clock.read_text()) if clock.exists() else 0.0
    begun = os.times().elapsed

    def watch(what: str, done: int, total: int) -> None:
        clock.write_text(str(before + os.times().elapsed - begun))

    net = train(data_at(run.data, root, runs), out, run.recipe, resume=True, watch=watch)
    measured = net.about["measured"]
    row: dict[str, object] = {"study": run.study, "data": run.data, "what": run.what, "seed": run.recipe.seed}
    row |= {key: round(100 * measured[name], 2) for key, name in KEPT.items() if name in measured}
    minutes = round(float(clock.read_text()) / 60, 2) if clock.exists() else ""  # another study has trained it
    return row | {"minutes": minutes, "machine": machine()}


def folder_of(run: Run, runs: Path) -> Path:
    """Where a run is kept."""
    return runs / f"{run.data}-{run.what}-{run.recipe.seed}".replace("/", "_").replace(" ", "_").replace(",", "")


def data_at(data: str, root: Path, runs: Path) -> Path:
    """The folder of a data set; of two together one that links to the pictures of both."""
    first, _, second = data.partition("+")
    if not second:
        return root / data
    both = runs / f"data-{data}"
    if not both.exists():
        scratch = runs / f"data-{data}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        for source, split in ((first, "train"), (second, "train"), (first, "test")):
            for file in sorted((root / source / split).rglob("*.*")):
                place = scratch / split / file.parent.name / f"{source}-{file.name}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.resolve())
        scratch.rename(both)
    return both


def loop(root: Path, runs: Path) -> None:
    """One epoch of full mode, with its metrics and its state on disk, and of a bare loop over the same images."""
    from whatwhere.classifiers.classifier import logits_of
    from whatwhere.training.data import Drawn, Shown, split_data
    from whatwhere.training.fit import beginning, resolved
    from whatwhere.training.folder import STATE
    from whatwhere.training.full import fit_network, loader_of
    from whatwhere.training.loop import rates
    from whatwhere.training.objective import loss_of, prior_of

    # the average of the weights is not the loop's
    recipe = resolved(replace(FULL, size=(224, 224), epochs=1, frozen=0.0, ema=0.0, light_start=False))
    splits = split_data(root / "flowers17", recipe)
    net = beginning(recipe, splits)
    prior = prior_of(splits.train.targets())

    def ours() -> None:
        shutil.rmtree(runs / "loop", ignore_errors=True)
        (runs / "loop" / STATE).mkdir(parents=True)
        fit_network(net, recipe, splits, runs / "loop")

    def bare() -> None:
        network = net.network.to(memory_format=torch.channels_last).train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.AdamW(rates(network, recipe), weight_decay=recipe.weight_decay)
        seen = Shown(splits.train, net.preprocess, recipe)
        for images, targets in loader_of(seen, recipe, recipe.batch, Drawn(splits.train, recipe)):
            logits = logits_of(network(images.to(memory_format=torch.channels_last)))
            optimizer.zero_grad()
            loss = loss_of(logits + prior, targets, smoothing=recipe.smoothing)
            loss.backward()
            optimizer.step()

    found = ratios(in_turn({"bare": bare, "ours": ours}, rounds=7, warmup=1), "bare")
    middle, low, high = found["ours"]
    print(f"{machine()}\nloop / bare loop: {middle:.3f} ({low:.3f} to {high:.3f})")


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def table() -> str:
    """Means and spreads over seeds, a table a study."""
    found: dict[str, dict[tuple[str, str], list[dict[str, str]]]] = {}
    for row in ROWS.all():
        found.setdefault(row["study"], {}).setdefault((row["data"], row["what"]), []).append(row)
    text = [
        "Means over seeds, and their standard deviation, in per cent; minutes of a run on this machine.",
        "`python benchmarks/training.py`, the test splits looked at once; pets37 in full mode twice.",
        "",
    ]
    for study, several in found.items():
        text += [
            f"## {study}",
            "",
            f"| data | what | seeds | {' | '.join(KEPT)} | minutes |",
            "|---" * (len(KEPT) + 4) + "|",
        ]
        for (data, what), same in several.items():
            cells = [cell([float(row[name]) for row in same if row[name]]) for name in KEPT]
            minutes = statistics.mean(float(row["minutes"] or "nan") for row in same)
            cells.append("" if minutes != minutes else f"{minutes:.1f}")
            text.append(f"| {data} | {what} | {len(same)} | {' | '.join(cells)} |")
        text += [
            "",
            f"Machine: {', '.join(sorted({row['machine'] for same in several.values() for row in same}))}",
            "",
        ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["bars", "where", "scratch", "loop", "table"])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=[], help="words that a run's data, name or seed must be among")
    parser.add_argument("--threads", type=int, default=2, help="1 for two processes beside one another")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.study == "loop":
        loop(options.data, options.runs)
        return
    if options.study != "table":
        options.runs.mkdir(parents=True, exist_ok=True)
        known = {(row["study"], row["data"], row["what"], row["seed"]) for row in ROWS.all()}
        for run in {"bars": bars, "where": where, "scratch": scratch}[options.study]():
            key = (run.study, run.data, run.what, str(run.recipe.seed))
            if key in known or not all(word in key for word in options.only):
                continue
            ROWS.add(do(run, options.data, options.runs))
        if options.study == "bars" and ("bars", "imagenette", "embedded, 1000 classes", "") not in known:
            ROWS.add(reference(options.data))
    TABLE.write_text(table() + "\n")


if __name__ == "__main__":
    main()
