"""What is true of every method, on networks that differ in everything the methods could lean on."""

import gc
import inspect
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scenes import (
    MANY_FORWARDS,
    OF_A_KIND,
    TRANSFORMERS,
    bank_net,
    deep_head_net,
    gap_net,
    plain,
    red_net,
    tailed,
    vit_net,
)
from torch import Tensor, nn

import whatwhere
from whatwhere.errors import UnsupportedError
from whatwhere.geometry import Box
from whatwhere.maps import METHODS as ALL
from whatwhere.maps.shape import positive, unit
from whatwhere.scores import of_class

SIZE = (24, 40)
LINEAR = {
    "cam",
    "gradcam",
    "xgradcam",
    "hirescam",
    "layercam",
    "gradcam_elementwise",
    "shapleycam",
    "eigengradcam",
    "dfl",
}
CLASS_AGNOSTIC = {"eigencam", "kpcacam", "fem", "rollout"}
WINDOWED = {"rise", "occlusion"}  # they cover the image; their maps are as coarse as what covers it
AT_INPUT = {"fullgrad", *WINDOWED}  # their maps are at the resolution of the network's input
BY_PROBABILITY = {"scorecam", "sscam", "iscam", "clustercam"}  # where all classes are as likely, so are channels
QUICK = {"rise": {"samples": 60}, "sscam": {"samples": 2, "noise": 0.1}, "iscam": {"samples": 2}}
LEARNED = {"distilled"}
"""It says what its head was taught; what that obeys is in tests/training."""
METHODS = {
    name: partial(method, **QUICK[name]) if name in QUICK else method
    for name, method in ALL.items()
    if name not in LEARNED
}
NETWORKS = {"gap": gap_net, "deep head": deep_head_net, "vit": vit_net, "bank": bank_net}
KINDS = {"cam": ["gap"], "dfl": ["bank"], **{name: ["vit"] for name in TRANSFORMERS}}
CASES = [(method, network) for method in METHODS for network in KINDS.get(method, ["gap", "deep head"])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    method, network = request.param
    return method, METHODS[method], whatwhere.load(NETWORKS[network](), preprocess=plain(SIZE))


def images(count: int, dtype=torch.float32) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_shape_dtype_device_and_finite(case):
    name, method, net = case
    maps = method(net.trace(images(3)), of_class(2))
    assert maps.shape == (3, *SIZE) if name in AT_INPUT else (3, 6, 10)
    assert maps.dtype == torch.float32
    assert maps.device == images(1).device
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert maps.abs().sum() > 0


def test_double_precision_stays_double(case):
    _, method, net = case
    net.network.double()
    single = method(net.trace(images(2)), of_class(1))
    assert single.dtype == torch.float64


def test_a_batch_is_its_images_one_by_one(case):
    _, method, net = case
    classes = torch.tensor([3, 0, 2])
    together = method(net.trace(images(3)), of_class(classes))
    for i in range(3):
        alone = method(net.trace(images(3)[i : i + 1]), of_class(int(classes[i])))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_twice_the_score_is_twice_the_map_where_the_method_is_linear(case):
    name, method, net = case
    if name not in LINEAR:
        pytest.skip(f"{name} is not linear in the score")
    trace = net.trace(images(2))
    once, twice = method(trace, of_class(1)), method(trace, lambda logits: 2 * logits[:, 1])
    torch.testing.assert_close(twice, 2 * once)


def state(network: nn.Module) -> dict[str, object]:
    return {
        "mode": [module.training for module in network.modules()],
        "grads": [p.grad for p in network.parameters()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()
        ],
    }


@pytest.mark.parametrize("mode", ["train", "frozen", "mixed"])
def test_the_module_is_left_as_it_was(case, mode):
    name, method, net = case
    expected = method(net.trace(images(2)), of_class(1))
    if mode == "train":
        net.network.train()
    elif mode == "mixed":
        [*net.network.modules()][2].train()
    else:
        net.network.requires_grad_(False)
    before, tensors = state(net.network), {key: t.clone() for key, t in net.network.state_dict().items()}
    generator = torch.get_rng_state()
    batch = images(2)
    maps = method(net.trace(batch), of_class(1))
    if mode == "frozen" and name in TRANSFORMERS:  # torch.matmul takes another path where weights want no gradient
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(maps, expected)
    assert state(net.network) == before
    assert all(torch.equal(tensors[key], t) for key, t in net.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(batch, images(2))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_same_inside_no_grad_and_inference_mode(case, context):
    _, method, net = case
    expected = method(net.trace(images(2)), of_class(1))
    with context():
        inside = method(net.trace(images(2)), of_class(torch.tensor([1, 1])))
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearly_the_same(case, dtype):
    name, method, net = case
    if name in WINDOWED:
        pytest.skip("what a random network says of a covered image differs by less than bfloat16 can tell")
    expected = method(net.trace(images(2)), of_class(1))
    net.network.to(dtype)
    maps = method(net.trace(images(2)), of_class(1))
    assert maps.dtype == torch.float32
    both = torch.stack([maps.flatten(), expected.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.98


def test_autocast_is_nearly_the_same(case):
    name, method, net = case
    if name in WINDOWED:
        pytest.skip("what a random network says of a covered image differs by less than bfloat16 can tell")
    expected = method(net.trace(images(2)), of_class(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = method(net.trace(images(2)), of_class(1))
    assert maps.dtype == torch.float32
    assert torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.98


def test_repeats_leave_nothing_behind(case):
    name, method, net = case
    warmup, repeats = (2, 4) if name in MANY_FORWARDS else (5, 50)
    batch = images(2)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.freeze()  # what was there before is neither collected nor counted, which would take longer than all the rest
    try:
        for _ in range(warmup):
            method(net.trace(batch), of_class(1))
        count, memory = tensors(), resident()
        for _ in range(repeats):
            method(net.trace(batch), of_class(1))
        assert tensors() == count
        assert resident() - memory < 8 << 20
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WINDOWED | OF_A_KIND])
def test_a_planted_blob_is_found_to_the_pixel(name):
    net = whatwhere.load(red_net(), preprocess=plain((24, 36)), labels=["blue", "red"])
    pixels = torch.zeros(24, 36, 3, dtype=torch.uint8)
    pixels[3:9, 12:26, 0] = 255
    (red,) = whatwhere.explain(net, pixels.numpy(), target="red", method=METHODS[name])
    assert red.box == Box(12, 3, 26, 9)
    assert red.mask.sum() == 6 * 14


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in CLASS_AGNOSTIC | WINDOWED | BY_PROBABILITY | OF_A_KIND]
)
def test_each_class_is_found_in_its_own_place(name):
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)), labels=["blue", "red"])
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[5:14, 20:43, 0] = 255
    pixels[30:33, 2:50, 2] = 255
    red, blue = whatwhere.explain(net, pixels.numpy(), target=["red", "blue"], method=METHODS[name])
    assert red.box == Box(20, 5, 43, 14)
    assert blue.box == Box(2, 30, 50, 33)


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_the_most_evidence_lies_on_a_planted_blob(name):
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)), labels=["blue", "red"])
    net.network[4].weight.data.mul_(20)  # sure enough for rise to tell from the noise of its samples
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[5:14, 20:43, 0] = 255
    pixels[24:36, 2:17, 2] = 255
    red, blue = whatwhere.explain(net, pixels.numpy(), target=["red", "blue"], method=ALL[name])
    for seen, where in ((red, Box(20, 5, 43, 14)), (blue, Box(2, 24, 17, 36))):
        y, x = np.unravel_index(seen.heat.argmax(), seen.heat.shape)
        assert where.x0 <= x < where.x1
        assert where.y0 <= y < where.y1


