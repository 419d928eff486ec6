"""Adversarial Complementary Learning: both branches learn, the second without what the first one finds.

Zhang et al., CVPR 2018; the branches are in ``whatwhere.classifiers.acol``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whatwhere.classifiers.acol import AdversarialBranches
from whatwhere.classifiers.heads import Headed
from whatwhere.errors import InputError
from whatwhere.training.aids.aid import Aid, Criterion, Targets
from whatwhere.types import Images


class AdversarialComplementaryLearning(Aid):
    """The sum of both branches' losses."""

    head: ClassVar[Mapping[str, Any]] = {"branches": 2}

    def loss(self, network: Headed, images: Images, targets: Targets, criterion: Criterion) -> Tensor:
        """What the first branch's map of the true class finds is erased for the second."""
        if not isinstance(network, AdversarialBranches):
            raise InputError("acol trains a head of two branches; use head = {branches = 2}")
        branches = network.branches(images, targets.argmax(1))
        losses = [
            criterion(network.branch_maps(branch, which).flatten(2).mean(2), targets)
            for which, branch in enumerate(branches)
        ]
        return losses[0] + losses[1]
