"""The same maps as pytorch-grad-cam's and torchcam's, where they mean the same by a name."""

import pytest
import torch
from scenes import deep_head_net, gap_net, plain
from torch import Tensor

import whatwhere
from whatwhere.maps import METHODS
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class

SIZE = (24, 40)
NETWORKS = {"gap": gap_net, "deep head": deep_head_net}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gradcam", "GradCAM"),
        ("xgradcam", "XGradCAM"),
        ("hirescam", "HiResCAM"),
        ("layercam", "LayerCAM"),
        ("gradcam_elementwise", "GradCAMElementWise"),
        ("shapleycam", "ShapleyCAM"),
        ("ablationcam", "AblationCAM"),
    ],
)
def test_pytorch_grad_cam(name, theirs, network):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    module = NETWORKS[network]()
    with getattr(peer, theirs)(module, [module[4]]) as cam:
        expected = torch.from_numpy(cam(images(2), [targets.ClassifierOutputTarget(3)] * 2))
    trace = whatwhere.load(NETWORKS[network](), preprocess=plain(SIZE)).trace(images(2))
    found = unit(upsample(positive(METHODS[name](trace, of_class(3))), SIZE))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


# Not its Grad-CAM++, whose division by the denominator happens in a copy that is thrown away, nor its Score-CAM,
# whose masks go from 0 to 1 before they are resized and not after.
@pytest.mark.parametrize(
    ("name", "theirs", "network"),
    [("cam", "CAM", "gap")]
    + [
        (name, theirs, network)
        for name, theirs in (("gradcam", "GradCAM"), ("xgradcam", "XGradCAM"), ("layercam", "LayerCAM"))
        for network in NETWORKS
    ],
)
def test_torchcam(name, theirs, network):
    peer = pytest.importorskip("torchcam.methods")
    module = NETWORKS[network]()
    with getattr(peer, theirs)(module, "4", input_shape=(3, *SIZE)) as cam:
        (expected,) = cam([3, 3], module(images(2)))
    trace = whatwhere.load(NETWORKS[network](), preprocess=plain(SIZE)).trace(images(2))
    maps = METHODS[name](trace, of_class(3))
    found = unit(maps if name == "cam" else positive(maps))  # it keeps what speaks against in CAM alone
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)
