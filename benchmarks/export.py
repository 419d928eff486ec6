"""What an exported file keeps of a model, what it weighs, how fast its engine is; in float32 and 8-bit integers.

    python benchmarks/export.py tune final speed table --data FOLDER --runs FOLDER

The folder holds data sets in layouts that ``whatwhere evaluate`` reads. ``tune`` is what the way to integers was
chosen by: the embedded network, ranges from training pictures of imagenette, measured on its validation pictures.
``final`` measures what was chosen where nothing was: on imagenet-boxes, with ranges from the training pictures of
imagenette; and, of a light run on the training split of flowers17, on its test split. Top-1, and plain CAM of the
true class under the half-open protocol, one best threshold of the split for each number. ``speed`` is of batches of
preprocessed images, over PyTorch's plain forward, which gives logits alone where files give class maps too; taken in
turn, in one process, on ``--threads``.

Rows go to ``export.csv`` as they come, and are not done again; ``table`` makes ``export.md`` of them.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from networks import WHERE, network_of
from onnxruntime.quantization import CalibrationMethod
from rows import Rows
from timing import in_turn, machine, ratios

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.classifiers.exported import To, export, runner
from whatwhere.classifiers.int8 import agreement_of, correlation_of, pictures_in, quantize
from whatwhere.datasets import open_dataset
from whatwhere.evaluation.evaluate import evaluate, plan_of

HERE = Path(__file__).parent
TABLE = HERE / "export.md"
FIELDS = [
    *("study", "data", "file", "images", "MB", "top-1", *WHERE, "agreement", "map correlation"),
    *("batch", "speed", "low", "high", "machine"),
]
ROWS = Rows(HERE / "export.csv", FIELDS)
FILES: dict[str, tuple[To, bool] | None] = {
    "PyTorch float32": None,
    "ONNX float32": ("onnx", False),
    "ONNX int8": ("onnx", True),
    "OpenVINO float32": ("openvino", False),
    "OpenVINO int8": ("openvino", True),
}
REPORTED = (("imagenet-boxes", "val", "imagenette/train"), ("flowers17", "test", "flowers17/train"))


def file_of(net: whatwhere.Classifier, data: str, kind: str, pictures: Path, runs: Path) -> Path:
    to, is_int8 = FILES[kind] or ("onnx", False)
    folder = runs / "exported" / data / kind.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("model.xml" if to == "openvino" else "model.onnx")
    if not file.is_file():
        export(net, file, to, threshold=0.25, int8=pictures if is_int8 else None)
    return file


def classifier_of(
    net: whatwhere.Classifier, data: str, kind: str, pictures: Path, runs: Path
) -> whatwhere.Classifier:
    """What runs the file, as a classifier: one of OpenVINO is the ONNX one's, run by the other engine."""
    if FILES[kind] is None:
        return net
    file = file_of(net, data, kind, pictures, runs)
    if file.suffix == ".onnx":
        return whatwhere.load(file)
    found = whatwhere.load(file_of(net, data, kind.replace("OpenVINO", "ONNX"), pictures, runs))
    found.network.run = runner(file)
    return found


def final(root_of: Path, runs: Path) -> None:
    known = {(row["study"], row["data"], row["file"]) for row in ROWS.all()}
    for data, split, pictures in REPORTED:
        net, dataset = network_of(data, root_of, runs), open_dataset(root_of / data, split)
        for kind in FILES:
            if ("final", data, kind) in known:
                continue
            one = classifier_of(net, data, kind, root_of / pictures, runs)
            numbers = measured(one, dataset)
            if FILES[kind] is not None:
                file = file_of(net, data, kind, root_of / pictures, runs)
                weights = [other for other in (file, file.with_suffix(".bin")) if other.is_file()]
                numbers["MB"] = round(sum(other.stat().st_size for other in weights) / 1e6, 1)
            ROWS.add(
                {"study": "final", "data": data, "file": kind, "images": len(dataset), **numbers}
                | {"machine": machine()}
            )


def measured(net: whatwhere.Classifier, dataset: whatwhere.datasets.Dataset) -> dict[str, float]:
    found = evaluate(net, dataset, plan_of(["cam"], baselines=False))
    numbers = {key: round(100 * found.where("cam")[name].value, 2) for key, name in WHERE.items()}
    return {"top-1": round(100 * found.classification["top-1"].value, 2), **numbers}


