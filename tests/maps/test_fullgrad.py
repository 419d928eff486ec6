"""FullGrad against paper, pencil and a plain reading of its definition."""

from importlib import import_module

import pytest
import torch
from scenes import gap_net, plain
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import make_layers

import whatwhere
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.fullgrad import full_gradient, fullgrad
from whatwhere.maps.shape import unit
from whatwhere.scores import contrast, of_class

SIZE = (24, 40)


def classifier(network: nn.Module, classes: int, size=SIZE, channels: int = 3, layer: str = "0") -> HookedClassifier:
    return HookedClassifier(
        network.eval(), whatwhere.Labels.numbered(classes), plain(size, channels), "small", layer=layer
    )


def images(count: int = 2, size=SIZE, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(4))


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms and biases that are not those of a new network."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.normal_(bias, 0, 0.3, generator=generator)
    return network


def test_by_hand():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1])[:, None, None, None])
        network[0].bias.copy_(torch.tensor([1.0, 2]))
        network[4].weight.copy_(torch.tensor([[6.0, 12], [1, 1]]))
        network[4].bias.fill_(7)
    x = torch.tensor([[[[-2.0, 0, 1], [3, 1, 0]]]])
    found = fullgrad(classifier(network, 2, (2, 3), 1).trace(x), of_class(0))
    # behind the convolution x + 1 and 2 - x, with gradients 1 and 2 where those are positive, and biases 1 and 2:
    # products 0 1 1 | 1 1 1 and 4 4 4 | 0 4 4, over the layer's largest 4
    biases = torch.tensor([[1.0, 1.25, 1.25], [0.25, 1.25, 1.25]])
    # the gradient in x is -2 -1 -1 | 1 -1 -1; times x, absolute, over the largest 4
    inputs = torch.tensor([[1.0, 0, 0.25], [0.75, 0.25, 0]])
    torch.testing.assert_close(found, (biases + inputs)[None])


