"""All of a network trained on what it is shown: the step and the rates. Lightning carries the loop."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import v2

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import Classifier, logits_of
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.heads import Headed
from whatwhere.errors import InputError, TrainingError, settings_blamed
from whatwhere.training.aids import AIDS
from whatwhere.training.data import seed_of
from whatwhere.training.light import deciding
from whatwhere.training.objective import dense_loss, loss_of
from whatwhere.training.recipe import Recipe
from whatwhere.training.schedule import factor_at, follow, optimizer_of

BLOCKS = 12
"""Parts of a backbone, of about as many layers each, from one to the next of which the rate changes."""


class Fitting(pl.LightningModule):
    """A network while it is trained, its average, and what helps it.

    Attributes:
        network: that learns.
        moving: the moving average of its weights, if there is one.
        aids: that the recipe names.
    """

    def __init__(self, net: Classifier, recipe: Recipe, prior: Tensor) -> None:
        super().__init__()
        self.network, self.recipe, self.activation = net.network, recipe, net.activation
        if (recipe.loss == "dense" or recipe.aids) and not isinstance(self.headed, Headed):
            raise InputError("dense loss and aids need a head of ours, head = {pool = 'mean'} say")
        self.moving = deepcopy(self.network).requires_grad_(False).eval() if recipe.ema else None
        self.prior: Tensor
        # drawn equally often, classes have no frequency left to make up for
        self.register_buffer("prior", prior * (0.0 if recipe.balanced else recipe.adjustment), persistent=False)
        self.aids = nn.ModuleList()
        image = probe(len(net.preprocess.mean), net.preprocess.size, next(self.network.parameters()))
        for name in recipe.aids:
            with settings_blamed(f"aid_options.{name}"):
                aid = AIDS[name](**recipe.aid_options.get(name, {}))
                self.aids.append(aid)
                aid.prepare(self.headed, image)  # type: ignore[arg-type]
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def headed(self) -> nn.Module:
        """What aids know: the network, or beside a filter bank the stream that sees the whole."""
        return self.network.general if isinstance(self.network, DflNet) else self.network

    @property
    def average(self) -> nn.Module:
        """What is validated and saved: the moving average, or the network itself."""
        return self.network if self.moving is None else self.moving

    def on_train_epoch_start(self) -> None:
        """Modes are those of the epoch, whichever process it begins in."""
        epoch, recipe = self.current_epoch, self.recipe
        self.train()
        if self.moving is not None:
            self.moving.eval()
        if epoch < (recipe.frozen_norm or 0.0) * recipe.epochs:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        share = 1.0 if epoch < recipe.head_epochs else recipe.frozen or 0.0
        for depth, part in enumerate(parts_of(self.network)):
            for parameter in part:
                parameter.requires_grad_(depth >= round(share * BLOCKS))

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits (b k), rare classes made up for."""
        return loss_of(logits + self.prior, targets, self.activation, self.recipe.smoothing)

    def training_step(self, batch: Sequence[Tensor], number: int) -> Tensor:
        """The loss of a batch of images and targets."""
        images, targets = batch
        # what is drawn depends on the step alone, whichever process it is done in
        torch.manual_seed(seed_of(self.recipe.seed, self.current_epoch, number, 1 + self.global_rank))
        images = images.to(memory_format=torch.channels_last)
        if self.recipe.mixup:
            images, targets = v2.MixUp(alpha=self.recipe.mixup, num_classes=targets.shape[1])(images, targets)
        for aid in self.aids:
            images, targets = aid.mixed(images, targets)  # type: ignore[operator]
        loss = self.loss(images, targets)
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.global_step} of epoch {self.current_epoch}; a smaller lr, "
                "or precision 32-true, may help, in another run"
            )
        return loss

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """An aid's, or that of the cells, or the streams' sum, or that of the image."""
        for aid in self.aids:
            loss: Tensor | None = aid.loss(self.headed, images, targets, self.criterion)  # type: ignore[operator]
            if loss is not None:
                return loss
        if self.recipe.loss == "dense":
            maps = self.network.maps(images)  # type: ignore[operator]
            return dense_loss(maps + self.prior[:, None, None], targets, self.activation, self.recipe.smoothing)
        if isinstance(self.network, DflNet):
            streams = [weight * self.criterion(logits, targets) for weight, logits in self.network.streams(images)]
            return torch.stack(streams).sum()
        return self.criterion(logits_of(self.network(images)), targets)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """And the average follows."""
        super().optimizer_step(*args, **kwargs)
        if self.moving is None:
            return
        follow(self.average, self.network, self.global_step, self.recipe.ema)

    def validation_step(self, batch: Sequence[Tensor], number: int) -> None:
        """What the average says."""
        images, targets = batch
        self.seen.append((logits_of(self.average(images)).float().cpu(), targets.cpu()))

    def configure_optimizers(self) -> Any:
        """Rates by depth, a rise and a cosine."""
        groups = rates(self.network, self.recipe)
        groups.append({"params": list(self.aids.parameters()), "lr": self.recipe.lr})
        groups = [group for group in groups if group["params"]]
        optimizer = optimizer_of(groups, self.recipe)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rise = min(total - 1, round(self.recipe.warmup * total / self.recipe.epochs))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor_at(step, rise, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def head_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Of what stands behind the backbone, or of the last linear layer."""
    if isinstance(network, DflNet):
        return head_parameters(network.general)
    if isinstance(network, Headed):
        return [*network.neck.parameters(), *network.head.parameters()]
    return list(deciding(network).parameters())


def bank_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Of a filter bank and what reads it."""
    return [*network.bank.parameters(), *network.patches.parameters()] if isinstance(network, DflNet) else []


def parts_of(network: nn.Module) -> list[list[nn.Parameter]]:
    """The backbone's parameters in ``BLOCKS`` parts of about as many layers, from the input on."""
    head = {id(parameter) for parameter in [*head_parameters(network), *bank_parameters(network)]}
    layers = [[p for p in module.parameters(recurse=False) if id(p) not in head] for module in network.modules()]
    layers = [parameters for parameters in layers if parameters]
    edges = np.linspace(0, len(layers), BLOCKS + 1).round().astype(int).tolist()
    return [[p for layer in layers[start:end] for p in layer] for start, end in pairwise(edges)]


def rates(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of parameters: rates fall from the head towards the input, and vectors do not decay."""
    parts = [
        (recipe.backbone_lr * recipe.layer_decay ** (BLOCKS - 1 - depth), part)
        for depth, part in enumerate(parts_of(network))
    ]
    groups = []
    heads = [(1.0, head_parameters(network)), (recipe.filter_lr, bank_parameters(network))]
    for share, parameters in [*heads, *parts]:
        for vectors in (False, True):
            own = [p for p in parameters if (p.ndim <= 1) is vectors]
            groups.append({"params": own, "lr": recipe.lr * share} | ({"weight_decay": 0.0} if vectors else {}))
    return groups
