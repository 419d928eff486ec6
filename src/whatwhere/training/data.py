"""Labelled pictures -> batches: what can be read of them, and what a network is shown of that in each epoch."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from torchvision.transforms import v2

from whatwhere.classifiers.labels import Labels
from whatwhere.datasets import open_dataset
from whatwhere.datasets.folder import SPLITS
from whatwhere.datasets.sample import Dataset, Sample
from whatwhere.errors import DataError, InputError
from whatwhere.images import Photo, Preprocess, printable
from whatwhere.training.recipe import Recipe

KEPT_BYTES = 2**30
"""Decoded pictures are kept in memory as long as they are no more than this."""
MANY = 20
"""Images that each class has where a tenth is held out by default."""
SHARE = 0.1

Item = tuple[int, int]
"""(epoch, index): an image is drawn for an epoch, so that what is seen depends on nothing else."""


@dataclass(eq=False)
class Pictures:
    """Pictures that can be read, with the classes that a training has.

    Attributes:
        classes: their names.
        samples: with labels as indices into ``classes``.
        kept: decoded, by the place of the sample, as far as memory goes.
        digests: of the files' bytes.
    """

    classes: tuple[str, ...]
    samples: list[Sample]
    kept: dict[int, Photo] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def photo(self, index: int) -> Photo:
        """A picture, decoded."""
        return self.kept.get(index) or self.samples[index].photo()

    def targets(self) -> Float[Tensor, "n k"]:
        """1 for each class that a picture shows, 0 for the others."""
        found = torch.zeros(len(self), len(self.classes))
        for index, sample in enumerate(self.samples):
            found[index, list(sample.labels)] = 1
        return found

    def part(self, indices: Sequence[int]) -> "Pictures":
        """Some of them."""
        kept = {new: self.kept[old] for new, old in enumerate(indices) if old in self.kept}
        return Pictures(self.classes, [self.samples[i] for i in indices], kept, [self.digests[i] for i in indices])


@dataclass(eq=False)
class Splits:
    """What is trained on and what it is measured on, and what was found on the way.

    Attributes:
        train: pictures to learn from.
        validation: pictures to choose the epoch by; None for none.
        test: what to measure at the end, with its boxes: the test split, or what is held out; None for none.
        labels: names of the classes that are trained.
        multiple: whether some picture shows several classes, or none.
        unreadable: name -> why, of all splits.
        notes: what else there is to say, for people.
        share: of each class that was drawn for validation; 0 where the data set has a split for it, or there is none.
    """

    train: Pictures
    validation: Pictures | None
    test: Dataset | None
    labels: Labels
    multiple: bool
    unreadable: dict[str, str]
    notes: list[str]
    share: float = 0.0

    @property
    def digest(self) -> str:
        """Of all that is learned from and that the epoch is chosen by."""
        parts = [self.train, *([] if self.validation is None else [self.validation])]
        words = [
            f"{s.name}{s.labels}{digest}"
            for part in parts
            for s, digest in zip(part.samples, part.digests, strict=True)
        ]
        return hashlib.sha256("".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def split_data(
    root: Path,
    recipe: Recipe,
    *,
    layout: str | None = None,
    strict: bool = False,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Splits:
    """Read the splits, look through all pictures, and say what is odd.

    Args:
        root: of the data set.
        recipe: says which splits.
        layout: of the data set; by default what the files look like.
        strict: what is odd is an error.
        seen: called with how many pictures of how many have been looked through.

    Raises:
        DataError: nothing to learn from: no images, or one class; with ``strict``, whatever would be a note.
        InputError: no such split.
    """
    train, validation, tested = _opened(root, recipe, layout)
    multiple = any(len(sample.labels) != 1 for sample in train)
    notes: list[str] = []
    trained = Counter(label for sample in train for label in sample.labels)
    if empty := [name for label, name in enumerate(train.classes) if label not in trained]:
        notes.append(f"{len(empty)} classes have no images in {train.name} and are left out: {_few(empty)}")
    classes = tuple(name for label, name in enumerate(train.classes) if label in trained)
    if len(classes) < 2 and not multiple:
        raise DataError(f"{train.name}: wanted at least two classes, got {len(classes)}: {', '.join(classes)}")
    odd = [name for name in classes if not name.isprintable()]
    if odd:
        raise DataError(
            f"{train.name}: wanted names of classes that any file can hold, got {printable(odd[0])}; rename it"
        )
    others = [one for one in (validation, tested) if one is not None]
    total, room = len(train) + sum(map(len, others)), [KEPT_BYTES]
    pictures, unreadable, _ = _readable(train, classes, room, lambda n: seen(n, total))
    done, known = len(train), dict(zip(pictures.digests, pictures.samples, strict=True))
    read: list[Pictures] = []
    for one in others:
        found, failed, strange = _readable(one, classes, room, lambda n, base=done: seen(base + n, total))  # type: ignore[misc]
        if strange:
            notes.append(
                f"{strange} images of {one.name} show classes that are not among those trained on, and are left out"
            )
        shown = {label for sample in found.samples for label in sample.labels}
        if missing := [name for label, name in enumerate(classes) if label not in shown]:
            notes.append(f"{one.name} has no images of {len(missing)} of the classes: {_few(missing)}")
        same = [
            printable(f"{sample.name} = {known[digest].name}")
            for sample, digest in zip(found.samples, found.digests, strict=True)
            if digest in known
        ]
        if same:
            notes.append(f"{len(same)} images of {one.name} are trained on as well: {_few(same)}")
        read.append(found)
        unreadable |= failed
        done += len(one)
    twice = len(pictures) - len(known)
    if twice:
        notes.append(f"{twice} images of {train.name} are there more than once")
    if unreadable:
        first = printable(next(iter(unreadable.values())))
        notes.append(
            f"{len(unreadable)} images cannot be read and are left out: {first}{', ...' * (len(unreadable) > 1)}"
        )
    lost = set(range(len(classes))) - {label for sample in pictures.samples for label in sample.labels}
    if lost:
        raise DataError(f"{train.name}: no image can be read of {_few([classes[label] for label in sorted(lost)])}")
    if strict and notes:
        raise DataError("; ".join(notes) + ". Without --strict these are left out, or said and gone on with")
    held, measured, share = read[0] if validation is not None else None, tested or validation, 0.0
    if held is not None and not len(held):
        raise DataError(
            f"{validation.name if validation else ''}: no image in it can be read that shows a class trained on"
        )
    if held is None:
        default = SHARE if not multiple and min(trained.values()) >= MANY else 0.0
        share = recipe.validation if isinstance(recipe.validation, float) else default
        if share:
            inside, outside = _held_out(pictures, share, recipe.seed)
            pictures, held = pictures.part(inside), pictures.part(outside)
            names = {sample.name for sample in held.samples}
            measured = measured or replace(
                train, name=f"{train.name}, held out", samples=[one for one in train if one.name in names]
            )
    words = [train.synonyms[train.classes.index(name)] for name in classes] if train.synonyms else None
    return Splits(pictures, held, measured, Labels(classes, words), multiple, unreadable, notes, share)


def _opened(root: Path, recipe: Recipe, layout: str | None) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """What is trained on, what the epoch is chosen by, and what is measured at the end."""
    train, whole_folder = _trained_on(root, recipe.split, layout)
    if whole_folder:
        return train, None, None
    whole = root.suffix.lower() == ".json"  # one file, whatever split is asked for
    wanted, tested = recipe.validation, recipe.test
    if wanted is None:
        validation = None if whole else _first(root, [name for name in SPLITS[1:4] if name != tested], layout)
    else:
        validation = open_dataset(root, wanted, layout) if isinstance(wanted, str) and wanted else None
    if tested is None:
        test = None if whole else _first(root, SPLITS[:1], layout)
    else:
        test = open_dataset(root, tested, layout) if tested and tested != wanted else None
    return train, validation, test


def training_set(root: Path, split: str | None = None, layout: str | None = None) -> Dataset:
    """What is trained on: the split of that name, or train or trainval, or all of a folder without splits.

    Raises:
        DataError: there is nothing, or something that cannot be read; names the file.
        InputError: no such split.
    """
    return _trained_on(root, split, layout)[0]


def _trained_on(root: Path, split: str | None, layout: str | None) -> tuple[Dataset, bool]:
    """And whether it is all of a folder, so that there are no other splits."""
    names = [split] if split is not None else ["train", "trainval"]
    train = _first(root, names, layout)
    if train is not None:
        return train, False
    if split is None and root.is_dir() and not any((root / name).is_dir() for name in SPLITS):
        return open_dataset(root, None, layout), True
    open_dataset(root, names[0], layout)  # says why
    raise InputError(f"{printable(root)} has no split to train on; it is said with split")


def _first(root: Path, names: Sequence[str], layout: str | None) -> Dataset | None:
    """The first of several splits that is there."""
    for name in names:
        with suppress(InputError, DataError):
            return open_dataset(root, name, layout)
    return None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


def _readable(
    dataset: Dataset, classes: tuple[str, ...], room: list[int], seen: Callable[[int], None]
) -> tuple[Pictures, dict[str, str], int]:
    """What can be read of a data set; what cannot, and why; and how many show other classes than these."""
    index = {name: label for label, name in enumerate(classes)}
    samples = [
        replace(sample, labels=tuple(sorted(index[dataset.classes[label]] for label in sample.labels)), boxes={})
        for sample in dataset
        if all(dataset.classes[label] in index for label in sample.labels)
    ]
    found, failed = Pictures(classes, []), {}

    def look(sample: Sample) -> tuple[Sample, Photo | None, str]:
        try:
            return sample, sample.photo(), hashlib.sha1(sample.path.read_bytes()).hexdigest()
        except (DataError, OSError) as error:
            return sample, None, str(error)

    with ThreadPoolExecutor() as pool:
        for number, (sample, photo, text) in enumerate(pool.map(look, samples), 1):
            if photo is None:
                failed[sample.name] = text
            else:
                if photo.pixels.nbytes <= room[0]:
                    found.kept[len(found)] = photo
                    room[0] -= photo.pixels.nbytes
                found.samples.append(sample)
                found.digests.append(text)
            seen(number)
    return found, failed, len(dataset) - len(samples)


def _held_out(pictures: Pictures, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices that stay, and those of a share of each class; at least one of each class stays."""
    draw = np.random.default_rng(seed)
    classes: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(pictures.samples):
        classes.setdefault(sample.labels[:1], []).append(index)
    out: set[int] = set()
    for members in classes.values():
        count = min(len(members) - 1, round(share * len(members)))
        out |= {members[i] for i in draw.permutation(len(members))[:count]}
    if not out:
        raise InputError(f"a share of {share} is less than one image of each class; hold out more, or 0 for none")
    return [i for i in range(len(pictures)) if i not in out], sorted(out)


