"""What makes a network look at more than the most telling part, while it is trained: one file each."""

from whatwhere.training.aids.acol import AdversarialComplementaryLearning
from whatwhere.training.aids.adl import AttentionBasedDropout
from whatwhere.training.aids.aid import Aid
from whatwhere.training.aids.cutmix import CutMix
from whatwhere.training.aids.has import HideAndSeek
from whatwhere.training.aids.spg import SelfProducedGuidance

AIDS: dict[str, type[Aid]] = {
    "has": HideAndSeek,
    "cutmix": CutMix,
    "adl": AttentionBasedDropout,
    "acol": AdversarialComplementaryLearning,
    "spg": SelfProducedGuidance,
}
"""By name."""
