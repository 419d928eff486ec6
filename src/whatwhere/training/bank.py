"""A filter bank alone, on what it reads: computed once, kept in a file, trained in a minute.

The streams of a DFL-CNN have a loss each, so where the backbone stays as it is they learn apart: G is light mode's
last layer, and the filters, what reads them and the side branch are trained here on the grids of all pictures.
"""

import os
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.dfl import DflNet, resized
from whatwhere.errors import TrainingError
from whatwhere.training.data import Pictures, looks
from whatwhere.training.light import as_read, deciding, in_smaller_batches, keep_features, key_of
from whatwhere.training.objective import loss_of, measured, prior_of
from whatwhere.training.recipe import Recipe
from whatwhere.training.schedule import factor_at, follow, optimizer_of
from whatwhere.types import Logits

GRIDS = "grids-{}.npy"
Index = Sequence[int] | np.ndarray | slice
AT_ONCE = 64
"""Grids of validation images that are read together."""


@dataclass(frozen=True, eq=False)
class Grids:
    """What a network's filters read of n pictures, and what G says of them.

    Attributes:
        scales: for each scale (n v c y x) in half precision, of each picture and, where v is 2, of its mirror image.
        general: (n k) logits of G as it was when it looked, the mean over the scales.
    """

    scales: list[np.ndarray]
    general: Float[Tensor, "n k"]

    def at(self, scale: int, index: Index, view: Index | int = 0) -> Float[Tensor, "b c y x"]:
        """Some of one scale's."""
        return torch.from_numpy(np.asarray(self.scales[scale][index, view], np.float32))


def general_of(net: Classifier) -> Classifier:
    """The stream that sees the whole, as a classifier."""
    network = net.network
    assert isinstance(network, DflNet)
    found = copy(net)
    found.network = network.general
    return found