class Shown(TorchDataset[tuple[Tensor, Tensor]]):
    """Pictures as the network is shown them in training. The same (epoch, index) is always the same tensor."""

    def __init__(self, pictures: Pictures, preprocess: Preprocess, recipe: Recipe) -> None:
        self.pictures, self.seed = pictures, recipe.seed
        self.targets = pictures.targets()
        self.transform = augmentation(preprocess, recipe)

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]:
        epoch, index = item
        pixels = torch.tensor(self.pictures.photo(index).pixels).permute(2, 0, 1)
        with drawing(self.seed, epoch, index):
            return self.transform(pixels), self.targets[index]


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class drawing:  # noqa: N801
    """A while in which torch draws what these numbers say, and nothing is left of it."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __enter__(self) -> None:
        self.state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed_of(*self.numbers))

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self.state)


def augmentation(preprocess: Preprocess, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """Pixels (3 H W) of uint8 -> a random view of them, as the network takes it."""
    how = v2.InterpolationMode(preprocess.interpolation)
    h, w = preprocess.size[-2:]
    crop: Any = v2.RandomResizedCrop((h, w), scale=(recipe.crop, 1.0), interpolation=how, antialias=True)
    steps = [crop if recipe.crop < 1 else v2.Resize((h, w), interpolation=how, antialias=True)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.augment != "none":
        steps.append(v2.TrivialAugmentWide() if recipe.augment == "trivial" else v2.RandAugment())
    if len(preprocess.mean) == 1:
        steps.append(v2.Grayscale())
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)]
    composed: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return composed


class Drawn(Sampler[Item]):
    """The order of an epoch: (epoch, index), of which each device takes every so-manieth."""

    def __init__(self, pictures: Pictures, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.seed, self.rank, self.world, self.epoch = recipe.seed, rank, world, 0
        self.count = len(pictures)
        self.share: np.ndarray | None = None
        if recipe.balanced:
            targets = pictures.targets().numpy()
            self.share = (targets / targets.sum(0).clip(min=1)).sum(1)
            self.share /= self.share.sum()

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.world

    def __iter__(self) -> Iterator[Item]:
        draw = np.random.default_rng([self.seed, self.epoch])
        if self.share is None:
            order = draw.permutation(self.count)
        else:
            order = draw.choice(self.count, self.count, p=self.share)
        for index in order[self.rank : len(self) * self.world : self.world]:
            yield self.epoch, int(index)


def looks(pictures: Pictures, preprocess: Preprocess, batch: int) -> Iterator[Tensor]:
    """All pictures in order, as the network sees them when it is asked: batches (b d h w)."""
    for start in range(0, len(pictures), batch):
        several = range(start, min(start + batch, len(pictures)))
        yield torch.stack([preprocess(pictures.photo(index))[0] for index in several])
