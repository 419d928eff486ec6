"""LeNet-5, for small pictures of any size.

LeCun et al., Gradient-based learning applied to document recognition, 1998, as it is built today: ReLU and max
pooling for the scaled tanh and the trainable subsampling, a plain linear layer at the end. C5 is the convolution that
it is in the paper, so a picture larger than 32 x 32 gives a grid; its mean goes on.
"""

from torch import nn

from whatwhere.classifiers.layers import norm_of, pool_of
from whatwhere.types import Features, Images, Logits


class LeNet5(nn.Module):
    """Splits by itself, behind C5."""

    def __init__(self, num_classes: int = 10, channels: int = 3, norm: str = "none", antialias: bool = False) -> None:
        """LeNet-5 with fresh weights.

        Args:
            num_classes: k.
            channels: d, of the images.
            norm: behind each convolution: "batch", "layer", "group" or "none".
            antialias: blur before every second cell is taken (BlurPool).
        """
        super().__init__()
        normed, self.num_features = norm_of(norm), 120
        self.grid = nn.Sequential(
            *(nn.Conv2d(channels, 6, 5), normed(6), nn.ReLU(), pool_of(6, antialias)),
            *(nn.Conv2d(6, 16, 5), normed(16), nn.ReLU(), pool_of(16, antialias)),
            *(nn.Conv2d(16, 120, 5), normed(120), nn.ReLU()),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)
        )

    def forward_features(self, images: Images) -> Features:
        """C5 (b 120 y x): one cell for 32 x 32 pixels."""
        features: Features = self.grid(images)
        return features

    def forward_head(self, features: Features) -> Logits:
        """Logits (b k)."""
        logits: Logits = self.head(features)
        return logits

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        return self.forward_head(self.forward_features(images))
