"""The networks that studies are of, and the numbers of where that they keep."""

from pathlib import Path

import whatwhere
from whatwhere.training.fit import train
from whatwhere.training.recipe import Recipe

WHERE = {
    "MaxBoxAccV2": "MaxBoxAccV2",
    "IoU .3": "MaxBoxAccV2 0.3",
    "IoU .5": "MaxBoxAccV2 0.5",
    "IoU .7": "MaxBoxAccV2 0.7",
}
"""Columns, and what an evaluation calls them."""


def network_of(data: str, root_of: Path, runs: Path) -> whatwhere.Classifier:
    """The embedded network, or a light run on the training split."""
    if data.startswith("imagenet"):
        return whatwhere.load()
    out = runs / data
    if not (out / "run.toml").is_file():
        train(root_of / data, out, Recipe())
    return whatwhere.load(str(out))
