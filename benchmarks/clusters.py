"""How many groups Cluster-CAM needs to do as well as Score-CAM: insertion and deletion on real pictures.

    python benchmarks/clusters.py FOLDER [--pictures 100] [--to benchmarks/clusters.csv]

On the embedded network, for its top class. Insertion puts pixels in 1 % steps, the hottest first, into the blurred
image, deletion sets them to the mean colour, and each is the area under the probability of the class (Petsiuk et al.,
BMVC 2018). Rows are added to the file picture by picture; what is there already is not done again. The table is made
of the file: means, their standard errors, and the correlation with Score-CAM's map.
"""

import argparse
import csv
import random
from functools import partial
from pathlib import Path

import torch
from timing import machine
from torchvision.transforms.functional import gaussian_blur

import whatwhere
from whatwhere.classifiers.classifier import Trace
from whatwhere.images import image_files
from whatwhere.maps import METHODS
from whatwhere.maps.clustercam import clusters
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class
from whatwhere.types import Score

FIELDS = ["picture", "method", "insertion", "deletion", "correlation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    paths = image_files(options.folder)
    paths = sorted(random.Random(0).sample(paths, min(options.pictures, len(paths))))
    net = whatwhere.load().compiled("openvino")
    known = {(row["picture"], row["method"]) for row in rows_in(options.to)}
    for path in paths:
        missing = {name: method for name, method in methods().items() if (path.stem, name) not in known}
        if missing:
            measured = study(net, net.preprocess(whatwhere.open_photo(path))[0][None], missing)
            with options.to.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows({"picture": path.stem} | row for row in measured)
    print(table(rows_in(options.to)))


def methods() -> dict:
    found = {"scorecam": METHODS["scorecam"], "cam": METHODS["cam"], "best less worst of k=10": best_less_worst}
    for k in (10, 16, 32, 64):
        found[f"clustercam k={k}"] = partial(METHODS["clustercam"], k=k)
    for k in (10, 32):
        found[f"clustercam k={k}, no polynomial"] = partial(METHODS["clustercam"], k=k, degree=None)
    return found


def best_less_worst(trace: Trace, score: Score) -> torch.Tensor:
    """The paper's merging, as far as is known: its cognition-base without its cognition-scissors."""
    return torch.stack([one.maps[0] - one.maps[-1] for one in clusters(trace, score, k=10)])


def study(net: whatwhere.Classifier, image: torch.Tensor, missing: dict) -> list[dict[str, object]]:
    trace = net.trace(image)
    target = int(trace.logits.argmax())
    size = (image.shape[2], image.shape[3])
    asked = {"scorecam": METHODS["scorecam"], **missing}
    maps = {name: method(trace, of_class(target)) for name, method in asked.items()}
    heats = {name: upsample(unit(positive(one)), size)[0] for name, one in maps.items()}
    blurred = gaussian_blur(image, [11, 11], [5.0, 5.0])
    found: list[dict[str, object]] = []
    for name in missing:
        heat = heats[name]
        both = torch.corrcoef(torch.stack([heat.flatten(), heats["scorecam"].flatten()]))[0, 1]
        inserted, deleted = area(net, heat, blurred, image, target), area(net, heat, image, image * 0, target)
        numbers = {"insertion": inserted, "deletion": deleted, "correlation": float(both)}
        found.append({"method": name} | {key: round(value, 4) for key, value in numbers.items()})
    return found


def area(
    net: whatwhere.Classifier, heat: torch.Tensor, before: torch.Tensor, after: torch.Tensor, target: int
) -> float:
    """Under the class's probability while the hottest pixels become those of ``after``, in 100 steps."""
    rank = torch.empty(heat.numel())
    rank[heat.flatten().argsort(descending=True, stable=True)] = torch.arange(heat.numel()).float()
    rank = rank.reshape(heat.shape) / heat.numel()
    shares = torch.arange(101) / 100
    versions = [torch.where(rank < part[:, None, None, None], after, before) for part in shares.split(16)]
    curve = torch.cat([net.logits(part).softmax(1)[:, target] for part in versions])
    return float(torch.trapezoid(curve, shares))


def rows_in(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open(newline=""))) if file.exists() else []


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        f"{len({row['picture'] for row in rows})} pictures, {machine()}",
        "",
        "| | insertion | deletion | correlation with Score-CAM (least) |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        values = torch.tensor([[float(row[key]) for key in FIELDS[2:]] for row in rows if row["method"] == name])
        error = values.std(0) / len(values) ** 0.5
        cells = [f"{values[:, i].mean():.4f} ± {error[i]:.4f}" for i in (0, 1)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {values[:, 2].mean():.3f} ({values[:, 2].min():.2f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
