"""What an aid can do: change the images, stand between layers, have a loss of its own. It stays out of the run."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from whatwhere.classifiers.heads import Headed
from whatwhere.types import Images

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits (b k), targets (b k)) -> the loss."""
Targets = Float[Tensor, "b k"]


class Aid(nn.Module):
    """Does nothing, in all three ways.

    Attributes:
        head: the head that the network must have, as options of a head of ours.
    """

    head: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[RemovableHandle] = []

    def prepare(self, network: Headed, image: Images) -> None:
        """Called once, before training: to make layers of its own, or to stand between the network's.

        Args:
            network: that is trained.
            image: (1 d h w), of the size that it takes.
        """

    def release(self) -> None:
        """Called once, after training: to stand there no longer."""
        for hook in self.hooks:
            hook.remove()

    def mixed(self, images: Images, targets: Targets) -> tuple[Images, Targets]:
        """Other images of the same shape in place of a batch, and what they show."""
        return images, targets

    def loss(self, network: Headed, images: Images, targets: Targets, criterion: Criterion) -> Tensor | None:
        """The whole loss of a batch, or None for the usual one."""
        return None
