"""Does the network go by what its map shows: the image is changed where the map is hot, and the network asked again.

Probabilities are the classifier's of the class that is explained. Images are in the network's input, where 0 is the
mean colour; maps are brought there, not negative.
"""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import gaussian_blur

from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import InputError
from whatwhere.maps import Method
from whatwhere.maps.combine import with_noise
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class
from whatwhere.types import Images

Image = Float[Tensor, "d h w"]
Hot = Float[Tensor, "h w"]

STEPS = 100
"""Of insertion and deletion."""
PERCENTILES = (10, 30, 50, 70, 90)
"""Of an image's pixels, that ROAD removes."""
AT_ONCE = 16
"""Versions of an image that go through the network together."""


def faithfulness(net: Classifier, image: Image, heat: Hot, label: int) -> dict[str, float]:
    """All numbers of one image that need forwards alone; means over images are what is published.

    Args:
        net: the classifier.
        image: (d h w), preprocessed.
        heat: (h w), in the input's pixels, not negative.
        label: the class that is explained.

    Returns:
        those of ``drop_and_increase``; ``insertion`` and ``deletion`` (``area``); ``ROAD most`` and ``ROAD least``
        (``road``).

    Raises:
        InputError: map and image differ in size.
    """
    if heat.shape != image.shape[1:]:
        raise InputError(f"the map is brought to the input's size {tuple(image.shape[1:])}, got {tuple(heat.shape)}")
    blurred = gaussian_blur(image, [11, 11], [5.0, 5.0])
    return {
        **drop_and_increase(net, image, heat, label),
        "insertion": area(net, heat, blurred, image, label),
        "deletion": area(net, heat, image, torch.zeros_like(image), label),
        "ROAD most": road(net, image, heat, label),
        "ROAD least": road(net, image, -heat, label),
    }


def drop_and_increase(net: Classifier, image: Image, heat: Hot, label: int) -> dict[str, float]:
    """What the network says of the image through the map alone (Chattopadhay et al., Grad-CAM++, WACV 2018, 4.1).

    ``average drop`` is max(0, Y - O) / Y of the probabilities before and after, ``average increase`` 1 where O > Y.
    The map is scaled to [0, 1] and multiplied with the input.
    """
    shown = image * unit(heat[None])
    before, after = _probabilities(net, torch.stack([image, shown]), label).tolist()
    return {
        "average drop": max(0.0, before - after) / before if before > 0 else 0.0,
        "average increase": float(after > before),
    }


def area(net: Classifier, heat: Hot, before: Image, after: Image, label: int) -> float:
    """Under the probability while the pixels, the hottest first, become those of another image, in steps of 1 %.

    Petsiuk, Das, Saenko: RISE (BMVC 2018), section 3.3: insertion begins with the blurred image, deletion ends with
    the mean colour. Pixels that are equally hot go in reading order.
    """
    rank = _ranks(heat) / heat.numel()
    shares = torch.linspace(0, 1, STEPS + 1, dtype=rank.dtype, device=rank.device)
    changed = (rank < part[:, None, None] for part in torch.split(shares, AT_ONCE))
    curve = [_probabilities(net, torch.where(part[:, None], after, before), label) for part in changed]
    return float(torch.trapezoid(torch.cat(curve).double(), shares))


def _ranks(heat: Hot) -> Float[Tensor, "h w"]:
    """0 for the hottest pixel, 1 for the next, ..."""
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty(heat.numel(), dtype=torch.float64, device=heat.device)
    rank[order] = torch.arange(heat.numel(), dtype=torch.float64, device=heat.device)
    return rank.reshape(heat.shape)


def road(net: Classifier, image: Image, heat: Hot, label: int, *, seed: int = 0) -> float:
    """The mean probability after 10, 30, 50, 70 and 90 % of the pixels, the hottest first, have been removed.

    Rong, Leemann, Borisov, Kasneci, Kasneci: A Consistent and Efficient Evaluation Strategy for Attribution Methods
    (ICML 2022). Removed is replaced by ``imputed``, so that the shape of what is missing says little.
    """
    rank = _ranks(heat) / heat.numel()
    missing = torch.stack([rank < percent / 100 for percent in PERCENTILES])
    return float(_probabilities(net, imputed(image, missing, seed=seed), label).mean())


