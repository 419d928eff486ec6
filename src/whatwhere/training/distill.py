"""A sharp and dear where, learned by a small head: afterwards one look gives class, map, box and mask.

pictures -> maps of their classes, refined by their edges -> targets on a grid; grids of several layers -> head
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from whatwhere.classifiers.backbones import probe, stages_of
from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.distilled import DistilledHead
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import DataError, InputError, TrainingError, UnsupportedError
from whatwhere.explanation import Explanation, explain_inputs
from whatwhere.geometry import Frame
from whatwhere.images import Photo
from whatwhere.maps.distilled import told
from whatwhere.maps.shape import unit
from whatwhere.presets import find_preset
from whatwhere.scores import of_class
from whatwhere.training.bank import room_for
from whatwhere.training.schedule import factor_at
from whatwhere.types import Heat, Logits

STAGES = 3
"""The head reads the last block of so many stages."""
DECAY, WARMUP = 0.01, 50
SHARES = np.arange(1, 100) / 100
"""Thresholds that are tried."""


class Distilled(NamedTuple):
    """What came of it."""

    pictures: int
    """That were learned from."""
    agreement: float
    """Mean IoU of the head's masks and those that it was taught, on the same pictures and the grid."""
    failed: dict[str, str]
    """Pictures that could not be used, and why."""


class Lessons(NamedTuple):
    """What the head is shown of n pictures, and what it should say."""

    grids: list[np.ndarray]
    """Of each layer (n c y x), in half precision, on the disk."""
    told: Float[Tensor, "n y x"]
    """Maps of the class, from 0 to 1."""
    wanted: Float[Tensor, "n y x"]
    """The teacher's heat on the finest grid, from 0 to 1."""
    masks: Float[Tensor, "n y x"]
    """The teacher's masks there: shares of cells."""


def distill(
    net: Classifier,
    dataset: Dataset,
    *,
    preset: str = "best",
    epochs: int = 40,
    rate: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    folder: Path | None = None,
    seen: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Distilled:
    """Train a head that says for one look where a class is, from what a preset says of unboxed pictures, in place.

    The preset's heat of the picture's class (the most probable one of those that it shows, or of all where none is
    known) is what the head should give; its loss is the cross-entropy of both and half of their Dice loss (Milletari
    et al., V-Net, 2016). The backbone stays as it is. The classifier's threshold for the method "distilled" becomes
    the one at which its masks agree best with the preset's.

    Args:
        net: the classifier, whose network is not changed.
        dataset: pictures; boxes are not looked at.
        preset: the teacher.
        epochs: how often the head sees all pictures.
        rate: of learning, at its highest.
        batch: pictures of a step.
        seed: of what is drawn.
        folder: where what the network finds is kept meanwhile, some 200 kB a picture for the embedded one; by default
            the system's own.
        seen: called with what is done, how much of it, and of how much.

    Raises:
        InputError: no such preset; no epochs or pictures in a batch.
        DataError: no picture from which there is something to learn.
        UnsupportedError: the network has no grids of two sizes.
        TrainingError: the loss is no number.
        OSError: there is no room in the folder.
    """
    find_preset(preset)
    if epochs < 1 or batch < 1:
        raise InputError(f"wanted at least 1 epoch and 1 picture in a batch, got {epochs} and {batch}")
    head = _fresh(net, seed)
    before, net.distilled = net.distilled, head  # so that the network's looks keep what it reads
    try:
        with _scratch(folder) as place:
            lessons, failed = _taught(net, dataset, preset, place, seen)
            _fit(head, lessons, epochs, rate, batch, seed, seen)
            share, agreement = _threshold(head, lessons, batch)
    except BaseException:
        net.distilled = before
        raise
    net.thresholds["distilled"] = share
    net.trusts.pop("distilled", None)
    return Distilled(len(lessons.wanted), agreement, failed)


def _fresh(net: Classifier, seed: int) -> DistilledHead:
    image = probe(len(net.preprocess.mean), net.preprocess.size).to(net.device)
    try:
        layers = stages_of(net.network, image)[-STAGES:]
    except UnsupportedError:
        raise UnsupportedError(
            f"{net.name} has no blocks that give grids of two sizes, which a head learns from"
        ) from None
    head = DistilledHead(layers, [1] * len(layers))
    before, net.distilled = net.distilled, head
    try:
        grids = net.trace(image).beside
    finally:
        net.distilled = before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DistilledHead(layers, [grid.shape[1] for grid in grids]).to(net.device).eval()


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".whatwhere-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _taught(
    net: Classifier, dataset: Dataset, preset: str, place: Path, seen: Callable[[str, int, int], None]
) -> tuple[Lessons, dict[str, str]]:
    """What the teacher says of all pictures; those that it finds nothing in are left out."""
    try:
        known = dataset.indices_in(net.labels)
    except InputError:  # other classes than the classifier's: it says itself what they are
        known = {}
    files: list[np.ndarray] = []
    maps, wanted, masks, failed = list[Tensor](), list[np.ndarray](), list[np.ndarray](), dict[str, str]()
    for number, sample in enumerate(dataset):
        try:
            photo = sample.photo()
            shown = [known[label] for label in sample.labels if label in known]
            one, grids, told_of = _asked(net, photo, shown, preset)
        except DataError as error:
            failed[sample.name] = str(error)
            continue
        finally:
            seen("looking", number + 1, len(dataset))
        if not one.mask.any():
            failed[sample.name] = f"{sample.name}: nothing speaks for {one.label}"
            continue
        for layer, grid in enumerate(grids):
            if len(files) == layer:
                files.append(room_for(place / f"{layer}.npy", (len(dataset), *grid.shape)))
            files[layer][len(wanted)] = grid.clamp(-65504, 65504).numpy()
        size = (grids[0].shape[1], grids[0].shape[2])
        maps.append(told_of)
        wanted.append(to_network(one.heat, one.frame, size))
        masks.append(to_network(one.mask.astype(np.float32), one.frame, size))
    if not wanted:
        why = next(iter(failed.values()), "there are none")
        raise DataError(f"{dataset.name}: no picture to learn from; {why}")
    n = len(wanted)
    stacked = [torch.from_numpy(np.stack(several)) for several in (wanted, masks)]
    return Lessons([file[:n] for file in files], torch.stack(maps), stacked[0], stacked[1]), failed


