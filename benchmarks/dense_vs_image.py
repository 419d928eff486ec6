"""Why does a classifier that was trained on whole images locate? The same network, trained both ways.

    python benchmarks/dense_vs_image.py [--data ../shared/data] [--runs FOLDER] [--sets flowers17 pets37]

Image level: one loss of the mean over the grid. Dense: a loss for each cell, which carries its image's label. Same
weights to begin with, same pictures in the same order, same seeds. Reported of each: top-1, MaxBoxAccV2, PxAP of the
map of the true class on the test split, and how far the maps of both agree. Runs are gone on with if they were cut
off, and shared with ``training.py where``; ``benchmarks/dense_vs_image.md`` is written at the end.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from timing import machine
from training import SEEDS, SHORT, Run, cell, data_at, folder_of

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import open_dataset
from whatwhere.evaluation.agreement import agreement
from whatwhere.training.fit import train

TABLE = Path(__file__).with_suffix(".md")
LOSSES = {"image": "head: mean", "dense": "dense loss"}
"""And what the study of heads calls the same runs."""
KEPT = ("top-1", "gradcam MaxBoxAccV2", "gradcam PxAP", "gradcam pointing", "gradcam energy")


def compared(nets: Sequence[whatwhere.Classifier], folder: Path) -> dict[str, float]:
    """How far two networks' maps of the true class agree, means over the images of the test split."""
    dataset, found = open_dataset(folder, "test"), []
    for sample in dataset:
        name = dataset.classes[sample.labels[0]]
        one, other = (whatwhere.explain(net, sample.photo(), target=name)[0].heat for net in nets)
        found.append(agreement(one, other))
    return {key: statistics.mean(one[key] for one in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--sets", nargs="*", default=["flowers17", "pets37"])
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    options.runs.mkdir(parents=True, exist_ok=True)
    text = [
        "Image-level and dense training of the same network; per cent, means and standard deviations over seeds.",
        "",
    ]
    text += ["| data | loss | top-1 | MaxBoxAccV2 | PxAP | pointing | energy |", "|---|---|---|---|---|---|---|"]
    notes = []
    for data in options.sets:
        root = data_at(data, options.data, options.runs)
        found: dict[str, list[dict[str, float]]] = {loss: [] for loss in LOSSES}
        pairs = []
        for seed in SEEDS:
            nets = []
            for loss, what in LOSSES.items():
                recipe = replace(SHORT, head={"pool": "mean"}, loss=loss, seed=seed)
                folder = folder_of(Run("where", data, what, recipe), options.runs)
                nets.append(train(root, folder, recipe, resume=True))
                found[loss].append(nets[-1].about["measured"])
            pairs.append(compared(nets, root))
        for loss, several in found.items():
            cells = [cell([100 * one[name] for one in several if name in one]) for name in KEPT]
            text.append(f"| {data} | {loss} | {' | '.join(cells)} |")
        agreed = [f"{key} {statistics.mean(pair[key] for pair in pairs):.2f}" for key in pairs[0]]
        notes.append(f"{data}: maps of both agree by {', '.join(agreed)}.")
    TABLE.write_text("\n".join([*text, "", *notes, "", machine(), ""]))
    print("\n".join([*text, "", *notes]))


if __name__ == "__main__":
    main()
