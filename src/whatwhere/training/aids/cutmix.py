"""CutMix: a rectangle of another image is pasted in, and the labels are shared out by area.

Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019. The
rectangle and its labels are torchvision's.
"""

import torch
from torchvision.transforms import v2

from whatwhere.training.aids.aid import Aid, Targets
from whatwhere.types import Images


class CutMix(Aid):
    """Pastes in a share of the batches."""

    def __init__(self, share: float = 0.5, alpha: float = 1.0) -> None:
        """How often, and how much.

        Args:
            share: of the batches.
            alpha: the area that stays is drawn from Beta(alpha, alpha).
        """
        super().__init__()
        self.share, self.alpha = share, alpha

    def mixed(self, images: Images, targets: Targets) -> tuple[Images, Targets]:
        """The images with rectangles of one another."""
        if float(torch.rand(())) >= self.share or len(images) < 2:
            return images, targets
        cut: tuple[Images, Targets] = v2.CutMix(alpha=self.alpha, num_classes=targets.shape[1])(images, targets)
        return cut