def _asked(
    net: Classifier, photo: Photo, shown: Sequence[int], preset: str
) -> tuple[Explanation, list[Tensor], Tensor]:
    """The teacher's explanation of a picture, the grids (c y x) that the head reads of it, and the map it is told."""
    image, frame = net.preprocess(photo)

    def choose(logits: Logits) -> list[list[int]]:
        of = list(shown) or list(range(logits.shape[1]))
        return [[of[int(logits[0, of].argmax())]]]

    ((one,),) = explain_inputs(net, image[None], [frame], [photo], choose, preset)
    trace = net.trace(image[None].to(net.device))
    maps = told(trace, of_class(one.index)).detach().cpu()
    return one, [grid[0].cpu() for grid in trace.beside], maps[0]


def to_network(heat: Heat, frame: Frame, size: tuple[int, int]) -> Float[np.ndarray, "y x"]:
    """Heat of the original on a grid over the network's input; 0 where that is padding."""
    (h, w), seen, placed = frame.network, frame.seen, frame.placed
    top, left = (
        min(max(round(edge), 0), side - 1) for edge, side in zip((seen.y0, seen.x0), heat.shape, strict=True)
    )
    shown = heat[top : max(round(seen.y1), top + 1), left : max(round(seen.x1), left + 1)]
    inside = round(placed.width), round(placed.height)
    way = cv2.INTER_AREA if inside[0] * inside[1] < shown.size else cv2.INTER_LINEAR
    whole = np.zeros((h, w), np.float32)
    y, x = round(placed.y0), round(placed.x0)
    whole[y : y + inside[1], x : x + inside[0]] = cv2.resize(shown.astype(np.float32), inside, interpolation=way)
    found: np.ndarray = cv2.resize(whole, size[::-1], interpolation=cv2.INTER_AREA)
    return found


def _fit(
    head: DistilledHead,
    lessons: Lessons,
    epochs: int,
    rate: float,
    batch: int,
    seed: int,
    seen: Callable[[str, int, int], None],
) -> None:
    n, device = len(lessons.wanted), head.out.weight.device
    steps = -(-n // batch)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=DECAY)
    head.train()
    for epoch in range(epochs):
        draw = np.random.default_rng([seed, epoch])
        for step, chosen in enumerate(np.array_split(draw.permutation(n), steps)):
            done = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = rate * factor_at(done, min(WARMUP, epochs * steps - 1), epochs * steps)
            turned = bool(draw.random() < 0.5)
            grids, maps = _batch(lessons, np.sort(chosen), device)
            wanted = lessons.wanted[np.sort(chosen)].to(device)
            if turned:
                grids, maps, wanted = [grid.flip(-1) for grid in grids], maps.flip(-1), wanted.flip(-1)
            with torch.enable_grad():
                loss = _loss(head(grids, maps), wanted)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            if not loss.isfinite():
                raise TrainingError(f"the loss of the distilled head is {loss.item()}; a lower rate may help")
            optimizer.step()
        seen("learning", epoch + 1, epochs)
    head.eval()


def _batch(lessons: Lessons, chosen: np.ndarray, device: torch.device) -> tuple[list[Tensor], Tensor]:
    grids = [torch.from_numpy(np.asarray(grid[chosen], np.float32)).to(device) for grid in lessons.grids]
    return grids, lessons.told[chosen].to(device)


def _loss(logits: Float[Tensor, "b y x"], wanted: Float[Tensor, "b y x"]) -> Float[Tensor, ""]:
    said = logits.sigmoid()
    common, both = (said * wanted).sum((1, 2)), said.sum((1, 2)) + wanted.sum((1, 2))
    dice = 1 - (2 * common + 1) / (both + 1)
    return functional.binary_cross_entropy_with_logits(logits, wanted) + dice.mean() / 2


def _threshold(head: DistilledHead, lessons: Lessons, batch: int) -> tuple[float, float]:
    """The share of a map's maximum at which masks agree best with the teacher's, and how far they do."""
    overlaps, device = np.zeros(len(SHARES)), head.out.weight.device
    n = len(lessons.wanted)
    for start in range(0, n, batch):
        chosen = np.arange(start, min(start + batch, n))
        with undisturbed(head), torch.no_grad():
            maps = unit(head(*_batch(lessons, chosen, device)).sigmoid().cpu())  # as ``explain`` has them
        masks = lessons.masks[chosen] > 0.5
        for number, share in enumerate(SHARES.tolist()):
            own = maps > share
            union = (own | masks).sum((1, 2))
            overlaps[number] += float(((own & masks).sum((1, 2)) / union.clamp(min=1)).sum())
    best = int(overlaps.argmax())
    return float(SHARES[best]), float(overlaps[best] / n)
