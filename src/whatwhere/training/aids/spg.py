"""Self-produced Guidance: what is surely object and surely not, in the class's own map, teaches the layers before it.

Zhang et al., Self-produced Guidance for Weakly-supervised Object Localization, ECCV 2018. The map of the class seeds
one pixel classifier on the last grid of the backbone, that one seeds another on the grid before, and the mean of both
a third. Thresholds are those of the WSOL benchmark (Choe et al. 2020).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from whatwhere.classifiers.backbones import stages_of
from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.heads import Headed
from whatwhere.maps.shape import unit
from whatwhere.training.aids.aid import Aid, Criterion, Targets
from whatwhere.types import Images

SEEDS = ((0.01, 0.7), (0.05, 0.5), (0.1, 0.7))
"""Of each step, the share of a map's range below which is background, and above which is object."""


class SelfProducedGuidance(Aid):
    """Three pixel classifiers that live as long as the training."""

    def __init__(self, width: int = 128, weight: float = 1.0) -> None:
        """How much there is of it.

        Args:
            width: channels inside each pixel classifier.
            weight: of the three losses beside the classes' one.
        """
        super().__init__()
        self.width, self.weight = width, weight
        self.pixels = nn.ModuleList()
        self._grids: dict[str, Tensor] = {}

    def prepare(self, network: Headed, image: Images) -> None:
        """Make the pixel classifiers on the last two grids, and listen there."""
        shallow, deep = stages_of(network.backbone, image)[-2:]
        for name, layer in (("shallow", shallow), ("deep", deep)):
            self.hooks.append(network.backbone.get_submodule(layer).register_forward_hook(self._kept(name)))
        with undisturbed(network), torch.no_grad():
            network.backbone(image)
        widths = [self._grids[name].shape[1] for name in ("deep", "shallow", "shallow")]
        self.pixels.extend(
            nn.Sequential(nn.Conv2d(c, self.width, 3, padding=1), nn.ReLU(), nn.Conv2d(self.width, 1, 1))
            for c in widths
        )
        self.pixels.to(image.device)

    def _kept(self, name: str) -> Any:
        def keep(module: nn.Module, given: Any, features: Tensor) -> None:
            self._grids[name] = features

        return keep

    def loss(self, network: Headed, images: Images, targets: Targets, criterion: Criterion) -> Tensor:
        """The classes' loss, and what the maps teach the grids."""
        features = network.forward_features(images)
        logits = network.forward_head(features)
        deep, shallow = self._grids["deep"], self._grids["shallow"]
        with torch.no_grad():
            maps = network.head.maps(features)
            own = maps[torch.arange(len(maps), device=maps.device), targets.argmax(1)]
        first = self.pixels[0](deep)
        second, third = (pixel(shallow) for pixel in self.pixels[1:])
        taught = [
            taught_by(first, unit(own)[:, None], *SEEDS[0]),
            taught_by(second, first.detach().sigmoid(), *SEEDS[1]),
            taught_by(third, (resized(first, second).sigmoid() + second.sigmoid()).detach() / 2, *SEEDS[2]),
        ]
        return criterion(logits, targets) + self.weight * torch.stack(taught).sum()


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (b 1 y x) on another grid."""
    return functional.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)


def taught_by(logits: Tensor, teacher: Tensor, low: float, high: float) -> Tensor:
    """Cross-entropy on the cells where the teacher (b 1 y x, in [0, 1]) is sure; 0 where it is nowhere."""
    teacher = resized(teacher, logits)
    sure = (teacher < low) | (teacher > high)
    loss = functional.binary_cross_entropy_with_logits(logits, (teacher > high).to(logits), reduction="none")
    return (loss * sure).sum() / sure.sum().clamp(min=1)
