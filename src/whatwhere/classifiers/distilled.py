"""A small head that has learned from sharper maps where things are: grids of several layers and a map -> a finer map.

                              map of the class --|
    the deepest grid  -> 1 x 1 -> + <------------|  -> 3 x 3 -> twice as fine --|
    the one before it -> 1 x 1 ---------------------------------------------> + -> 3 x 3 -> ... -> 1 x 1 -> (b y x)

After the feature pyramids of Lin et al. (Feature Pyramid Networks for Object Detection, CVPR 2017). Its weights are
the same for all classes: which one is meant is what the map says.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from whatwhere.errors import InputError
from whatwhere.types import Maps

WIDTH = 64


class DistilledHead(nn.Module):
    """Grids and a class's map -> logits of a finer map.

    Attributes:
        layers: of the network whose grids it reads, shallow to deep, as in ``named_modules()``.
        channels: of each.
        width: channels inside.
    """

    def __init__(self, layers: Sequence[str], channels: Sequence[int], width: int = WIDTH) -> None:
        """Fresh weights.

        Raises:
            InputError: no layers, or not as many numbers of channels.
        """
        super().__init__()
        if not layers or len(layers) != len(channels):
            raise InputError(f"wanted layers and the channels of each, got {len(layers)} and {len(channels)}")
        self.layers, self.channels, self.width = tuple(layers), tuple(channels), width
        # grids differ in scale from network to network
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False, momentum=None) for c in channels)
        inputs = [*channels[:-1], channels[-1] + 1]
        self.sides = nn.ModuleList(nn.Conv2d(c, width, 1) for c in inputs)
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in channels
        )
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, grids: Sequence[Tensor], maps: Maps) -> Float[Tensor, "b _ _"]:
        """Logits on the first grid.

        Args:
            grids: of its layers (b c y x).
            maps: of a class, from 0 to 1, on any grid.
        """
        *shallow, last = [norm(grid) for norm, grid in zip(self.norms, grids, strict=True)]
        seen = functional.interpolate(maps[:, None].to(last), last.shape[2:], mode="bilinear", align_corners=False)
        found = self.mixes[-1](self.sides[-1](torch.cat([last, 2 * seen], 1)))
        for grid, side, mix in zip(shallow[::-1], list(self.sides)[-2::-1], list(self.mixes)[-2::-1], strict=True):
            finer = functional.interpolate(found, grid.shape[2:], mode="bilinear", align_corners=False)
            found = mix(side(grid) + finer)
        logits: Tensor = self.out(found)[:, 0]
        return logits
