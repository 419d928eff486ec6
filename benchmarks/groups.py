"""What `whatwhere groups` finds of what was planted: wrong labels, copies, and two kinds under one name.

    python benchmarks/groups.py [--data ../shared/data]

With the embedded network, which knows none of these classes but the daisy. Settings were chosen on pets3, pets37 and
cub60; on flowers17 all of it is looked at once, here. Writes ``benchmarks/groups.md``.

labels    5 and 10 % of flowers17's training labels are changed to another class, drawn evenly
copies    of 60 pictures of flowers17, changed in several ways, beside all of it
kinds     classes of flowers17 two by two, and one by one, under one name
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import machine

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.classifiers.classifier import Classifier
from whatwhere.curation.doubts import doubted
from whatwhere.curation.duplicates import duplicates, originals
from whatwhere.curation.kinds import grouped
from whatwhere.curation.pooled import Pooled, pooled
from whatwhere.datasets import Dataset, Sample, open_splits

HERE = Path(__file__).parent
SEEDS, SHARES, FIRST = (0, 1, 2), (0.05, 0.1), (0.05, 0.1, 0.2)
PLANTED = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    net = whatwhere.load()
    train = open_splits(options.data / "flowers17", ["train"])
    # labels are not looked at in what descriptors of whole pictures are made of, so they are made once
    seen = pooled(net, train)
    text = [
        "# What `whatwhere groups` finds",
        "",
        "`python benchmarks/groups.py` says how; flowers17, the embedded network, looked at once.",
        f"{machine()}",
        "",
        *labels(seen),
        *copies(net, train, seen),
        *kinds(seen),
    ]
    (HERE / "groups.md").write_text("\n".join(text))
    print("\n".join(text))


def labels(seen: Pooled) -> list[str]:
    """How many of the labels that were changed are among the first of the list."""
    head = " | ".join(f"in the first {share:.0%}" for share in FIRST)
    text = [
        "## Wrong labels",
        "",
        f"Of {len(seen.labels)} labels a share was changed: how many of these are among the most doubted, in per",
        "cent; of the labels than which another class is likelier, how many are changed ones (precision); and of how",
        "many changed ones the right class is the likeliest. Of 10 % the first 5 % can hold no more than half.",
        "",
        f"| changed | seed | {head} | precision | right class |",
        "|---" * (len(FIRST) + 4) + "|",
    ]
    copies_of = originals(len(seen.samples), duplicates(seen.whole, seen.small, seen.digests))
    for share in SHARES:
        rows = []
        for seed in SEEDS:
            told, bad = changed(seen.labels, len(seen.classes), share, seed)
            found = doubted(seen.whole, told, copies_of, seed=seed)
            ranked = found.ranked()
            suspects = found.likelier != told
            row = [bad[ranked[: round(first * len(bad))]].sum() / bad.sum() for first in FIRST]
            row += [bad[suspects].mean(), (found.likelier == seen.labels)[bad].mean()]
            rows.append(row)
            text.append(f"| {share:.0%} | {seed} | {' | '.join(f'{100 * one:.1f}' for one in row)} |")
        means = " | ".join(f"{100 * statistics.mean(column):.1f}" for column in zip(*rows, strict=True))
        text.append(f"| {share:.0%} | mean | {means} |")
    return [*text, ""]


def changed(labels: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share is wrong, and which those are."""
    draw, told = np.random.default_rng(seed), labels.copy()
    bad = np.zeros(len(labels), dtype=bool)
    bad[draw.choice(len(labels), round(share * len(labels)), replace=False)] = True
    told[bad] = (labels[bad] + draw.integers(1, classes, bad.sum())) % classes
    return told, bad


def compressed(image: Image.Image, quality: int = 50) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image, share: float = 0.05) -> Image.Image:
    x, y = round(share * image.width), round(share * image.height)
    return image.crop((x, 0, image.width, image.height - y))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "JPEG of quality 50": compressed,
    "half the size": half,
    "mirrored": mirrored,
    "5 % cut off two sides": cropped,
    "10 % cut off two sides": lambda image: cropped(image, 0.1),
    "half, mirrored, 5 % cut off, quality 50": lambda image: compressed(cropped(mirrored(half(image)))),
}


def copies(net: Classifier, train: Dataset, seen: Pooled) -> list[str]:
    """How many copies are found, and what else is."""
    text = ["## Copies", "", f"| copy | found, of {PLANTED} | other pairs |", "|---|---|---|"]
    every = set[tuple[str, str]]()
    drawn = train.sampled(PLANTED)
    for name, change in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            planted = []
            for number, sample in enumerate(drawn):
                path = Path(folder, f"{number}.png")
                change(Image.fromarray(sample.photo().pixels)).save(path)
                planted.append(Sample(f"copies/{number}.png", path, sample.labels))
            more = pooled(net, replace(train, samples=planted))
        names = [sample.name for sample in (*seen.samples, *more.samples)]
        wanted = {(sample.name, f"copies/{number}.png") for number, sample in enumerate(drawn)}
        both = [np.concatenate([seen.whole, more.whole]), np.concatenate([seen.small, more.small])]
        found = duplicates(*both, (*seen.digests, *more.digests))
        pairs = {(names[pair.first], names[pair.second]) for pair in found}
        others = {pair for pair in pairs - wanted if not pair[1].startswith("copies/")}
        every |= others
        text.append(f"| {name} | {len(pairs & wanted)} | {len(others)} |")
    said = "; ".join(" = ".join(name.removeprefix("train/") for name in pair) for pair in sorted(every))
    return [*text, "", f"Other pairs, all of them the same picture to the eye: {said}.", ""]


def kinds(seen: Pooled) -> list[str]:
    """Into how many groups one class and two classes fall, and whether these are the classes."""
    from sklearn.metrics import adjusted_rand_score

    one, two, agreement = [], [], []
    for first in range(len(seen.classes)):
        one.append(grouped(seen.where[seen.labels == first]).group.max() + 1)
        for second in range(first):
            both = np.isin(seen.labels, (first, second))
            found = grouped(seen.where[both]).group
            two.append(found.max() + 1)
            agreement.append(adjusted_rand_score(seen.labels[both], found))
    several = sorted(set(one) | set(two))
    return [
        "## Two kinds under one name",
        "",
        f"| groups | {' | '.join(map(str, several))} |",
        "|---" * (len(several) + 1) + "|",
        f"| one class, of {len(one)} | {' | '.join(str(one.count(count)) for count in several)} |",
        f"| two classes, of {len(two)} | {' | '.join(str(two.count(count)) for count in several)} |",
        "",
        f"Adjusted Rand index of two classes: mean {statistics.mean(agreement):.2f}, "
        f"median {statistics.median(agreement):.2f}.",
        "",
    ]


if __name__ == "__main__":
    main()
