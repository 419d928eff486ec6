"""Methods of methods: what they do to the maps of others."""

import pytest
import torch
from scenes import deep_head_net, gap_net, plain, red_net
from torch import nn

import whatwhere
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.maps.cam import cam
from whatwhere.maps.combine import augment, eigen_smooth, first_of, fuse, refine, root, smooth, with_noise, zoom
from whatwhere.maps.eigencam import eigencam, eigengradcam
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.hirescam import hirescam
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.scores import of_class

SIZE = (24, 40)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def trace():
    return whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))


def test_smooth_is_the_mean_over_noisy_copies(trace):
    found = smooth(gradcam, samples=3, noise=0.2, seed=6)(trace, of_class(1))
    copies = list(with_noise(trace.images, 3, 0.2, 6))
    expected = torch.stack([gradcam(trace.net.trace(copy), of_class(1)) for copy in copies]).mean(0)
    torch.testing.assert_close(found, expected)
    assert smooth(gradcam, samples=2, noise=0.0)(trace, of_class(1)).equal(gradcam(trace, of_class(1)))
    spread = torch.stack([copy - trace.images for copy in copies]).std()
    assert 0.17 < spread < 0.21  # a fifth of values in [0, 1]


def test_augment_turns_with_the_image(trace):
    mirrored = trace.net.trace(trace.images.flip(-1))
    method = augment(gradcam)
    there, back = method(trace, of_class(2)), method(mirrored, of_class(2)).flip(-1)
    torch.testing.assert_close(there, back)
    expected = (gradcam(trace, of_class(2)) + gradcam(mirrored, of_class(2)).flip(-1)) / 2
    torch.testing.assert_close(there, expected)


def test_augment_brings_scales_back_to_where_they_belong():
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)))
    picture = torch.zeros(1, 3, 40, 60)
    picture[:, 0, 6:14, 20:44] = 1
    trace = net.trace(picture)
    found = augment(cam, flip=False, scales=(1.0, 2.0))(trace, of_class(1))
    assert found.shape == (1, 80, 120)
    # bilinear resizing reaches one pixel beyond the edges
    torch.testing.assert_close(found[0, 14:26, 42:86], torch.full((12, 44), 3.0))
    assert found[0, :11].abs().max() == 0
    assert found[0, 29:].abs().max() == 0


def test_augment_says_what_a_network_does_not_take():
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 40, 5)).eval()
    trace = whatwhere.load(fixed, preprocess=plain(SIZE)).trace(images(1))
    assert augment(gradcam)(trace, of_class(0)).shape == (1, *SIZE)
    with pytest.raises(UnsupportedError, match=r"leave scales at"):
        augment(gradcam, scales=(0.5,))(trace, of_class(0))


def test_root_by_hand(trace):
    def planted(trace, score):
        return torch.tensor([[[-3.0, 0.0, 4.0], [16.0, 1.0, 9.0]], [[5.0] * 3] * 2])

    found = root(planted)(trace, of_class(0))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0, 0.5], [1.0, 0.25, 0.75]], [[0.0] * 3] * 2]))


def test_first_of_takes_the_first_that_applies(trace):
    lawless = whatwhere.load(deep_head_net(), preprocess=plain(SIZE)).trace(images(2))
    either = first_of(cam, gradcam)
    assert either(trace, of_class(1)).equal(cam(trace, of_class(1)))
    assert either(lawless, of_class(1)).equal(gradcam(lawless, of_class(1)))
    with pytest.raises(UnsupportedError, match="linear in the mean"):
        first_of(cam)(lawless, of_class(1))
    with pytest.raises(InputError, match="at least one"):
        first_of()


def test_zoom_looks_closer_where_something_is():
    """Above half is a square of 8 x 8 pixels at (6, 20); 1.25 times the window that holds it is 10 x 15."""
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)))
    picture = torch.zeros(1, 3, 40, 60)
    picture[:, 0, 6:14, 20:28] = 1
    looks = []

    def then(trace, score):
        looks.append(trace.images)
        return torch.linspace(0, 1, 20)[None, :, None].expand(1, 20, 30)

    found = zoom(cam, then, above=0.5, margin=1.25, scale=0.5, weight=0.25)(net.trace(picture), of_class(1))
    whole = cam(net.trace(picture), of_class(1))
    (seen,) = looks
    assert seen.shape == (1, 3, 20, 30)
    window = picture[:, :, 5:15, 16:31]  # 8 rows of 40 ask for more of the image than 8 columns of 60
    torch.testing.assert_close(seen, upsample(window[0], (20, 30))[None])
    close = upsample(then(net.trace(picture), None), (10, 15))[0]
    outside = torch.ones(40, 60, dtype=torch.bool)
    outside[5:15, 16:31] = False
    torch.testing.assert_close(found[0, outside], 0.75 * whole[0, outside])
    torch.testing.assert_close(found[0, 5:15, 16:31], 0.75 * whole[0, 5:15, 16:31] + 0.25 * 3 * close)


