"""Whether CAM's boxes on boxed ImageNet pictures are right, under both protocols, and what measuring that costs.

    python benchmarks/evaluation.py FOLDER [--rounds 3]

The folder is in a layout that ``whatwhere evaluate`` reads. The time of the explanations is that of ``explain`` for
the true class of every image, with the heat in the image's pixels; that of the evaluation is for the same images,
with all numbers at 1000 thresholds and their bootstrap samples. They are taken in turn, on the embedded network, 16
images at once.
"""

import argparse
import statistics
from pathlib import Path

import torch
from timing import in_turn, machine, ratios

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.datasets import Dataset, open_dataset
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.reports.evaluation import said

NUMBERS = (
    "MaxBoxAccV2",
    "MaxBoxAccV2 0.3",
    "MaxBoxAccV2 0.5",
    "MaxBoxAccV2 0.7",
    "MaxBoxAcc",
    "top-1 loc",
    "mean IoU",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    net, dataset = whatwhere.load(), open_dataset(options.folder)
    print(f"{len(dataset)} images, {machine()}\n\n{table(net, dataset)}\n")
    runs = {
        "explanations": lambda: explained(net, dataset),
        "half-open": lambda: evaluate(net, dataset, plan_of(["cam"], baselines=False)),
        "half-open with the baselines": lambda: evaluate(net, dataset, plan_of(["cam"])),
        "wsol2020": lambda: evaluate(net, dataset, plan_of(["cam"], "wsol2020", baselines=False)),
    }
    times = in_turn(runs, options.rounds, warmup=0)
    print("| | seconds, median | ratio (quartiles) |\n|---|---|---|")
    for name, (middle, low, high) in ratios(times, "explanations").items():
        print(f"| {name} | {statistics.median(times[name]):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def explained(net: whatwhere.Classifier, dataset: Dataset) -> None:
    indices = dataset.indices_in(net.labels)
    samples = dataset.samples
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        targets = [indices[sample.labels[0]] for sample in part]
        for (one,) in whatwhere.explain(net, [sample.path for sample in part], targets=targets, method="cam"):
            one.heat  # noqa: B018


def table(net: whatwhere.Classifier, dataset: Dataset) -> str:
    lines = [f"| | {' | '.join(NUMBERS)} |", f"|---|{'---|' * len(NUMBERS)}"]
    for protocol in ("half-open", "wsol2020"):
        found = evaluate(net, dataset, plan_of(["cam"], protocol))
        for name in ("cam", *found.settings["baselines"]):
            numbers = found.where(name)
            cells = [said(key, numbers[key], interval=key in {"MaxBoxAccV2", "MaxBoxAcc"}) for key in NUMBERS]
            lines.append(f"| {name}, {protocol} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
