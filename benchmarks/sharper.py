"""What each step towards a sharper where gains and costs, and what the presets reach where nothing was chosen.

    python benchmarks/sharper.py steps final distilled cost table --data FOLDER --runs FOLDER

The folder holds data sets in layouts that ``whatwhere evaluate`` reads. ``steps`` are measured where presets were
chosen: on boxed validation pictures of imagenette (embedded network) and training pictures of pets3 with their
masks (a light run on them), ``--images`` of each, always the same. ``final`` measures the presets on the rest, where
nothing was chosen: imagenet-boxes with the embedded network, the test splits of flowers17, pets3 and pets37 with
light runs on their training splits; ``distilled`` the head that ``best`` taught on those splits, or, for the embedded
network, on the training pictures of imagenette. Maps are of the true class; boxes are half-open; thresholds, one for
a split, are the best of each number. ``cost`` is the time of a look, its map, its heat and its boxes for one image of
224 x 224, over that of a plain forward, taken in turn.

Rows go to ``sharper.csv`` as they come, and are not done again; ``table`` makes ``sharper.md`` of them.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from networks import WHERE, network_of
from rows import Rows
from timing import in_turn, machine, ratios
from torch import Tensor

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.classifiers.convert import dense
from whatwhere.datasets import open_dataset, open_splits
from whatwhere.evaluation.evaluate import plan_of
from whatwhere.evaluation.results import Evaluation
from whatwhere.evaluation.run import run
from whatwhere.geometry import Frame
from whatwhere.maps import Method
from whatwhere.maps.cam import cam
from whatwhere.maps.combine import augment, fuse, root, zoom
from whatwhere.maps.components import oriented
from whatwhere.maps.eigencam import eigencam
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.layercam import layercam
from whatwhere.maps.shape import positive, to_original, unit, upsample
from whatwhere.presets import PRESETS, Preset, Refine
from whatwhere.regions.components import components
from whatwhere.regions.refine import grabcut, guided, settle, superpixels, walk
from whatwhere.regions.threshold import fraction
from whatwhere.scores import contrast
from whatwhere.training.distill import distill

HERE = Path(__file__).parent
TABLE = HERE / "sharper.md"
KEPT = {
    **WHERE,
    "mask IoU": "mask IoU",
    "trust ROC AUC": "trust ROC AUC",
    "trusted half": "trusted half",
}
FIELDS = ["study", "data", "step", "images", *KEPT, "threshold", "cost", "low", "high", "machine"]
ROWS = Rows(HERE / "sharper.csv", FIELDS)
TUNED = (("imagenette", "val"), ("pets3", "train"))
REPORTED = (("imagenet-boxes", "val"), ("flowers17", "test"), ("pets3", "test"), ("pets37", "test"))
BATCH = 16


class Step(NamedTuple):
    """One thing that might make the where sharper."""

    name: str
    method: Method
    refine: Refine | None = None


def runner_up(trace, score):
    """What the most probable other classes, three at most, share is taken away (``scores.contrast``)."""
    others = min(3, trace.logits.shape[1] - 1)
    return gradcam(trace, contrast(trace.class_gradient(score).argmax(1), others=others))


def erased(trace, score):
    """Look, erase what was found, look again: the higher of both maps (Wei et al., CVPR 2017)."""
    first = root(gradcam)(trace, score)
    shown = (upsample(first, tuple(trace.images.shape[2:])) < 0.5).to(trace.images)
    return torch.maximum(first, root(gradcam)(trace.net.trace(trace.images * shown[:, None]), score))


def common(trace, score):
    """The first component of the centred cells of the whole batch (deep descriptor transforming, Wei et al. 2019)."""
    b, c, *yx = trace.features.shape
    cells = trace.features.detach().transpose(0, 1).reshape(c, -1)
    cells = cells - cells.mean(1, keepdim=True)
    direction = torch.linalg.eigh((cells @ cells.T).double()).eigenvectors[:, -1].to(cells)
    component: Tensor = (direction @ cells).reshape(b, -1)
    return oriented(component, cells.reshape(c, b, -1).permute(1, 2, 0)).reshape(b, *yx)


@cache
def finer(net, stride):
    return dense(net, stride)


def dilated(stride):
    def method(trace, score):
        return gradcam(finer(trace.net, stride).trace(trace.images), score)

    return method


def stages(method):
    """The last layer and the last block of stride 16, multiplied (as RefineCAM's) after LayerCAM."""

    def fused(trace, score):
        names = [name for name, _ in trace.net.network.named_modules()]
        layers = [name for name in names if name.endswith(("blocks.4", "blocks.6"))]
        return fuse(method, layers=layers)(trace, score)

    return fused


def both(one, other):
    """The mean of two methods' roots."""
    return lambda trace, score: (root(one)(trace, score) + root(other)(trace, score)) / 2


def looked(*scales, flip=False):
    return augment(root(cam), flip=flip, scales=scales)


def voted(heat, pixels):
    return superpixels(heat, pixels)


def cut(heat, pixels):
    """GrabCut from three thresholds, half and half with the heat: soft, so that there is a threshold to choose."""
    masks = [grabcut(heat, pixels, threshold=at, sure=0.95) for at in (0.3, 0.5, 0.7)]
    return (np.mean(masks, 0) / 2 + heat / 2).astype(heat.dtype)


def settled_and_cut(heat, pixels):
    return cut(settle(heat, pixels), pixels)


def settled_and_guided(heat, pixels):
    return guided(settle(heat, pixels), pixels, radius=4)


STEPS = [
    Step("Grad-CAM", gradcam),
    Step("its root", root(gradcam)),
    Step("the runner-up classes suppressed", runner_up),
    Step("erase and look again", erased),
    Step("with the first component of the image (Eigen-CAM)", both(gradcam, eigencam)),
    Step("with the first component of the batch (DDT)", both(gradcam, common)),
    Step("LayerCAM, two stages fused", stages(layercam)),
    Step("stride 16", root(dilated(16))),
    Step("stride 8", root(dilated(8))),
    Step("mirrored too", looked(1.0, flip=True)),
    Step("size x 1.5 alone", looked(1.5)),
    Step("size x 2 alone", looked(2.0)),
    Step("sizes x 1, 1.5", looked(1.0, 1.5)),
    Step("sizes x 1, 2", looked(1.0, 2.0)),
    Step("root, guided filter", root(gradcam), guided),
    Step("root, superpixels vote", root(gradcam), voted),
    Step("root, GrabCut", root(gradcam), cut),
    Step("root, walk", root(gradcam), walk),
    Step("root, walk with colours learned", root(gradcam), settle),
    Step("sizes x 1, 1.5; walk", looked(1.0, 1.5), walk),
    Step("sizes x 1, 1.5; walk with colours learned", looked(1.0, 1.5), settle),
    Step("sizes x 1, 2; walk", looked(1.0, 2.0), walk),
    Step("sizes x 1, 2; walk with colours learned", looked(1.0, 2.0), settle),
    Step("sizes x 1, 2, mirrored; walk with colours learned", looked(1.0, 2.0, flip=True), settle),
    Step("sizes x 1, 1.5, 2; walk with colours learned", looked(1.0, 1.5, 2.0), settle),
    Step("closer where sizes x 1, 2 find something", zoom(looked(1.0, 2.0), root(gradcam))),
    Step("the same; walk with colours learned", zoom(looked(1.0, 2.0), root(gradcam)), settle),
    Step("sizes x 1, 2; walk with colours learned, guided filter", looked(1.0, 2.0), settled_and_guided),
    Step("sizes x 1, 2; walk with colours learned, GrabCut", looked(1.0, 2.0), settled_and_cut),
]


def preset_of(step: Step) -> Preset:
    return Preset(
        step.name,
        "",
        lambda trace, score: [step.method(trace, score)],
        lambda trace, score, looks: looks[0],
        step.refine,
        0.45,
        PRESETS["best"].trust,
        0.0,
    )


def measured(
    study: str, data: str, split: str, presets: list[Preset], root_of: Path, runs: Path, images: int | None = None
) -> None:
    known = {(row["study"], row["data"], row["step"]) for row in ROWS.all()}
    called = f"{data} {split}"
    wanted = [one for one in presets if (study, called, one.name) not in known]
    if not wanted:
        return
    net, dataset = network_of(data, root_of, runs), open_dataset(root_of / data, split)
    dataset = dataset.sampled(images or len(dataset))
    parts = [wanted] if study == "final" else [[one] for one in wanted]
    for part in parts:
        plan = plan_of(part, baselines=False, batch=BATCH)
        *_, found = run(net, dataset, plan, runs / "-".join([study, data, split, part[0].name]).replace(" ", "_"))
        note(study, called, part, found, len(dataset))


def distilled(data: str, split: str, root_of: Path, runs: Path) -> None:
    """A head that learned from pictures without boxes, measured on the others."""
    out, called = runs / f"{data}-distilled", f"{data} {split}"
    if ("final", called, "distilled") in {(row["study"], row["data"], row["step"]) for row in ROWS.all()}:
        return
    if not (out / "run.toml").is_file():
        net = network_of(data, root_of, runs)
        learned = "imagenette" if data.startswith("imagenet") else data
        found = distill(net, open_splits(root_of / learned, ("train",)), folder=out)
        print(f"{data}: {found.pictures} pictures, agreement {found.agreement:.3f}", flush=True)
        whatwhere.save(net, out)
    net, dataset = whatwhere.load(str(out)), open_dataset(root_of / data, split)
    plan = plan_of(["distilled"], baselines=False, batch=BATCH)
    *_, found = run(net, dataset, plan, runs / f"final-{data}-{split}-distilled")
    note("final", called, [Named("distilled")], found, len(dataset))


class Named(NamedTuple):
    """A method by its name alone."""

    name: str


def note(study: str, called: str, part: Sequence[Preset | Named], found: Evaluation, images: int) -> None:
    for one in part:
        numbers = found.where(one.name)
        row: dict[str, object] = {"study": study, "data": called, "step": one.name, "images": images}
        row |= {key: round(100 * numbers[name].value, 2) for key, name in KEPT.items() if name in numbers}
        ROWS.add(row | {"threshold": found.threshold(one.name), "machine": machine()})


def costs(rounds: int) -> None:
    """Every step and preset over a plain forward, one image, two threads."""
    net = whatwhere.load()
    photo = whatwhere.open_photo(HERE.parent / "src" / "whatwhere" / "photos" / "chelsea.jpg")
    square = whatwhere.open_photo(np.ascontiguousarray(photo.pixels[:224, :224]))
    image, frame = net.preprocess(square)[0][None], Frame.whole((224, 224), (224, 224))
    known = {(row["study"], row["step"]) for row in ROWS.all()}
    steps = [one for one in [*map(preset_of, STEPS), *PRESETS.values()] if ("cost", one.name) not in known]

    def looking(one: Preset):
        def whole() -> object:
            trace = net.trace(image)
            maps = one(trace, whatwhere.scores.of_class(285)).detach()
            heat = to_original(unit(positive(maps)), frame)[0].numpy()
            return components(fraction(one.refine(heat, square.pixels) if one.refine else heat, 0.5)).boxes

        return whole

    runs = {"forward": lambda: net.logits(image), **{one.name: looking(one) for one in steps}}
    for name, (middle, low, high) in ratios(in_turn(runs, rounds, warmup=2), "forward").items():
        numbers = {"cost": round(middle, 2), "low": round(low, 2), "high": round(high, 2)}
        if name != "forward":
            ROWS.add({"study": "cost", "step": name, **numbers, "machine": machine()})


def table() -> str:
    """The steps with their gains and costs, and what the presets reach."""
    found = ROWS.all()
    cost = {row["step"]: float(row["cost"]) for row in found if row["study"] == "cost"}
    of = {(row["study"], row["data"], row["step"]): row for row in found if row["study"] != "cost"}
    first, second = (f"{data} {split}" for data, split in TUNED)
    base = of["steps", first, STEPS[0].name], of["steps", second, STEPS[0].name]
    text = [
        "`python benchmarks/sharper.py`; in per cent, and beside them the gain over the first row. Maps of the true",
        "class, half-open boxes, the best one threshold of the split for each number. Cost is a ratio to a plain",
        "forward of the embedded network: one image of 224 x 224, 2 threads, look, map, heat and boxes.",
        "",
        "## Steps, where presets were chosen",
        "",
        f"| step | cost | {first}: MaxBoxAccV2 | IoU .7 | {second}: MaxBoxAccV2 | mask IoU |",
        "|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        pair = [of.get(("steps", data, step.name)) for data in (first, second)]
        cells = [
            "" if row is None else f"{float(row[key]):.1f} ({float(row[key]) - float(begun[key]):+.1f})"
            for row, begun, key in (
                (pair[0], base[0], "MaxBoxAccV2"),
                (pair[0], base[0], "IoU .7"),
                (pair[1], base[1], "MaxBoxAccV2"),
                (pair[1], base[1], "mask IoU"),
            )
        ]
        text.append(f"| {step.name} | {cost.get(step.name, float('nan')):.1f} | {' | '.join(cells)} |")
    text += ["", "## Presets, where nothing was chosen", ""]
    text += [f"| data | preset | cost | {' | '.join(KEPT)} |", "|---" * (len(KEPT) + 3) + "|"]
    for data, split in REPORTED:
        for name in [*PRESETS, "distilled"]:
            if row := of.get(("final", f"{data} {split}", name)):
                numbers = " | ".join(row[key] for key in KEPT)
                text.append(f"| {data} {split}, {row['images']} | `{name}` | {cost.get(name, 1.0):.1f} | {numbers} |")
    machines = sorted({row["machine"] for row in found})
    return "\n".join([*text, "", f"Machine: {'; '.join(machines)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=["steps", "final", "distilled", "cost", "table"])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--images", type=int, default=120, help="of each set, for the steps")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if "steps" in options.studies:
        for data, split in TUNED:
            measured(
                "steps", data, split, [preset_of(step) for step in STEPS], options.data, options.runs, options.images
            )
    if "final" in options.studies:
        for data, split in REPORTED:
            measured("final", data, split, list(PRESETS.values()), options.data, options.runs)
    if "distilled" in options.studies:
        for data, split in REPORTED:
            distilled(data, split, options.data, options.runs)
    if "cost" in options.studies:
        costs(options.rounds)
    if "table" in options.studies:
        TABLE.write_text(table() + "\n")


if __name__ == "__main__":
    main()