def tune(root_of: Path, runs: Path) -> None:
    """Ways to integers on the validation pictures, beside the float file."""
    net, dataset = whatwhere.load(), open_dataset(root_of / "imagenette", "val")
    train_pictures = root_of / "imagenette" / "train"
    file = file_of(net, "imagenet-boxes", "ONNX float32", train_pictures, runs)
    model = file.read_bytes()
    convolutions = [node.name for node in onnx.load_from_string(model).graph.node if node.op_type == "Conv"]
    percentile = {"calibrate_method": CalibrationMethod.Percentile}
    ways: dict[str, dict[str, object] | None] = {
        "float32": None,
        "all, from least to largest": {},
        "all but the class maps": {"nodes_to_exclude": convolutions[-1:]},
        "all but the first layer": {"nodes_to_exclude": convolutions[:1]},
        "all but the first six layers": {"nodes_to_exclude": convolutions[:6]},
        "all but the first layer and the class maps": {"nodes_to_exclude": [convolutions[0], convolutions[-1]]},
        "all, by tensor and not by channel": {"per_channel": False},
        "all, weights of 7 bits": {"reduce_range": True},
        "all, percentile 99.99": percentile | {"extra_options": {"CalibPercentile": 99.99}},
        "all, entropy": {"calibrate_method": CalibrationMethod.Entropy},
    }
    known = {(row["study"], row["file"]) for row in ROWS.all()}
    pictures = pictures_in(train_pictures, net.preprocess, uint8=False)
    seen = [pictures.read(sample.path) for sample in dataset]
    own = [runner(file)(images) for images in seen]
    for name, options in ways.items():
        if ("tune", name) in known:
            continue
        made = runs / "exported" / "tuned.onnx"
        made.write_bytes(model if options is None else quantize(model, fewer(pictures, options), **options))
        others = [run(images) for run in [runner(made)] for images in seen]
        numbers = measured(whatwhere.load(made), dataset)
        numbers["agreement"] = round(100 * agreement_of(own, others), 2)
        numbers["map correlation"] = round(correlation_of(own, others), 4)
        numbers["MB"] = round(made.stat().st_size / 1e6, 1)
        ROWS.add(
            {"study": "tune", "data": "imagenette", "file": name, "images": len(dataset), **numbers}
            | {"machine": machine()}
        )


def fewer(pictures, options):
    """Histograms hold what all pictures gave at once."""
    if "calibrate_method" not in options:
        return pictures
    return type(pictures)(pictures.calibrated[::4], pictures.compared, pictures.preprocess, pictures.uint8)


def speed(root_of: Path, runs: Path, rounds: int) -> None:
    net, dataset = whatwhere.load(), open_dataset(root_of / "imagenette", "val")
    inputs = torch.stack([net.preprocess(whatwhere.open_photo(sample.path))[0] for sample in dataset.samples[:16]])
    files = {kind: file_of(net, "imagenet-boxes", kind, root_of / "imagenette" / "train", runs) for kind in FILES}
    engines = {kind: runner(file) for kind, file in files.items() if FILES[kind] is not None}
    for batch in (1, 16):
        images = inputs[:batch].contiguous()
        given = np.ascontiguousarray(images.numpy())

        def plain(images: torch.Tensor = images) -> None:
            with torch.inference_mode():
                net.network(images)

        runs_of = {"PyTorch float32": plain}
        runs_of |= {kind: lambda run=run, given=given: run(given) for kind, run in engines.items()}
        seconds = in_turn(runs_of, rounds)
        for kind in engines:
            middle, low, high = ratios({"one": seconds["PyTorch float32"], "other": seconds[kind]}, "other")["one"]
            numbers = {"speed": round(middle, 2), "low": round(low, 2), "high": round(high, 2)}
            ROWS.add(
                {"study": "speed", "data": "imagenette", "file": kind, "batch": batch, **numbers}
                | {"machine": machine()}
            )


def table() -> str:
    found = ROWS.all()
    speeds = {
        (row["file"], row["batch"]): f"{row['speed']} ({row['low']} to {row['high']})"
        for row in found
        if row["study"] == "speed"
    }
    text = [
        "`python benchmarks/export.py`; top-1 and boxes in per cent: plain CAM of the true class, half-open boxes,",
        "the best one threshold of the split for each number. Speed is images a second over PyTorch's plain forward,",
        "which gives logits alone; the embedded network at 224 x 224, median and quartiles of rounds taken in turn.",
        "",
        "## Where nothing was chosen",
        "",
        f"| data, images | file | MB | top-1 | {' | '.join(WHERE)} |",
        "|---|---|---|---|" + "---|" * len(WHERE),
    ]
    for row in found:
        if row["study"] == "final":
            numbers = " | ".join(row[key] for key in ("file", "MB", "top-1", *WHERE))
            text.append(f"| {row['data']}, {row['images']} | {numbers} |")
    text += ["", "## Speed", "", "| file | batch 1 | batch 16 |", "|---|---|---|"]
    for kind in FILES:
        if (kind, "1") in speeds:
            text.append(f"| {kind} | {speeds[kind, '1']} | {speeds[kind, '16']} |")
    names = ("MB", "top-1", *WHERE, "agreement", "map correlation")
    text += [
        "",
        "## Ways to integers, on the validation pictures of imagenette",
        "",
        "Agreement is the share of pictures with the float file's most probable class; correlation is of that",
        "class's maps. Histograms (percentile, entropy) were taken from every fourth picture.",
        "",
        f"| what is of integers | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    text += [
        f"| {row['file']} | {' | '.join(row[key] for key in names)} |" for row in found if row["study"] == "tune"
    ]
    machines = sorted({row["machine"] for row in found})
    return "\n".join([*text, "", f"Machine: {'; '.join(machines)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=["tune", "final", "speed", "table"])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="with one, no engine's threads spin beside another's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if "tune" in options.studies:
        tune(options.data, options.runs)
    if "final" in options.studies:
        final(options.data, options.runs)
    if "speed" in options.studies:
        speed(options.data, options.runs, options.rounds)
    if "table" in options.studies:
        TABLE.write_text(table() + "\n")


if __name__ == "__main__":
    main()
