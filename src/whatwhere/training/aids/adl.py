"""Attention-based Dropout Layer: what a layer attends to is dropped, or made more of, in turn.

Choe & Shim, Attention-based Dropout Layer for Weakly Supervised Object Localization, CVPR 2019, section 3. The
attention is the mean over the channels; it is dropped where it is above a share of its maximum, or else multiplied by
its sigmoid. Nothing is learned, and nothing is done outside of training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.classifiers.backbones import stages_of
from whatwhere.classifiers.heads import Headed
from whatwhere.training.aids.aid import Aid
from whatwhere.types import Images


class AttentionBasedDropout(Aid):
    """Stands behind some layers."""

    def __init__(self, layers: tuple[str, ...] = (), drop_rate: float = 0.75, share: float = 0.9) -> None:
        """Where, how often, and how much.

        Args:
            layers: of the backbone, as in ``named_modules()``; by default the last blocks of its last two grids.
            drop_rate: how often the most attended part is dropped; else all of it is weighed. The paper's.
            share: of the attention's maximum, above which it is dropped; the paper's differs by network, and this is
                the one of the WSOL benchmark (Choe et al. 2020).
        """
        super().__init__()
        self.layers, self.drop_rate, self.share = layers, drop_rate, share

    def prepare(self, network: Headed, image: Images) -> None:
        """Stand behind the layers; evaluation mode passes them by."""
        for layer in self.layers or stages_of(network.backbone, image)[-2:]:
            self.hooks.append(network.backbone.get_submodule(layer).register_forward_hook(self._behind))

    def _behind(self, module: nn.Module, given: Any, features: Tensor) -> Tensor | None:
        return self.dropped(features) if module.training else None

    def dropped(self, features: Tensor) -> Tensor:
        """Features (b c y x) without their most attended part, or weighed by their attention."""
        attention = features.mean(1, keepdim=True)
        if float(torch.rand(())) < self.drop_rate:
            return features * (attention < self.share * attention.amax((2, 3), keepdim=True))
        return features * attention.sigmoid()
