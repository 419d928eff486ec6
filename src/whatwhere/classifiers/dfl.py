"""DFL-CNN: beside what sees the whole, a bank of filters of which each looks for one patch that tells a class.

    images -> stem -> features (b c y x) -> rest -> mean -> linear ------------------------------> G (b k)
                         |-> 1 x 1 filters, n a class -> responses (b kn y x) -> max -> linear --> P (b k)
                                                                                  |-> mean of n -> side (b k)

Wang, Morariu, Davis: Learning a Discriminative Filter Bank within a CNN for Fine-grained Recognition, CVPR 2018
(section 3). The logits are G + P + 0.1 side. Each stream has a loss of its own in training; the side branch has no
weights, and holds each filter to its class. All pools are over the whole grid, so images may have any size.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.heads import Headed
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths
from whatwhere.errors import InputError
from whatwhere.types import ClassMaps, Features, Images, Logits

WEIGHTS = (1.0, 1.0, 0.1)
"""Of G, P and the side branch, in the logits and in the loss."""


class DflNet(nn.Module):
    """A network of three streams.

    Attributes:
        general: the network that was there, with the mean over its grid and a linear layer: G.
        tap: the layer of ``general`` whose features the filters read.
        bank: the filters, a 1 x 1 convolution; those of class j are the n from j * n on.
        patches: logits of the largest responses: P.
        filters: n, of each class.
        weights: of the streams.
        scales: at which an image is looked at, as shares of its size; the logits are the mean over them.
    """

    def __init__(
        self,
        general: Headed,
        tap: str,
        image: Images,
        filters: int = 10,
        weights: Sequence[float] = WEIGHTS,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        """A bank of fresh filters beside a network.

        Args:
            general: G; taken as it is.
            tap: a layer of it.
            image: (1 d h w), to see what the layer gives.
            filters: n, of each class.
            weights: of G, P and the side branch; where one is 0, the stream has no say.
            scales: at which an image is looked at, in training and after it, the first 1; two for 2-scale.

        Raises:
            InputError: no filters, a layer that cannot be read, not three weights, a first scale that is not 1.
        """
        super().__init__()
        if filters < 1 or len(weights) != 3 or min(weights) < 0 or sum(weights[:2]) == 0:
            raise InputError(
                "wanted at least one filter a class, and three weights of which G's or P's is above 0, got "
                f"{filters} and {list(weights)}"
            )
        if not scales or scales[0] != 1 or min(scales) <= 0:
            raise InputError(f"scales are shares of an image's size, of which the first is 1, got {list(scales)}")
        self.general, self.tap, self.filters, self.weights = general, tap, filters, tuple(weights)
        self.scales = tuple(scales)
        self.widths = normalized_widths(general)
        classes = general.head.linear.out_channels
        try:
            with undisturbed(general), torch.no_grad():
                channels = self.tapped(image)[1].shape[1]
        except (IndexError, NoGridError):
            raise InputError(
                f"filters cannot read {tap!r}: it gives no grid, or none that is used; choose a layer before the last"
            ) from None
        self.bank = nn.Conv2d(channels, filters * classes, 1)
        self.patches = nn.Linear(filters * classes, classes)

    @property
    def read(self) -> str:
        """The layer that the filters read, as in ``named_modules()`` of the whole."""
        return f"general.{self.tap}"

    @property
    def backbone(self) -> nn.Module:
        """Of G."""
        return self.general.backbone

    def tapped(self, images: Images) -> tuple[Logits, Features]:
        """Logits of G (b k), and what the filters read (b c y x)."""
        seen: list[Tensor] = []
        me = get_ident()

        def note(module: nn.Module, given: Any, output: Any) -> None:
            if get_ident() == me:  # other threads may be looking at images of theirs
                seen.append(first_tensor(output).clone())  # the next layer may work in place

        with self.general.get_submodule(self.tap).register_forward_hook(note):
            logits = self.general(images)
        return logits, as_grid(seen[0], tuple(images.shape[2:]), self.widths)[0]

    def streams(self, images: Images) -> list[tuple[float, Logits]]:
        """Of each stream that has a weight, at each scale, the weight and its logits (b k).

        But in training, gradients run back to the images of the first scale alone.
        """
        found = []
        for number, scale in enumerate(self.scales):
            seen = images if scale == 1 else resized(images, scale)
            with nullcontext() if self.training or number == 0 else torch.no_grad():
                general, features = self.tapped(seen)
            strongest = self.bank(features).flatten(2).amax(2)
            every = (general, self.patches(strongest), self.side(strongest))
            found += [(w / len(self.scales), logits) for w, logits in zip(self.weights, every, strict=True) if w]
        return found

    def side(self, responses: Float[Tensor, "b kn *yx"]) -> Float[Tensor, "b k *yx"]:
        """The mean of each class's own filters: cross-channel average pooling, without weights."""
        b, _, *yx = responses.shape
        return responses.reshape(b, -1, self.filters, *yx).mean(2)

    def responses(self, images: Images) -> Float[Tensor, "b kn y x"]:
        """What each filter says of each cell."""
        found: Tensor = self.bank(self.tapped(images)[1])
        return found

    def maps(self, images: Images) -> ClassMaps:
        """Where each class's patches are (b k y x): its filters' responses, averaged."""
        return self.side(self.responses(images))

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        # one after another: what comes behind a split may go through more often than what does not
        return reduce(add, (weight * logits for weight, logits in self.streams(images)))


def resized(images: Images, scale: float) -> Float[Tensor, "b d *yx"]:
    """Images at a share of their size, a pixel at least."""
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    return nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
