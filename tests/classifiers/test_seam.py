"""Several layers in one run, volumes, and images of other channels."""

import pytest
import torch
from scenes import OF_A_KIND, gap_net, plain, vit_net
from torch import Tensor, nn
from torch.nn.functional import interpolate

import whatwhere
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class

SIZE = (24, 40)


def images(count: int, channels: int = 3, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(2))


def same(traces, net, layers, batch) -> None:
    for layer, trace in zip(layers, traces, strict=True):
        alone = net.at(layer).trace(batch)
        torch.testing.assert_close(trace.features.detach(), alone.features.detach())
        torch.testing.assert_close(trace.logits.detach(), alone.logits.detach())
        for name in ("gradcam", "layercam", "shapleycam", "ablationcam"):
            found, expected = (METHODS[name](one, of_class(2)) for one in (trace, alone))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [["2", "4"], ["4", "2"], ["0", "1", "2", "3"], ["2"]])
def test_several_layers_in_one_run_are_one_by_one(layers):
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    runs: list[int] = []
    with net.network[0].register_forward_hook(lambda module, args, output: runs.append(len(output))):
        traces = net.traces(images(2), layers)
    assert runs == [2]
    same(traces, net, layers, images(2))


def test_several_layers_of_tokens():
    net = whatwhere.load(vit_net(), preprocess=plain(SIZE))
    same(net.traces(images(2), ["1", "2"]), net, ["1", "2"], images(2))


def test_several_layers_of_a_network_that_splits_by_itself():
    net = whatwhere.load("efficientnet-lite0", preprocess=plain((64, 96)))
    layers = ["blocks.4", "bn2"]
    batch = images(1, size=(64, 96))
    for trace, layer in zip(net.traces(batch, layers), layers, strict=True):
        alone = net.at(layer).trace(batch)
        torch.testing.assert_close(trace.features.detach(), alone.features.detach())
        torch.testing.assert_close(
            METHODS["gradcam"](trace, of_class(3)), METHODS["gradcam"](alone, of_class(3)), atol=1e-6, rtol=1e-3
        )


@pytest.mark.parametrize("layers", [[], ["nowhere"], ["2", "nowhere"]])
def test_layers_that_are_not_there(layers):
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    with pytest.raises(InputError, match=r"at least one layer|no layer 'nowhere'; nearest"):
        net.traces(images(1), layers)


def test_a_layer_that_does_not_count():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.used = nn.Conv2d(3, 2, 3), gap_net()

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    net = whatwhere.load(Idle(), preprocess=plain(SIZE))
    with pytest.raises(UnsupportedError, match="do not depend on the features at 'idle'"):
        net.traces(images(1), ["used.4", "idle"])


def test_the_tail_says_what_it_takes():
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    with pytest.raises(InputError, match=r"image in 0\.\.1, got .* for image 2"):
        trace.tail(trace.features.detach(), 2)
    with pytest.raises(InputError, match=r"\(n, 12, 6, 10\)"):
        trace.tail(trace.features.detach()[:, :5], 0)


class Counting(nn.Module):
    """Counts its images before the layer: its tail cannot be given more of them half way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gap_net()

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        return self.net(x).reshape(b, 5)


def test_the_tail_of_a_network_that_counts_its_images():
    net = whatwhere.load(Counting(), preprocess=plain(SIZE))
    trace = net.trace(images(2))
    variants = trace.features[1].detach() * torch.tensor([1.0, 0.5, 0.0])[:, None, None, None]
    found = trace.tail(variants, 1)
    torch.testing.assert_close(found[0], trace.logits[1].detach())
    torch.testing.assert_close(found, net.network.net[5:](variants).detach())


def volume_net(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, stride=(1, 2, 2), padding=1), nn.BatchNorm3d(6), nn.ReLU(inplace=True),
        nn.Conv3d(6, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(8, classes),
    ).eval()  # fmt: skip


VOLUME = (6, 20, 28)
OF_VOLUMES = sorted(METHODS.keys() - OF_A_KIND - {"rise", "occlusion"})


@pytest.fixture
def volumes():
    return whatwhere.load(volume_net(), preprocess=whatwhere.Preprocess(VOLUME, (0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize("name", OF_VOLUMES)
def test_volumes(volumes, name):
    options = {"samples": 2} if name in {"sscam", "iscam"} else {}
    batch = images(2, 2, VOLUME)
    maps = METHODS[name](volumes.trace(batch), of_class(1), **options)
    assert maps.shape == (2, *(VOLUME if name == "fullgrad" else (3, 5, 7)))
    assert maps.abs().sum() > 0
    wide = upsample(unit(positive(maps)), VOLUME)
    assert wide.shape == (2, *VOLUME)
    alone = METHODS[name](volumes.trace(batch[1:]), of_class(1), **options)
    torch.testing.assert_close(maps[1:], alone, atol=1e-5, rtol=1e-4)


def test_a_volume_of_one_slice_is_the_image():
    """A network of 1 x 3 x 3 kernels sees in a flat volume what its 2-D twin sees in the image."""
    flat = gap_net()
    deep = nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 12, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    deep.load_state_dict({k: v[:, :, None] if v.ndim == 4 else v for k, v in flat.state_dict().items()})
    there = whatwhere.load(flat, preprocess=plain(SIZE)).trace(images(2))
    here = whatwhere.load(deep, preprocess=whatwhere.Preprocess((1, *SIZE), (0.0,) * 3, (1.0,) * 3)).trace(
        images(2)[:, :, None]
    )
    for name in OF_VOLUMES:
        options = {"samples": 2} if name in {"sscam", "iscam"} else {}
        found, expected = (METHODS[name](trace, of_class(3), **options) for trace in (here, there))
        torch.testing.assert_close(
            found[:, 0], expected, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_volumes_are_resized_trilinearly():
    maps = images(2, 1, (3, 5, 7))[:, 0]
    expected = interpolate(maps[:, None], VOLUME, mode="trilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(upsample(maps, VOLUME), expected)


def test_a_network_of_volumes_takes_no_photos(volumes, photos):
    with pytest.raises(InputError, match="takes 2 channels of 6 x 20 x 28; give a tensor"):
        whatwhere.explain(volumes, photos[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels, photos):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), *gap_net()[1:3], nn.Conv2d(8, 12, 3), *gap_net()[4:])
    net = whatwhere.load(network.eval(), preprocess=plain(SIZE, channels))
    trace = net.trace(images(2, channels))
    for name in METHODS.keys() - OF_A_KIND:
        options = {"samples": 2} if name in {"sscam", "iscam", "rise"} else {}
        maps = METHODS[name](trace, of_class(1), **options)
        assert maps.isfinite().all()
        assert maps.any(), name
    if channels == 1:
        assert whatwhere.explain(net, photos[0])[0].heat.shape == whatwhere.open_photo(photos[0]).size
    else:
        with pytest.raises(InputError, match="1 or 3 channels"):
            whatwhere.explain(net, photos[0])
