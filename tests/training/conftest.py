"""Folders of bright discs and squares, which a small network learns in seconds."""

import numpy as np
import pytest
from PIL import Image


def figure(kind: int, seed: int, size: tuple[int, int] = (44, 60)) -> np.ndarray:
    """A disc, a square or stripes of bright pixels on a dark texture, (H W 3) uint8."""
    draw = np.random.default_rng([kind, seed])
    H, W = size
    pixels = draw.normal(70, 12, (H, W, 3))
    y, x = np.mgrid[:H, :W] + 0.5
    cy, cx = draw.uniform(14, H - 14), draw.uniform(14, W - 14)
    if kind == 0:
        inside = np.hypot(y - cy, x - cx) < 11
    elif kind == 1:
        inside = (abs(y - cy) < 9) & (abs(x - cx) < 9)
    else:
        inside = (abs(y - cy) < 12) & (abs(x - cx) < 12) & (x // 3 % 2 == 0)
    pixels[inside] = draw.normal((200, 190, 60), 10, (int(inside.sum()), 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write(folder, counts, seed=0):
    """Figures of each class, so many, below ``folder``."""
    for kind, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(figure(kind, seed + number)).save(folder / name / f"{number:03}.png")


@pytest.fixture
def figures(tmp_path):
    """30 figures to learn from and 9 to be tested on, of three classes."""
    write(tmp_path / "data/train", {"disc": 10, "square": 10, "stripes": 10})
    write(tmp_path / "data/test", {"disc": 3, "square": 3, "stripes": 3}, seed=100)
    return tmp_path / "data"