def grids_of(
    net: Classifier,
    pictures: Pictures,
    folder: Path,
    *,
    batch: int = 16,
    mirrored: bool = True,
    features: Path | None = None,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Grids:
    """What the filters read of all pictures: in files of n v c y x numbers of half precision, and not in memory.

    For the embedded classifier at 256 x 256 that is 80 kB a picture. A training that is taken up again looks again.

    Args:
        net: around a ``DflNet``.
        pictures: n of them.
        folder: where the files are made.
        batch: images that go through at once; where memory does not suffice, half of them.
        mirrored: whether mirror images are looked at.
        features: where what G's last layer reads is kept, for ``features_of``.
        seen: called with how many pictures of how many have been seen.

    Raises:
        OSError: there is no room for the files.
    """
    network = net.network
    assert isinstance(network, DflNet)
    folder.mkdir(parents=True, exist_ok=True)

    def look(at_once: int) -> Grids:
        part = deciding(network.general)
        files: list[np.ndarray] = []
        said, read, passed, done = [], [], list[Tensor](), 0
        with (
            undisturbed(network),
            torch.no_grad(),
            part.register_forward_hook(lambda module, args, output: passed.append(args[0].float().cpu())),
        ):
            for images in looks(pictures, net.preprocess, at_once):
                images = images.to(net.device)
                kept = slice(done, done + len(images))
                plain = []
                passed.clear()
                for number, scale in enumerate(network.scales):
                    for view, shown in enumerate((images, images.flip(-1))[: 1 + mirrored]):
                        logits, grid = network.tapped(shown if scale == 1 else resized(shown, scale))
                        if len(files) == number:
                            shape = (len(pictures), 1 + mirrored, *grid.shape[1:])
                            files.append(room_for(folder / GRIDS.format(number), shape))
                        files[number][kept, view] = grid.float().clamp(-65504, 65504).cpu().numpy()
                        plain += [logits.float().cpu()] if view == 0 else []
                said.append(torch.stack(plain).mean(0))
                read.append(torch.stack(passed[: 1 + mirrored], 1))  # of the first scale
                done += len(images)
                seen(done, len(pictures))
        if features is not None:
            keep_features(as_read(part, torch.cat(read)), features, key_of(general_of(net), pictures, mirrored))
        return Grids(files, torch.cat(said))

    return in_smaller_batches(look, batch)


def room_for(place: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Room on the disk, all of it at once: a page that is not there when it is written would end the process."""
    grids = np.lib.format.open_memmap(place, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):
        with place.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, place.stat().st_size)
    return grids


def fit_bank(
    net: Classifier,
    grids: Grids,
    targets: Float[Tensor, "n k"],
    recipe: Recipe,
    validation: tuple[Grids, Float[Tensor, "m k"]] | None = None,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Train the filters, and what reads them, on grids, in place, by the losses of P and of the side branch.

    At the recipe's rates, for its epochs; of its epochs the best on validation pictures is kept, or the last. What is
    shown are the pictures and their mirror images: nothing is cropped, mixed or drawn more often.

    Args:
        net: around a ``DflNet`` whose filters have something to begin with.
        grids: of n pictures, and their mirror images.
        targets: 1 for each class that a picture shows.
        recipe: says epochs, batch, optimizer, rates, the average and the seed.
        validation: grids of other pictures with what G says of them, and their targets.
        seen: called with how many epochs of how many are done.

    Returns:
        Rows of metrics, one an epoch: what validation says of all streams together.

    Raises:
        TrainingError: the loss is no number.
    """
    network, rows = net.network, list[dict[str, Any]]()
    assert isinstance(network, DflNet)
    bank = Bank(network).to(net.device)
    if not any(bank.weights):  # it has no say, and no loss
        return rows
    average = deepcopy(bank) if recipe.ema else bank
    prior = (prior_of(targets, net.activation) * recipe.adjustment).to(net.device)
    batches = -(-len(targets) // recipe.batch)
    total, rate = recipe.epochs * batches, recipe.lr * recipe.filter_lr
    optimizer = optimizer_of(
        [
            {"params": [p for p in bank.parameters() if p.ndim > 1]},
            {"params": [p for p in bank.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        recipe,
    )
    done, best = 0, -1.0
    for epoch in range(recipe.epochs):
        draw = np.random.default_rng([recipe.seed, epoch])
        for chosen in np.array_split(draw.permutation(len(targets)), batches):
            views = draw.integers(grids.scales[0].shape[1], size=len(chosen))
            several = [grids.at(scale, chosen, views).to(net.device) for scale in range(len(network.scales))]
            for group in optimizer.param_groups:
                group["lr"] = rate * factor_at(done, min(total - 1, round(recipe.warmup * batches)), total)
            with torch.enable_grad():
                loss = bank.loss(several, targets[chosen].to(net.device), prior, net.activation, recipe.smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            if not loss.isfinite():
                raise TrainingError(f"the filters' loss is {loss.item()} in epoch {epoch}; a smaller lr may help")
            optimizer.step()
            done += 1
            if recipe.ema:
                follow(average, bank, done, recipe.ema)
        row: dict[str, Any] = {"phase": "bank", "epoch": epoch}
        if validation is not None:
            held, wanted = validation
            row["validation"] = measured(average.said(held, network.weights[0]), wanted, net.activation)
        rows.append(row)
        if row.get("validation", epoch) > best:
            best = row.get("validation", epoch)
            network.bank.load_state_dict(average.filters.state_dict())
            network.patches.load_state_dict(average.patches.state_dict())
        seen(epoch + 1, recipe.epochs)
    return rows


class Bank(nn.Module):
    """The filters of a network and what reads them, apart from it: grids go in."""

    def __init__(self, network: DflNet) -> None:
        """Copies of them.

        Args:
            network: with the filters.
        """
        super().__init__()
        self.filters, self.patches = deepcopy(network.bank), deepcopy(network.patches)
        self.weights = [weight / len(network.scales) for weight in network.weights[1:]]
        self.each = network.filters

    def forward(self, grids: Float[Tensor, "b c y x"]) -> list[tuple[float, Logits]]:
        """Of P and of the side branch, where they have a weight, that and their logits."""
        strongest = self.filters(grids).flatten(2).amax(2)
        every = self.patches(strongest), strongest.unflatten(1, (-1, self.each)).mean(2)
        return [(weight, logits) for weight, logits in zip(self.weights, every, strict=True) if weight]

    def loss(
        self,
        grids: Sequence[Float[Tensor, "b c _ _"]],
        targets: Float[Tensor, "b k"],
        prior: Float[Tensor, "k"],
        activation: str,
        smoothing: float,
    ) -> Float[Tensor, ""]:
        """Of both streams at all scales, as of a ``DflNet`` but for G's."""
        every = [one for several in grids for one in self(several)]
        losses = [weight * loss_of(logits + prior, targets, activation, smoothing) for weight, logits in every]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def said(self, grids: Grids, weight: float) -> Float[Tensor, "n k"]:
        """Logits of all streams together, G's by this weight."""
        found, device = weight * grids.general, self.patches.weight.device
        for start in range(0, len(found), AT_ONCE):
            kept = slice(start, start + AT_ONCE)
            for scale in range(len(grids.scales)):
                for share, logits in self(grids.at(scale, kept).to(device)):
                    found[kept] += share * logits.cpu()
        return found
