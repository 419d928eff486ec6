"""What every map method costs, beside its peers: time as a ratio to a plain forward of the same batch, and memory.

    pip install '.[bench]'
    python benchmarks/methods.py memory looks many [--to benchmarks/methods.csv]

``looks`` are the methods of one look or a few, at batch 1 and 16; ``many`` those of many forwards, an image at a
time, since each costs as much; ``memory`` is the peak over what holds the network and its input. All are taken in
turn in one process, round by round, on the demo's photographs, for the network's top class, with the upsampling to
the input's size (but for CAM of all classes, which stays on the grid). Rows are added to the file as they come; the
table is made of the file: medians, and quartiles or, of fewer than 4 rounds, the least and the most.

The peers get what they need: the same module, layer and class. Theirs of many forwards run as many of them as ours.
"""

import argparse
import csv
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timing import machine

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.maps import METHODS
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import top_class

FIELDS = ["part", "network", "batch", "method", "library", "value", "forward"]
NETWORKS = {
    "efficientnet-lite0": "bn2",
    "torchvision/resnet50": "layer4",
    "torchvision/vgg16_bn": "features.43",
}
"""Each with the layer after which it is split, which the peers are told."""
ROUNDS = {"looks": {1: (30, 15, 6), 16: (8, 3, 2)}, "many": {1: (3, 1, 1)}}
"""At each batch, on each network."""

PEERS = ("grad-cam", "torchcam", "captum")

Run = Callable[[], object]

