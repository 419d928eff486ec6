"""Hide-and-Seek: patches of a grid are hidden at random, so that the most telling part is not always there.

Kumar Singh & Lee, Hide-and-Seek: Forcing a Network to be Meticulous for Weakly-supervised Object and Action
Localization, ICCV 2017, section 3.1. What is hidden is 0, the mean of all images where
the network takes them centred.
"""

import torch

from whatwhere.training.aids.aid import Aid, Targets
from whatwhere.types import Images


class HideAndSeek(Aid):
    """Hides each patch of an image with the same probability, in a grid that is drawn for each batch."""

    def __init__(self, share: float = 0.5, grids: tuple[int, ...] = (0, 4, 5, 7, 14)) -> None:
        """How much, and how.

        Args:
            share: probability that a patch is hidden.
            grids: patches along each side, of which one is drawn; 0 hides nothing. The paper's patches of 56, 44, 32
                and 16 pixels of 224 are about these.
        """
        super().__init__()
        self.share, self.grids = share, grids

    def mixed(self, images: Images, targets: Targets) -> tuple[Images, Targets]:
        """The images with patches of 0."""
        grid = self.grids[int(torch.randint(len(self.grids), ()))]
        if grid == 0:
            return images, targets
        b, _, h, w = images.shape
        shown = (torch.rand(b, 1, grid, grid) >= self.share).to(images)
        rows = torch.arange(h, device=images.device) * grid // h
        columns = torch.arange(w, device=images.device) * grid // w
        return images * shown[:, :, rows][..., columns], targets
