"""Small networks and synthetic scenes whose answers are known."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.heads import Head, Headed
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.labels import Labels
from whatwhere.geometry import Box
from whatwhere.images import Preprocess

TRANSFORMERS = {"rollout", "legrad"}
"""Methods that read attention; they refuse other networks."""
OF_A_KIND = TRANSFORMERS | {"dfl", "distilled"}
"""Methods of one kind of networks; they refuse all others."""
MANY_FORWARDS = {"ablationcam", "scorecam", "sscam", "iscam", "clustercam", "rise", "occlusion"}
"""Methods that ask the network, or what comes after the split, many times."""


def scene(seed: int, size: tuple[int, int] = (90, 130)) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipse on a dark texture: pixels (H W 3) uint8 and its mask (H W)."""
    draw = np.random.default_rng(seed)
    H, W = size
    texture = draw.normal(60, 12, (H, W, 3))
    y, x = np.mgrid[:H, :W] + 0.5
    centre, radii = draw.uniform(0.35, 0.65, 2) * (H, W), draw.uniform(0.12, 0.3, 2) * (H, W)
    mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    texture[mask] = draw.normal((220, 60, 40), 8, (int(mask.sum()), 3))
    return texture.clip(0, 255).astype(np.uint8), mask


def tight(mask: np.ndarray) -> Box:
    """The box of a mask, found another way than the package does."""
    rows, columns = np.nonzero(mask)
    return Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def boxed_scene(root: Path, name: str, seed: int, size: tuple[int, int]) -> str:
    """A scene as a file below a data set's root; its row of ``boxes.csv``, of the class that its folder is called."""
    pixels, mask = scene(seed, size)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name)
    edges = ",".join(str(edge) for edge in tight(mask).to_list())
    return f"{name},{Path(name).parent.name},{edges}"


def plain(size: tuple[int, int], channels: int = 3) -> Preprocess:
    """Pixels in [0, 1], nothing else."""
    return Preprocess(size=size, mean=(0.0,) * channels, std=(1.0,) * channels, interpolation="nearest")


def gap_net(size: tuple[int, int] = (24, 40), classes: int = 5, seed: int = 0) -> nn.Sequential:
    """Random convolutions with everything that has a mode, global average pooling, a linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(12, classes),
    )
    net[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    net[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return net.eval()


def bank_net() -> DflNet:
    """The convolutions of ``gap_net`` with two filters a class beside their mean."""
    general = Headed(gap_net()[:5], nn.Identity(), Head(12, 5))
    return DflNet(general, "backbone", torch.rand(1, 3, 24, 40), filters=2).eval()


def deep_head_net(classes: int = 5) -> nn.Sequential:
    """As ``gap_net``, but with two linear layers behind the pooling: plain CAM does not hold."""
    net = gap_net(classes=classes)
    return nn.Sequential(*net[:7], nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, classes)).eval()


class Embedding(nn.Module):
    """Patches of 4 x 4 pixels as tokens, behind a class token."""

    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, cells, width))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)


class First(nn.Module):
    """Of the tokens, the class token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def vit_net(size: tuple[int, int] = (24, 40), classes: int = 5, seed: int = 0) -> nn.Sequential:
    """A vision transformer of torch's own layers, with a class token and attention that is far from uniform."""
    torch.manual_seed(seed)
    blocks = [nn.TransformerEncoderLayer(16, 2, 24, dropout=0.5, batch_first=True, norm_first=True) for _ in range(3)]
    for block in blocks:
        nn.init.normal_(block.self_attn.in_proj_weight, std=0.5)
    cells = size[0] // 4 * (size[1] // 4)
    return nn.Sequential(Embedding(16, cells), *blocks, nn.LayerNorm(16), First(), nn.Linear(16, classes)).eval()


def red_net() -> nn.Sequential:
    """Class 1 is how much of the image is red, class 0 how much is blue; one cell a pixel."""
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0, -1, 1], [1, -1, -1]])[..., None, None])  # type: ignore[operator, union-attr]
        net[4].weight.copy_(torch.tensor([[3.0, 0], [0, 3]]))  # type: ignore[operator, union-attr]
        net[4].bias.zero_()  # type: ignore[operator, union-attr]
    return net.eval()


class Tail(nn.Module):
    """A network whose features are its input; what comes after is given."""

    def __init__(self, head) -> None:
        super().__init__()
        self.features, self.head = nn.Identity(), head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def tailed(head, classes: int, size: tuple[int, int]) -> HookedClassifier:
    """A classifier whose features are the image and whose logits are ``head(features)``."""
    return HookedClassifier(Tail(head), Labels.numbered(classes), plain(size), "tail", layer="features")