OF_GRAD_CAM = {
    "gradcam": "GradCAM",
    "gradcampp": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "gradcam_elementwise": "GradCAMElementWise",
    "shapleycam": "ShapleyCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "kpcacam": "KPCA_CAM",
    "fem": "FEM",
    "fullgrad": "FullGrad",
    "ablationcam": "AblationCAM",
    "scorecam": "ScoreCAM",
}
OF_TORCHCAM = {
    "cam": "CAM",
    "gradcam": "GradCAM",
    "gradcampp": "GradCAMpp",
    "smoothgradcampp": "SmoothGradCAMpp",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "scorecam": "ScoreCAM",
    "sscam": "SSCAM",
    "iscam": "ISCAM",
}
LOOKS = [
    "cam",
    "gradcam",
    "gradcampp",
    "smoothgradcampp",
    "xgradcam",
    "hirescam",
    "layercam",
    "gradcam_elementwise",
    "shapleycam",
    "eigencam",
    "eigengradcam",
    "kpcacam",
    "fem",
    "fullgrad",
]
MANY = {
    "ablationcam": {},
    "scorecam": {},
    "sscam": {"samples": 1},
    "iscam": {"samples": 1},
    "rise": {"samples": 1000},
    "occlusion": {},
    "clustercam": {},
}
"""With their options; on the two large networks without those of more than Score-CAM's forwards."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["looks", "many", "memory", []])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, help="fewer rounds, or more")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--malloc", choices=["kept", "default"], default="kept", help="freed memory stays, or not")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if "memory" in options.parts:
        memory(options.to)  # first, while malloc still gives memory back
    if options.malloc == "kept":
        keep_freed_memory()
    for part in options.parts:
        for at, name in enumerate(NETWORKS):
            if part != "memory" and name in options.networks:
                for batch, rounds in ROUNDS[part].items():
                    if batch not in options.batches:
                        continue
                    timed(part, name, batch, options.rounds or rounds[at], options.to)
    rows = list(csv.DictReader(options.to.open(newline="")))
    print(f"{machine()}\n\n{in_short(rows)}\n\n{in_full(rows)}")


def timed(part: str, name: str, batch: int, rounds: int, to: Path) -> None:
    net = loaded(name)
    images = photographs(net, batch)
    runs = looks(net, images, name) if part == "looks" else many(net, images, name)
    for _, _, run in looks(net, images[:1], name) if part == "looks" else []:
        run()  # to warm up
    base = partial(forward, net, images)
    for _ in range(3):
        base()
    for _ in range(rounds):
        rows, bases = [], [seconds(base) for _ in range(3)]
        for at, (method, library, run) in enumerate(runs):
            rows.append({"method": method, "library": library, "value": seconds(run)})
            if at % 4 == 0 or part == "many":
                bases.append(seconds(base))
        middle = statistics.median(bases)
        add(to, [row | {"part": part, "network": name, "batch": batch, "forward": middle} for row in rows])


def seconds(run: Run) -> float:
    time.sleep(0.1)  # until the threads of the library before no longer wait for work by spinning
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def loaded(name: str) -> whatwhere.Classifier:
    net = whatwhere.load(name, pretrained=name == "efficientnet-lite0")
    net.network.requires_grad_(True)
    return net


def photographs(net: whatwhere.Classifier, batch: int) -> torch.Tensor:
    """Those of the demo: what a picture leaves dead of the channels decides what many forwards cost."""
    paths = sorted(Path(whatwhere.__path__[0], "photos").glob("*.jpg"))
    photos = [net.preprocess(whatwhere.open_photo(path))[0] for path in paths]
    return torch.stack([photos[i % len(photos)] for i in range(batch)])


def forward(net: whatwhere.Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.network(images)


def ours(net: whatwhere.Classifier, images: torch.Tensor, method: Callable) -> Run:
    size = (images.shape[2], images.shape[3])
    return lambda: upsample(unit(positive(method(net.trace(images), top_class))), size)


def looks(net: whatwhere.Classifier, images: torch.Tensor, name: str) -> list[tuple[str, str, Run]]:
    runs: list[tuple[str, str, Run]] = []
    lawful = name != "torchvision/vgg16_bn"
    if lawful:
        runs.append(("cam of all classes", "whatwhere", lambda: net.class_maps(net.trace(images))))
        for engine, fast in compiled(net, images).items():
            label = f"cam of all classes, {engine}"
            runs.append((label, "whatwhere", lambda fast=fast: fast.class_maps(fast.trace(images))))
    for method in LOOKS:
        if method != "cam" or lawful:
            runs.append((method, "whatwhere", ours(net, images, METHODS[method])))
            runs += peers(method, net, images, name)
    return runs


def many(net: whatwhere.Classifier, images: torch.Tensor, name: str) -> list[tuple[str, str, Run]]:
    engines = {"whatwhere": net} | {f"whatwhere, {name}": fast for name, fast in compiled(net, images).items()}
    for engine in engines.values():
        METHODS["clustercam"](engine.trace(images), top_class, k=40)  # to warm up
    runs: list[tuple[str, str, Run]] = []
    for method, options in MANY.items():
        if options and name != "efficientnet-lite0":
            continue
        for library, engine in engines.items():
            if method != "ablationcam" or engine is net:
                runs.append((method, library, ours(engine, images, partial(METHODS[method], **options))))
        runs += peers(method, net, images, name)
    return runs


def compiled(net: whatwhere.Classifier, images: torch.Tensor) -> dict[str, whatwhere.Classifier]:
    """Those engines that compute in what they are asked for: not all processors have bfloat16."""
    found = {}
    for backend, dtype in (
        ("onnxruntime", torch.float32),
        ("openvino", torch.float32),
        ("openvino", torch.bfloat16),
    ):
        fast = net.compiled(backend, dtype)
        fast.trace(images[:1])
        if fast.network.computed == dtype:
            found[f"{backend}, {str(dtype).removeprefix('torch.')}"] = fast
    return found


def peers(method: str, net: whatwhere.Classifier, images: torch.Tensor, name: str) -> list[tuple[str, str, Run]]:
    found: list[tuple[str, str, Run]] = []
    network, layer = net.network, NETWORKS[name]
    if method in OF_GRAD_CAM:
        kind, classes = getattr(pytorch_grad_cam, OF_GRAD_CAM[method]), forward(net, images).argmax(1).tolist()
        layers = [] if method == "fullgrad" else [network.get_submodule(layer)]
        found.append((method, "grad-cam", lambda: grad_cam(kind, network, layers, images, classes)))
    if method in OF_TORCHCAM:
        other = getattr(torchcam.methods, OF_TORCHCAM[method])
        samples = {"num_samples": MANY[method]["samples"]} if method in {"sscam", "iscam"} else {}
        found.append((method, "torchcam", lambda: torch_cam(partial(other, **samples), network, layer, images)))
    if method == "occlusion":
        found.append((method, "captum", lambda: occluded(network, images)))
    return found


def grad_cam(kind: Callable, network: torch.nn.Module, layers: list, images: torch.Tensor, classes: list) -> object:
    with kind(network, layers) as cam:
        if hasattr(cam, "batch_size"):
            cam.batch_size = 32
        return cam(images, [ClassifierOutputTarget(index) for index in classes])


def torch_cam(kind: Callable, network: torch.nn.Module, layer: str, images: torch.Tensor) -> object:
    with kind(network, layer) as cam:
        scores = network(images)
        return cam(scores.argmax(1).tolist(), scores)


def occluded(network: torch.nn.Module, images: torch.Tensor) -> object:
    with torch.no_grad():
        return captum.attr.Occlusion(network).attribute(
            images,
            sliding_window_shapes=(3, 32, 32),
            strides=(3, 16, 16),
            target=network(images).argmax(1),
            perturbations_per_eval=16,
        )


def memory(to: Path) -> None:
    """Peak resident memory over that of the network and its input: vgg16_bn, 16 images."""
    net = loaded("torchvision/vgg16_bn")
    images = photographs(net, 16)
    quick = MANY.keys() - {"ablationcam"}  # as much for one image as for all
    runs: list[tuple[str, str, Run]] = [("forward", "torch", lambda: forward(net, images))]
    for method in (*LOOKS[1:], *(MANY.keys() - {"sscam", "iscam"})):  # which are Score-CAM to the memory
        part = images[:1] if method in quick else images
        options = {"samples": 50} if method == "rise" else MANY.get(method, {})
        runs.append((method, "whatwhere", ours(net, part, partial(METHODS[method], **options))))
    for method in ("gradcam", "gradcampp", "layercam"):
        runs += peers(method, net, images, "torchvision/vgg16_bn")
    forward(net, images)
    base = 0.0
    for method, library, run in runs:
        gibibytes = peak(run)
        base = base or gibibytes
        row = {"part": "memory", "network": "torchvision/vgg16_bn", "batch": 16, "method": method, "library": library}
        add(to, [row | {"value": gibibytes, "forward": base}])


def peak(run: Run) -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = high_water()
    run()
    return high_water() - before


def high_water() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def add(to: Path, rows: list[dict[str, object]]) -> None:
    with to.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(row | {key: f"{row[key]:.5f}" for key in ("value", "forward")} for row in rows)


def in_short(rows: list[dict[str, str]]) -> str:
    """Medians: ours, and after a stroke the fastest peer's."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        columns, heads = columns_of(rows, part)
        lines += ["", f"| {part} | {' | '.join(heads)} | fastest peer |", f"|---|{'---|' * (len(heads) + 1)}"]
        for method in dict.fromkeys(row["method"] for row in rows if row["part"] == part):
            found = [
                {
                    library: statistics.median(shares)
                    for library, shares in shares_of(rows, part, column, method).items()
                }
                for column in columns
            ]
            cells = []
            for library in dict.fromkeys(library for one in found for library in one):
                if library not in PEERS:
                    texts = [brief(one[library]) if library in one else "" for one in found]
                    theirs = [min(of_peers(one).values(), default=None) for one in found]
                    both = [
                        f"{text} / {brief(peer)}" if text and peer else text
                        for text, peer in zip(texts, theirs, strict=True)
                    ]
                    engine = library.removeprefix("whatwhere").removeprefix(", ")
                    cells.append((f"`{method}`{', ' if engine else ''}{engine}", both))
            fastest = {min(peers_of, key=peers_of.__getitem__) for one in found if (peers_of := of_peers(one))}
            lines += [f"| {name} | {' | '.join(both)} | {', '.join(sorted(fastest))} |" for name, both in cells]
    return "\n".join(lines[1:])


