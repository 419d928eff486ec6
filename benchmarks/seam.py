"""What a map costs, as a ratio to a plain forward of the same batch.

    python benchmarks/seam.py [--malloc default]

Median and quartiles. Every method with the upsampling to the input's size, except CAM of all 1000 classes, on the
grid. Methods that look at the images once; the others are in benchmarks/methods.py.
"""

import argparse
import statistics
from pathlib import Path

import torch
from timing import in_turn, machine, ratios

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.maps import METHODS
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import top_class

ONE_LOOK = [
    "gradcam",
    "gradcampp",
    "xgradcam",
    "hirescam",
    "layercam",
    "gradcam_elementwise",
    "shapleycam",
    "eigencam",
    "eigengradcam",
    "kpcacam",
    "fem",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--malloc", choices=["kept", "default"], default="kept", help="freed memory stays, or not")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    if options.malloc == "kept":
        keep_freed_memory()
    torch.set_num_threads(2)
    photos_of = sorted(Path(whatwhere.__path__[0], "photos").glob("*.jpg"))
    table: dict[str, dict[str, str]] = {}
    for name in ("efficientnet-lite0", "timm/resnet50"):
        net = whatwhere.load(name, pretrained=name == "efficientnet-lite0")
        photos = [net.preprocess(whatwhere.open_photo(path))[0] for path in photos_of]
        for batch in (1, 16):
            images = torch.stack([photos[i % len(photos)] for i in range(batch)])
            seconds = in_turn(runs(net, images), options.rounds if batch == 1 else options.rounds // 4)
            milliseconds = 1000 * statistics.median(seconds["forward"])
            column = f"{name.rpartition('/')[2]}, batch {batch} ({milliseconds:.0f} ms)"
            for key, (middle, low, high) in ratios(seconds, "forward").items():
                table.setdefault(key, {})[column] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    columns = list(table.pop("forward"))
    print(f"{machine()}, malloc {options.malloc}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key, row in table.items():
        print(f"| {key} | {' | '.join(row[column] for column in columns)} |")


def forward(net: whatwhere.Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.network(images)


def runs(net: whatwhere.Classifier, images: torch.Tensor) -> dict:
    size = (images.shape[-2], images.shape[-1])

    def all_cams() -> torch.Tensor:
        return net.class_maps(net.trace(images))

    def of(method):
        return lambda: upsample(unit(positive(method(net.trace(images), top_class))), size)

    gradients = {name: of(METHODS[name]) for name in ONE_LOOK}
    return {"forward": lambda: forward(net, images), "cam of 1000": all_cams, **gradients}


if __name__ == "__main__":
    main()
