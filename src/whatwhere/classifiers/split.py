"""The seam for networks that split by themselves: ``forward_features`` and ``forward_head``, as timm's do."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import Classifier, Trace, leaf_of
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.types import Images, Variants


def has_halves(network: nn.Module) -> bool:
    """Whether a network has the two calls."""
    return hasattr(network, "forward_features") and hasattr(network, "forward_head")


class SplitClassifier(Classifier):
    """Backbone and head are two calls, features (b c y x) between them."""

    def at(self, layer: str) -> HookedClassifier:  # noqa: D102
        return HookedClassifier(self.network, self.labels, self.preprocess, self.name, self.activation, layer=layer)

    def traces(self, images: Images, layers: Sequence[str]) -> list[Trace]:  # noqa: D102
        return self.at(layers[0]).traces(images, layers) if layers else super().traces(images, layers)

    def _split_run(self, images: Images) -> tuple[Tensor, Tensor, torch.dtype]:
        with torch.no_grad():
            features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        leaf = leaf_of(features)
        with torch.enable_grad():
            # a copy, because a head may begin with an operation in place
            logits = self.network.forward_head(leaf.to(features.dtype, copy=True))  # type: ignore[operator]
            return leaf, logits, features.dtype

    def _tail(self, image: Images, variants: Variants) -> Tensor:
        # a copy, because a head may begin with an operation in place
        logits: Tensor = self.network.forward_head(self._in_own_dtype(variants).clone())  # type: ignore[operator]
        return logits