def imputed(image: Image, missing: Bool[Tensor, "n h w"], *, noise: float = 0.01, seed: int = 0) -> Images:
    """Images (n d h w) whose missing pixels are the weighted mean of their eight neighbours, with a little noise.

    Noisy linear imputation (Rong et al. 2022, section 4): direct neighbours weigh 1 / 6, diagonal ones 1 / 12, as far
    as there are any. The sparse linear system, which is symmetric, is solved by conjugate gradients. Where all is
    missing it is 0.
    """
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]], dtype=torch.float64) / 12
    kernel = kernel.to(image.device)[None, None]
    hole = missing[:, None].double()
    known = image.double()[None] * (1 - hole)
    d, h, w = image.shape
    neighbours = functional.conv2d(
        torch.ones(1, 1, h, w, dtype=torch.float64, device=image.device), kernel, padding=1
    )
    # begins at the mean of what is known
    solve = hole * known.sum((2, 3), keepdim=True) / (1 - hole).sum((2, 3), keepdim=True).clamp(min=1)
    residual = (_around(known + solve, kernel) - neighbours * solve) * hole
    direction, size = residual.clone(), (residual * residual).sum((2, 3), keepdim=True)
    limit = 1e-8 * size.clamp(min=1e-12)
    for _ in range(4 * (h + w)):
        if bool((size <= limit).all()):
            break
        turned = (neighbours * direction - _around(direction, kernel)) * hole
        slope = (direction * turned).sum((2, 3), keepdim=True)
        step = torch.where(size > limit, size / slope.clamp(min=1e-300), 0)
        solve, residual = solve + step * direction, residual - step * turned
        further = (residual * residual).sum((2, 3), keepdim=True)
        direction = residual + further / size.clamp(min=1e-300) * direction
        size = further
    generator = torch.Generator().manual_seed(seed)
    noisy = noise * torch.randn(d, h, w, generator=generator, dtype=torch.float64).to(image.device)
    return (known + (solve + noisy) * hole).to(image.dtype)


def _around(values: Tensor, kernel: Tensor) -> Tensor:
    """The weighted sum of every pixel's neighbours, channel by channel."""
    n, d, h, w = values.shape
    return functional.conv2d(values.reshape(n * d, 1, h, w), kernel, padding=1).reshape(values.shape)


def sensitivity(
    net: Classifier, image: Image, label: int, method: Method, *, samples: int = 8, noise: float = 0.02, seed: int = 0
) -> float:
    """How far a map can change when the image hardly does: max |map' - map| / |map| over noisy copies.

    Max-sensitivity (Yeh, Hsieh, Suggala, Inouye, Ravikumar: On the (In)fidelity and Sensitivity of Explanations,
    NeurIPS 2019, eq. 5), over normal noise of a share of the image's range, of the positive map scaled to [0, 1]. A
    map of nothing that stays one has 0, one that turns into something 1.
    """
    copies = torch.stack([copy[0] for copy in with_noise(image[None], samples, noise, seed)])
    maps = unit(positive(method(net.trace(torch.cat([image[None], copies])), of_class(label))))
    plain, others = maps[:1].flatten(1), maps[1:].flatten(1)
    length = float(plain.norm())
    moved = (others - plain).norm(dim=1)
    return float(moved.max()) / length if length > 0 else float(bool(others.any()))


def randomized(net: Classifier, *, seed: int = 0) -> Classifier:
    """The same classifier with the weights of every layer shuffled: it has learned nothing.

    For the sanity check of Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim (NeurIPS 2018), section 3: a map that
    stays as it was does not depend on what the network has learned. Shuffled, since fresh weights would need every
    layer's own rule; the statistics of batch norms are left.
    """
    generator = torch.Generator().manual_seed(seed)
    other = copy.copy(net)
    other.network = copy.deepcopy(net.inner)
    with torch.no_grad():
        for parameter in other.network.parameters():
            flat = parameter.flatten()
            order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
            parameter.copy_(flat[order].reshape(parameter.shape))
    return other


def similarity_when_randomized(
    net: Classifier, shuffled: Classifier, images: Images, label: int, method: Method
) -> list[float]:
    """Of every image, the correlation between the positive maps of a classifier and of its shuffled copy.

    0 where one of the two is constant.
    """
    maps: list[Tensor] = []
    for one in (net, shuffled):
        found = positive(method(one.trace(images), of_class(label))).flatten(1)
        maps.append(found - found.mean(1, keepdim=True))
    norms = maps[0].norm(dim=1) * maps[1].norm(dim=1)
    both = (maps[0] * maps[1]).sum(1)
    return torch.where(norms > 0, both / norms.clamp(min=1e-30), 0).tolist()


def brought(maps: Float[Tensor, "b y x"], size: tuple[int, int]) -> Float[Tensor, "b h w"]:
    """Raw maps as these metrics read them: positive, in [0, 1], in the input's pixels."""
    return upsample(unit(positive(maps)), size)


def _probabilities(net: Classifier, images: Images, label: int) -> Float[Tensor, "n"]:
    return net.probabilities(net.logits(images))[:, label]