@pytest.mark.parametrize("name", sorted(BY_PROBABILITY - {"clustercam"}))
def test_increases_find_each_class_in_its_own_place(name):
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)), labels=["blue", "red"])
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[5:14, 20:43, 0] = 255
    pixels[30:33, 2:50, 2] = 255
    method = partial(METHODS[name], weighting="increase")
    red, blue = whatwhere.explain(net, pixels.numpy(), target=["red", "blue"], method=method)
    assert red.box == Box(20, 5, 43, 14)
    assert blue.box == Box(2, 30, 50, 33)


@pytest.mark.parametrize("name", sorted(CLASS_AGNOSTIC))
def test_what_knows_no_class_does_not_read_the_score(name):
    network = vit_net() if name in TRANSFORMERS else gap_net()
    trace = whatwhere.load(network, preprocess=plain(SIZE)).trace(images(2))
    assert torch.equal(METHODS[name](trace, of_class(0)), METHODS[name](trace, of_class(3)))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WINDOWED | OF_A_KIND])
def test_a_constant_map_gives_zeros_and_no_box(name):
    size = (16, 24) if name == "kpcacam" else (40, 60)  # whose kernel is of each cell with each
    net = whatwhere.load(red_net(), preprocess=plain(size))
    for colour in ((0, 0, 0), (77, 0, 0), (201, 13, 0)):
        pixels = torch.tensor(colour, dtype=torch.uint8).expand(*size, 3).numpy()
        (seen,) = whatwhere.explain(net, pixels, target=1, method=METHODS[name])
        assert (seen.heat == 0).all()
        assert seen.box is None
        assert not seen.mask.any()


def test_gradcam_is_cam_over_the_number_of_cells():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    trace = net.trace(images(2))
    torch.testing.assert_close(METHODS["gradcam"](trace, of_class(4)), METHODS["cam"](trace, of_class(4)) / 60)


def test_the_linear_law_is_measured_where_logits_are_small_too():
    network = deep_head_net()
    with torch.no_grad():
        network[9].weight.mul_(1e-3)
        network[9].bias.mul_(1e-3)
    with pytest.raises(UnsupportedError, match="linear in the mean"):
        METHODS["cam"](whatwhere.load(network, preprocess=plain(SIZE)).trace(images(1)), of_class(0))


@pytest.mark.parametrize("name", ALL)
def test_methods_can_be_sent_to_other_processes(name):
    assert pickle.loads(pickle.dumps(ALL[name])) is ALL[name]
    assert "Maps" in str(inspect.signature(ALL[name])) or "yx" in str(inspect.signature(ALL[name]))


def test_the_linear_law_is_measured():
    assert whatwhere.load(gap_net(), preprocess=plain(SIZE)).linear_law(images(2)) < 1e-5
    assert whatwhere.load(deep_head_net(), preprocess=plain(SIZE)).linear_law(images(2)) > 0.01
    with pytest.raises(UnsupportedError, match="linear in the mean"):
        METHODS["cam"](whatwhere.load(deep_head_net(), preprocess=plain(SIZE)).trace(images(1)), of_class(0))


def test_unit_of_every_method_is_in_0_to_1(case):
    _, method, net = case
    heat = unit(positive(method(net.trace(images(3)), of_class(0))))
    assert heat.amin() >= 0
    assert heat.amax() <= 1


def test_nan_in_an_image_is_named():
    net = tailed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, SIZE)
    batch = images(3)
    batch[1, 0, 2, 3] = float("nan")
    with pytest.raises(whatwhere.InputError, match="image 1 of the batch"):
        net.trace(batch)