def test_zoom_stays_in_the_image_and_takes_all_of_it_where_nothing_is(trace):
    def nothing(trace, score):
        return torch.zeros(len(trace.images), 3, 5)

    def corner(trace, score):
        maps = torch.zeros(len(trace.images), *SIZE)
        maps[:, :6, -4:] = 1
        return maps

    def same(trace, score):
        return trace.images.mean(1)

    assert not zoom(nothing, gradcam)(trace, of_class(1)).any()
    found = zoom(corner, same, margin=2.0, scale=1.0, weight=1.0)(trace, of_class(1))
    assert found[:, :12, -20:].bool().all()
    assert not found[:, 12:].any()
    assert not found[:, :, :-20].any()
    once = zoom(gradcam, gradcam, weight=0.0)(trace, of_class(1))
    torch.testing.assert_close(once, upsample(positive(gradcam(trace, of_class(1))), SIZE))


def test_zoom_says_what_it_does_not_take(trace):
    for wrong in ({"above": 1.0}, {"margin": 0.9}, {"scale": 0.0}, {"weight": 1.5}):
        with pytest.raises(InputError, match="margin >= 1"):
            zoom(cam, cam, **wrong)


@pytest.mark.parametrize(
    ("by", "merge"),
    [("mean", lambda m: m.mean(0)), ("product", lambda m: m.prod(0)), ("max", lambda m: m.amax(0))],
)
def test_fuse_merges_pixel_by_pixel(trace, by, merge):
    found = fuse(gradcam, eigencam, layers=["2", "4"], by=by)(trace, of_class(3))
    each = [
        unit(upsample(positive(method(trace.net.at(layer).trace(trace.images), of_class(3))), SIZE))
        for layer in ("2", "4")
        for method in (gradcam, eigencam)
    ]
    torch.testing.assert_close(found, merge(torch.stack(each)))


def test_fuse_without_layers_reads_the_trace(trace):
    found = fuse(gradcam)(trace, of_class(3))
    torch.testing.assert_close(found, unit(upsample(positive(gradcam(trace, of_class(3))), SIZE)))


def test_refine_is_the_product_over_layers(trace):
    found = refine(["2", "4"])(trace, of_class(3))
    torch.testing.assert_close(found, fuse(gradcampp, layers=["2", "4"], by="product")(trace, of_class(3)))
    assert refine(["2", "4"]).__name__ == "refine(gradcampp)"


def test_pytorch_grad_cams_refine(trace):
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    network = gap_net()
    network[2].inplace = network[4].inplace = False  # its hooks read what a layer gave after the next one
    # its Grad-CAM++ adds 1e-6 to a denominator, which is no small thing here
    cam = peer.RefineCAM(network, [network[2], network[4]], base_method=peer.HiResCAM)
    expected = cam(trace.images, [targets.ClassifierOutputTarget(3)] * 2)
    found = unit(refine(["2", "4"], hirescam)(trace, of_class(3)))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=1e-3)


def test_eigen_smooth_of_hirescam_is_eigengradcam(trace):
    torch.testing.assert_close(eigen_smooth(hirescam)(trace, of_class(1)), eigengradcam(trace, of_class(1)))


def test_eigen_smooth_of_one_channel_is_its_map():
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)))
    picture = torch.rand(1, 3, 40, 60) * torch.tensor([1.0, 0.2, 0.2])[:, None, None]
    trace = net.trace(picture)
    torch.testing.assert_close(eigen_smooth(gradcam)(trace, of_class(1)), gradcam(trace, of_class(1)))


@pytest.mark.parametrize("name", ["gradcam", "layercam", "scorecam", "ablationcam", "cam"])
def test_whatever_weighs_features_can_be_smoothed(trace, name):
    assert eigen_smooth(METHODS[name])(trace, of_class(1)).shape == (2, 6, 10)


@pytest.mark.parametrize(
    "call",
    [
        lambda: smooth(gradcam, samples=0),
        lambda: smooth(gradcam, noise=-0.1),
        lambda: augment(gradcam, scales=()),
        lambda: augment(gradcam, scales=(1.0, -1.0)),
        fuse,
        lambda: refine([]),
    ],
)
def test_what_they_take_is_said(call):
    with pytest.raises(InputError, match="got"):
        call()


def test_what_weighs_no_features_cannot_be_smoothed():
    with pytest.raises(UnsupportedError, match="eigencam weighs no features"):
        eigen_smooth(eigencam)


def test_they_go_where_a_method_goes(photos):
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    (seen,) = whatwhere.explain(net, photos[0], target=1, method=refine(["2", "4"]))
    assert seen.method == "refine(gradcampp)"
    assert seen.heat.max() <= 1