def of_peers(medians_of: dict[str, float]) -> dict[str, float]:
    return {library: value for library, value in medians_of.items() if library in PEERS}


def shares_of(rows: list[dict[str, str]], part: str, column: tuple[str, str], method: str) -> dict[str, list[float]]:
    """Of each library, the ratios of all rounds."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if (row["part"], row["network"], row["batch"], row["method"]) == (part, *column, method):
            shares.setdefault(row["library"], []).append(float(row["value"]) / float(row["forward"]))
    return shares


def columns_of(rows: list[dict[str, str]], part: str) -> tuple[list[tuple[str, str]], list[str]]:
    of_part = [row for row in rows if row["part"] == part]
    columns = list(dict.fromkeys((row["network"], row["batch"]) for row in of_part))
    heads = []
    for network, batch in columns:
        base = statistics.median(
            float(row["forward"]) for row in of_part if (row["network"], row["batch"]) == (network, batch)
        )
        amount = f"{base:.2f} GiB over the input" if part == "memory" else f"{1000 * base:.0f} ms"
        heads.append(f"{network.rpartition('/')[2]}, batch {batch} ({amount})")
    return columns, heads


def in_full(rows: list[dict[str, str]]) -> str:
    """Medians and spread, of every library."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        columns, heads = columns_of(rows, part)
        lines += ["", f"| {part} | | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
        for method, library in dict.fromkeys((row["method"], row["library"]) for row in rows if row["part"] == part):
            cells = [cell(shares_of(rows, part, column, method).get(library, [])) for column in columns]
            lines.append(f"| {method} | {library} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def brief(share: float) -> str:
    return f"{share:.0f}" if share >= 100 else f"{share:.3g}" if share >= 10 else f"{share:.2f}"


def cell(shares: list[float]) -> str:
    if len(shares) < 2:
        return "".join(f"{share:.3g}" for share in shares)
    low, middle, high = min(shares), statistics.median(shares), max(shares)
    if len(shares) > 3:
        low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})" if middle > 10 else f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
