"""A filter bank alone, on what it reads: computed once, kept in a file, trained in a minute.

The streams of a DFL-CNN have a loss each, so where the backbone stays as it is they learn apart: G is light mode's
last layer, and the filters, what reads them and the side branch are trained here on the grids of all pictures.
"""

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
from whatwhere.training.data import Pictures, looks
from whatwhere.training.light import as_read, deciding, in_smaller_batches, keep_features, key_of
from whatwhere.training.objective import loss_of, measured, prior_of
from whatwhere.training.recipe import Recipe
from whatwhere.training.schedule import factor_at, follow

GRIDS = "grids-{}.npy"
Index = int | Sequence[int] | np.ndarray | slice
AT_ONCE = 64
"""Grids of validation images that are read together."""


@dataclass(frozen=True, eq=False)
class Grids:
    """What a network's filters read of n pictures, and what G says of them.

    Attributes:
        scales: for each scale (n v c y x) in half precision, of each picture and, where v is 2, of its mirror image.
        general: (n k) logits of G, the mean over the scales.
    """

    scales: list[np.ndarray]
    general: Float[Tensor, "n k"]

    def at(self, scale: int, index: Index, view: Index = 0) -> Float[Tensor, "b c y x"]:
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

    Args:
        net: around a ``DflNet``.
        pictures: n of them.
        folder: where the files are made.
        batch: images that go through at once; where memory does not suffice, half of them.
        mirrored: whether mirror images are looked at.
        features: where what G's last layer reads is kept, for ``features_of``.
        seen: called with how many pictures of how many have been seen.
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
                            file = folder / GRIDS.format(number)
                            files.append(np.lib.format.open_memmap(file, "w+", np.float16, shape))
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


def fit_bank(
    net: Classifier,
    grids: Grids,
    targets: Float[Tensor, "n k"],
    recipe: Recipe,
    validation: tuple[Grids, Float[Tensor, "m k"]] | None = None,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Train the filters, and what reads them, on grids, in place, by the losses of P and of the side branch.

    AdamW at the recipe's rates, for its epochs; the same recipe and grids give the same filters.

    Args:
        net: around a ``DflNet`` whose filters have something to begin with.
        grids: of n pictures, and their mirror images.
        targets: 1 for each class that a picture shows.
        recipe: says epochs, batch, rates, the average and the seed.
        validation: grids of other pictures with what G says of them, and their targets.
        seen: called with how many epochs of how many are done.

    Returns:
        Rows of metrics, one an epoch: what validation says of all streams together.
    """
    network = net.network
    assert isinstance(network, DflNet)
    bank = _Bank(network).to(net.device)
    average = deepcopy(bank)
    prior = (prior_of(targets, net.activation) * recipe.adjustment).to(net.device)
    rate, rows = recipe.lr * recipe.filter_lr, list[dict[str, Any]]()
    if not any(bank.weights):  # it has no say, and no loss
        return rows
    weights = [p for p in bank.parameters() if p.ndim > 1]
    vectors = [p for p in bank.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=recipe.weight_decay)
    batches = -(-len(targets) // recipe.batch)
    total, done = recipe.epochs * batches, 0
    for epoch in range(recipe.epochs):
        draw = np.random.default_rng([recipe.seed, epoch])
        for chosen in np.array_split(draw.permutation(len(targets)), batches):
            views = draw.integers(grids.scales[0].shape[1], size=len(chosen))
            wanted = targets[chosen].to(net.device)
            for group in optimizer.param_groups:
                group["lr"] = rate * factor_at(done, round(recipe.warmup * batches), total)
            losses = []
            for scale in range(len(network.scales)):
                for weight, logits in bank(grids.at(scale, chosen, views).to(net.device)):
                    losses.append(weight * loss_of(logits + prior, wanted, net.activation, recipe.smoothing))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if recipe.ema:
                follow(average, bank, done, recipe.ema)
        row: dict[str, Any] = {"phase": "bank", "epoch": epoch}
        if validation is not None:
            said = _said(average if recipe.ema else bank, validation[0], network)
            row["validation"] = measured(said, validation[1], net.activation)
        rows.append(row)
        seen(epoch + 1, recipe.epochs)
    found = average if recipe.ema else bank
    network.bank.load_state_dict(found.filters.state_dict())
    network.patches.load_state_dict(found.patches.state_dict())
    return rows


class _Bank(nn.Module):
    """Copies of the filters and of what reads them, that grids go through."""

    def __init__(self, network: DflNet) -> None:
        super().__init__()
        self.filters, self.patches = deepcopy(network.bank), deepcopy(network.patches)
        self.weights = [weight / len(network.scales) for weight in network.weights[1:]]
        self.each = network.filters

    def forward(self, grids: Float[Tensor, "b c y x"]) -> list[tuple[float, Tensor]]:
        strongest = self.filters(grids).flatten(2).amax(2)
        every = self.patches(strongest), strongest.unflatten(1, (-1, self.each)).mean(2)
        return [(weight, logits) for weight, logits in zip(self.weights, every, strict=True) if weight]


def _said(bank: nn.Module, grids: Grids, network: DflNet) -> Float[Tensor, "n k"]:
    """Logits of all streams together."""
    found = network.weights[0] * grids.general
    with torch.no_grad():
        for start in range(0, len(found), AT_ONCE):
            kept = slice(start, start + AT_ONCE)
            for scale in range(len(network.scales)):
                for weight, logits in bank(grids.at(scale, kept).to(network.bank.weight.device)):
                    found[kept] += weight * logits.cpu()
    return found