class Twice(nn.Module):
    """A block that is used twice, with a shortcut, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False))
        self.pool, self.flat = nn.MaxPool2d(2), nn.Flatten()
        self.head = nn.Sequential(nn.Linear(6 * 12 * 20, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = torch.relu_(self.block(x).add_(x))
        return self.head(self.flat(self.pool(x)))


def fused() -> nn.Module:
    """As timm has it: the activation is inside the batch norm."""
    from timm.layers import BatchNormAct2d

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, groups=4), BatchNormAct2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten(),
    )  # fmt: skip


def vgg() -> nn.Module:
    """Torchvision's, narrow."""
    return nn.Sequential(
        make_layers([8, "M", 12, 12, "M"], batch_norm=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


PIECEWISE_LINEAR = {
    "gap": gap_net,
    "twice": Twice,
    "batch norms with an activation": fused,
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.ConvTranspose2d(4, 5, 2, stride=2), nn.ReLU(), nn.Flatten(2),
        nn.Conv1d(5, 5, 7), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
    ),
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "vgg": vgg,
}  # fmt: skip


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_completeness(name):
    """What is at the input and at the biases is the score, all of it."""
    torch.manual_seed(0)
    size = (64, 96) if name in {"resnet", "vgg"} else SIZE
    network = with_statistics(PIECEWISE_LINEAR[name]()).double()
    net = classifier(network, 5, size, layer=next(name for name, _ in network.named_children()))
    batch = images(2, size).double()
    direction = torch.tensor([[1.0, 0, 0, 0, 0], [0, -1, 0, 0, 2]], dtype=torch.float64)
    sums = torch.zeros(2, dtype=torch.float64)
    gradient = full_gradient(net, batch, direction, lambda products: sums.add_(products.flatten(1).sum(1)))
    assert (sums.abs() > 1e-3).all()
    sums += (gradient * batch).flatten(1).sum(1)
    expected = (net.logits(batch) * direction).sum(1)
    torch.testing.assert_close(sums, expected, atol=1e-9, rtol=1e-9)


def psi(products: Tensor, size: tuple[int, int]) -> Tensor:
    """Of one image, (c y x): resized channel by channel, then summed."""
    strength = products.abs()
    scaled = (strength - strength.min()) / (strength.max() - strength.min())
    return functional.interpolate(scaled[None], size, mode="bilinear")[0].sum(0)


@pytest.mark.parametrize("name", ["gap", "twice"])
def test_against_a_plain_reading_of_the_definition(name):
    torch.manual_seed(1)
    network = with_statistics(PIECEWISE_LINEAR[name]()).eval()
    batch, score = images(2), contrast(3)
    found = fullgrad(classifier(network, 5, layer="stem" if name == "twice" else "0").trace(batch), score)
    for one, image in zip(found, batch, strict=True):
        kept: list[tuple[Tensor, Tensor]] = []

        def through(module: nn.Module, x: Tensor, kept=kept) -> Tensor:
            if isinstance(module, nn.Sequential):
                for child in module:
                    x = through(child, x)
                return x
            if isinstance(module, nn.ReLU):
                return x.relu()
            x = module(x)
            if isinstance(module, nn.BatchNorm2d):  # what it gives for 0
                kept.append((x, module(torch.zeros(1, module.num_features, 1, 1)).detach()))
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                kept.append((x, module.bias.detach()[:, None, None]))
            else:
                return x
            x.retain_grad()
            return x

        leaf = image[None].clone().requires_grad_()
        if name == "twice":
            x = through(network.stem, leaf)
            for _ in range(2):
                x = (through(network.block, x) + x).relu()
            logits = through(network.head, network.flat(network.pool(x)))
        else:
            logits = through(network, leaf)
        score(logits).sum().backward()
        expected = psi((leaf.grad * leaf.detach())[0], SIZE)
        for output, bias in kept:
            expected = expected + psi((output.grad * bias)[0], SIZE)
        assert len(kept) == (4 if name == "twice" else 3)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


def test_pytorch_grad_cams_where_every_layer_has_one_channel():
    """Its scaling of each channel is then that of the layer; it scales the whole map to [0, 1] in the end."""
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    torch.manual_seed(2)
    network = with_statistics(
        nn.Sequential(
            nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 3, stride=2),
            nn.Softplus(), nn.Flatten(), nn.Linear(45, 3),
        )
    ).eval()  # fmt: skip
    batch = images(2, channels=1)
    found = unit(fullgrad(classifier(network, 3, channels=1).trace(batch), of_class(1)))
    with peer.FullGrad(network, []) as cam:
        for one, image in zip(found, batch, strict=True):
            expected = cam(image[None], [targets.ClassifierOutputTarget(1)])
            torch.testing.assert_close(one[None], torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e-6, -1.0, 1e6])
def test_neither_scale_nor_sign_of_the_score_matters(factor):
    trace = classifier(gap_net(), 5).trace(images())
    scaled = fullgrad(trace, lambda logits: factor * logits[:, 2])
    torch.testing.assert_close(scaled, fullgrad(trace, of_class(2)))


def test_it_is_not_negative_and_differs_from_class_to_class():
    trace = classifier(gap_net(), 5).trace(images())
    assert fullgrad(trace, of_class(2)).amin() >= 0
    assert not torch.allclose(fullgrad(trace, of_class(2)), fullgrad(trace, of_class(3)), atol=0.1)


