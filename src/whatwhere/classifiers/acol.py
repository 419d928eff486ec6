"""Two branches, the second of which does not see what the first one finds.

Zhang et al., Adversarial Complementary Learning for Weakly Supervised Object Localization, CVPR 2018. Where the first
branch's map of the class is above a share of its range, the second one's input is 0. The class is the true one in
training, and the first branch's best where none is known.
"""

import torch
from torch import Tensor, nn

from whatwhere.classifiers.heads import Head, Headed, convolution
from whatwhere.types import ClassMaps, Features, Images

ERASED = 0.6
"""Share of a map's range above which the second branch sees nothing."""


class AdversarialBranches(Headed):
    """A backbone, two necks and one linear layer over both: the logits are the mean of the branches' own.

    The paper takes the larger of both maps, each brought to [0, 1]; class maps here are the mean of both, so that the
    linear law holds and every map method applies. Each neck is one 3 x 3 convolution, where the paper has two.
    """

    def __init__(self, backbone: nn.Module, channels: int, classes: int, units: int = 1024) -> None:
        """Branches with fresh weights.

        Args:
            backbone: images -> features (b c y x).
            channels: c.
            classes: k.
            units: u, of each branch.
        """
        necks = nn.ModuleList(convolution(channels, units) for _ in range(2))
        super().__init__(backbone, necks, Head(2 * units, classes))

    def forward_features(self, images: Images) -> Features:
        """Features of both branches (b 2u y x), halved, so that the linear layer gives the mean of both."""
        return torch.cat(self.branches(images), 1) / 2

    def branches(self, images: Images, labels: Tensor | None = None) -> tuple[Features, Features]:
        """Features (b u y x) of the first branch and of the second.

        Args:
            images: (b d h w).
            labels: (b), the classes whose maps are erased; by default what the first branch says.
        """
        features = self.backbone(images)
        first: Features = self.neck[0](features)  # type: ignore[index]
        with torch.no_grad():
            maps = self.branch_maps(first, 0)
            labels = maps.flatten(2).mean(2).argmax(1) if labels is None else labels
            own = maps[torch.arange(len(maps), device=maps.device), labels].flatten(1)
            low, high = own.amin(1, keepdim=True), own.amax(1, keepdim=True)
            kept = (own <= low + ERASED * (high - low)).reshape(len(maps), 1, *maps.shape[2:])
        return first, self.neck[1](features * kept)  # type: ignore[index]

    def branch_maps(self, branch: Features, which: int) -> ClassMaps:
        """Logits of every cell (b k y x) that a branch gives by itself, the first 0 or the second 1."""
        linear, u = self.head.linear, branch.shape[1]
        return nn.functional.conv2d(branch, linear.weight[:, which * u : (which + 1) * u], linear.bias)