def test_the_images_go_through_in_parts(monkeypatch):
    net, batch, score = classifier(gap_net(), 5), images(5), of_class(torch.tensor([0, 3, 1, 1, 4]))
    trace, seen = net.trace(batch), []
    expected = fullgrad(trace, score)
    with net.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))):
        for at_once in (1, 2, 5, 100):
            torch.testing.assert_close(fullgrad(trace, score, batch=at_once), expected)
        fullgrad(trace, score)
        for pixels in (1, 2 * 24 * 40, 3 * 24 * 40 - 1):
            monkeypatch.setattr(import_module("whatwhere.maps.fullgrad"), "AUTO_PIXELS", pixels)
            torch.testing.assert_close(fullgrad(trace, score), expected)
    assert seen == [*[1] * 5, 2, 2, 1, 5, 5, 5, *[1] * 5, 2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch):
    with pytest.raises(InputError, match=f"at least 1.*got {batch}"):
        fullgrad(classifier(gap_net(), 5).trace(images()), of_class(0), batch=batch)


class Cut(nn.Module):
    """A backbone that the gradient cannot run through as it stands."""

    def __init__(self, how: str) -> None:
        super().__init__()
        net = gap_net()
        self.backbone, self.head, self.how = net[:5], net[5:], how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.head(self.backbone(x))
        return self.head(self.backbone(x).detach())


def test_a_backbone_under_its_own_no_grad():
    expected = fullgrad(classifier(gap_net(), 5).trace(images()), of_class(1))
    trace = classifier(Cut("no_grad"), 5, layer="backbone").trace(images())
    assert torch.equal(fullgrad(trace, of_class(1)), expected)
    assert torch.is_grad_enabled()


def test_a_backbone_that_detaches_is_refused():
    trace = classifier(Cut("detach"), 5, layer="head.5").trace(images())
    with pytest.raises(UnsupportedError, match="gradient that arrives at the images"):
        fullgrad(trace, of_class(1))


class Viewing(nn.Module):
    """Flattens in a way that only contiguous tensors can take."""

    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.linear, self.how = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(240, 5), how

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.how(self.conv(x).relu()))


def test_networks_that_view_their_activations():
    expected = fullgrad(classifier(Viewing(lambda x: x.flatten(1)), 5, layer="conv").trace(images()), of_class(1))
    like = torch.empty(2, 240)
    for how in (lambda x: x.view(len(x), -1), lambda x: x.view(size=(len(x), 240)), lambda x: x.view_as(like)):
        found = fullgrad(classifier(Viewing(how), 5, layer="conv").trace(images()), of_class(1))
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        full_gradient(
            classifier(Viewing(lambda x: x.view(7, 7)), 5, layer="conv"), images(), torch.ones(2, 5), lambda x: None
        )


class ChannelsLast(nn.Module):
    """A linear layer on every cell, or the convolution that is the same."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        net = gap_net()
        self.stem, self.conv, self.head, self.linear = net[:3], nn.Conv2d(8, 12, 1), net[5:], None
        if linear:
            self.linear = nn.Linear(8, 12)
            self.linear.load_state_dict({key: value.flatten(1) if value.ndim > 1 else value
                                         for key, value in self.conv.state_dict().items()})  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.conv(x) if self.linear is None else self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)


def test_a_linear_layer_on_every_cell_is_a_convolution():
    maps = [
        fullgrad(classifier(ChannelsLast(linear), 5, layer="stem").trace(images()), of_class(1))
        for linear in (False, True)
    ]
    torch.testing.assert_close(*maps)


def test_layers_of_one_cell_add_nothing():
    bare, gated = gap_net(), gap_net()
    last = nn.Conv2d(12, 12, 1)
    nn.init.dirac_(last.weight)
    expected = fullgrad(classifier(bare, 5).trace(images()), of_class(1))
    found = fullgrad(classifier(nn.Sequential(*gated[:6], last, *gated[6:]), 5).trace(images()), of_class(1))
    torch.testing.assert_close(found, expected)


def test_a_first_layer_in_place_leaves_the_images_alone():
    network = nn.Sequential(nn.ReLU(inplace=True), *gap_net())
    trace = classifier(network, 5, layer="1").trace(images())
    kept = trace.images.clone()
    fullgrad(trace, of_class(1))
    assert torch.equal(trace.images, kept)
