"""Methods of many forwards against numbers worked out on paper, plain loops, and peers."""

import math
from functools import partial

import pytest
import torch
from scenes import deep_head_net, gap_net, plain, tailed
from torch import nn
from torch.nn.functional import interpolate

import whatwhere
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.ablationcam import _lost_by_law, _lost_by_tail, ablationcam
from whatwhere.maps.clustercam import clustercam, clusters, evened, kmeans
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.occlusion import occlusion
from whatwhere.maps.rise import _Masks, rise
from whatwhere.maps.scorecam import iscam, scorecam, sscam
from whatwhere.maps.seen import parts, per_batch, scores_of
from whatwhere.scores import against, contrast, margin, of_class, probability, similarity, top_class

SIZE = (24, 40)


def images(count: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(8))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def summing():
    """Two channels of 1 x 2 cells; logits are their sums, 2 and 4. Masks are (0, 1) and (1, 0)."""
    net = tailed(lambda x: x.sum((2, 3)), 2, (1, 2))
    return net.trace(torch.tensor([[[[0.0, 2]], [[4.0, 0]]]]))


def test_scorecam_by_hand(summing):
    # through mask 0 the logits are (2, 0), through mask 1 they are (0, 4)
    found = scorecam(summing, of_class(0))
    torch.testing.assert_close(found, torch.tensor([[[4 * sigmoid(-4), 2 * sigmoid(2)]]]))


def test_increases_are_over_the_black_image(summing):
    found = scorecam(summing, of_class(0), weighting="increase")
    torch.testing.assert_close(found, torch.tensor([[[4 * (sigmoid(-4) - 0.5), 2 * (sigmoid(2) - 0.5)]]]))


def test_softmax_is_over_the_channels_logits(summing):
    found = scorecam(summing, of_class(0), weighting="softmax")
    torch.testing.assert_close(found, torch.tensor([[[4 * sigmoid(-2), 2 * sigmoid(2)]]]))


def test_iscam_by_hand(summing):
    # masks of a half and a whole: logits (1, 0) and (2, 0), (0, 2) and (0, 4)
    w0, w1 = (sigmoid(1) + sigmoid(2)) / 2, (sigmoid(-2) + sigmoid(-4)) / 2
    torch.testing.assert_close(iscam(summing, of_class(0), samples=2), torch.tensor([[[4 * w1, 2 * w0]]]))


@pytest.mark.parametrize("network", [gap_net, deep_head_net])
def test_scorecam_is_the_authors_formula(network):
    net = whatwhere.load(network(), preprocess=plain(SIZE))
    batch = images(2)
    trace = net.trace(batch)
    expected = torch.zeros(2, *SIZE)
    for i in range(2):
        for channel in trace.features[i].detach():
            wide = interpolate(channel[None, None], SIZE, mode="bilinear", align_corners=False)
            if wide.max() == wide.min():
                continue
            mask = (wide - wide.min()) / (wide.max() - wide.min())
            probability = net.network(batch[i : i + 1] * mask).detach().softmax(1)[0, 3]
            expected[i] += probability * wide[0, 0]
    found = scorecam(trace, of_class(3))
    torch.testing.assert_close(interpolate(found[:, None], SIZE, mode="bilinear")[:, 0], expected)


def test_sscam_without_noise_is_scorecam():
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    torch.testing.assert_close(sscam(trace, top_class, samples=3, noise=0.0), scorecam(trace, top_class))


def test_sscam_is_its_formula():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    trace = net.trace(images(1))
    noise = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(7)) * 0.5
    expected = torch.zeros(6, 10)
    for channel in trace.features[0].detach():
        wide = interpolate(channel[None, None], SIZE, mode="bilinear") + noise[:, None]
        low, high = wide.amin((2, 3), keepdim=True), wide.amax((2, 3), keepdim=True)
        seen = net.network(images(1) * (wide - low) / (high - low)).detach().softmax(1)[:, 1]
        expected += seen.mean() * channel * (channel.max() > channel.min())
    torch.testing.assert_close(sscam(trace, of_class(1), samples=2, noise=0.5, seed=7)[0], expected)


def test_ablationcam_by_hand():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1], [2, 0]]))
        linear.bias.copy_(torch.tensor([5.0, -7]))
    features = torch.tensor([[[[1.0, 2, 0], [0, 1, 3]], [[1.0, 0, 1], [2, 0, 0]]]])
    net = tailed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), 2, (2, 3))
    # means 7 / 6 and 4 / 6, so the logit is 5.5: without channel 0 it loses 7 / 6, without channel 1 it gains 4 / 6
    expected = features[:, 0] * (7 / 6 / 5.5) - features[:, 1] * (4 / 6 / 5.5)
    torch.testing.assert_close(ablationcam(net.trace(features), of_class(0)), expected)


@pytest.mark.parametrize("score", [of_class(2), contrast(2), top_class, of_class(torch.tensor([4, 1]))])
def test_ablation_by_the_law_is_ablation_by_the_tail(score):
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    torch.testing.assert_close(
        _lost_by_law(trace, score, "auto"), _lost_by_tail(trace, score, 3), atol=1e-5, rtol=1e-4
    )


def test_ablation_of_a_score_of_zero_is_not_divided(summing):
    found = ablationcam(summing, lambda logits: logits[:, 1] - 2 * logits[:, 0])
    torch.testing.assert_close(found, torch.tensor([[[4.0 * 4, 2.0 * -4]]]))


def test_occlusion_by_hand():
    net = tailed(lambda x: x.sum((2, 3)), 1, (1, 4))
    trace = net.trace(torch.tensor([[[[1.0, 2, 4, 8]]]]))
    # windows of 2 by steps of 1 lose 3, 6, 12; pixels lie in 1, 2, 2, 1 of them
    found = occlusion(trace, of_class(0), window=(1, 2), stride=(1, 1))
    torch.testing.assert_close(found, torch.tensor([[[3, 4.5, 9, 12]]]))


def test_occlusions_last_window_is_cut_off_at_the_edge():
    net = tailed(lambda x: x.sum((2, 3)), 1, (1, 5))
    trace = net.trace(torch.tensor([[[[1.0, 2, 4, 8, 16]]]]))
    found = occlusion(trace, of_class(0), window=(1, 3), stride=(1, 3))
    torch.testing.assert_close(found, torch.tensor([[[7.0, 7, 7, 24, 24]]]))


def test_blur_of_what_is_smooth_already_loses_nothing():
    net = tailed(lambda x: x.square().sum((2, 3)), 3, SIZE)
    flat = torch.full((1, 3, *SIZE), 2.0)
    torch.testing.assert_close(
        occlusion(net.trace(flat), of_class(0), cover="blur"), torch.zeros(1, *SIZE), atol=1e-2, rtol=0
    )
    assert occlusion(net.trace(flat), of_class(0)).min() > 1


def test_captums_occlusion():
    peer = pytest.importorskip("captum.attr")
    net = whatwhere.load(gap_net(), preprocess=plain((24, 41)))
    batch = images(2, (24, 41))
    found = occlusion(net.trace(batch), of_class(2), window=(5, 9), stride=(3, 4))
    with torch.no_grad():
        expected = peer.Occlusion(net.network).attribute(
            batch, sliding_window_shapes=(3, 5, 9), strides=(3, 3, 4), target=2
        )
    torch.testing.assert_close(found, expected[:, 0].float(), atol=1e-5, rtol=1e-4)


def test_rise_is_its_formula():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    batch = images(2)
    found = rise(net.trace(batch), of_class(1), samples=50, share=0.4, seed=2, batch=7)
    masks = _Masks(SIZE, 50, 7, 0.4, 2)[range(50)]
    for i in range(2):
        seen = net.network(batch[i] * masks[:, None]).detach().softmax(1)[:, 1]
        torch.testing.assert_close(found[i], (seen[:, None, None] * masks).sum(0) / (50 * 0.4))


def test_rises_masks():
    masks = _Masks((56, 112), 3000, 7, 0.3, 0)[range(3000)]
    assert masks.shape == (3000, 56, 112)
    assert masks.min() >= 0
    assert masks.max() <= 1
    # every pixel is seen as often, wherever it lies, and a cell of 8 pixels hangs together
    torch.testing.assert_close(masks.mean(0), torch.full((56, 112), 0.3), atol=0.035, rtol=0)
    assert torch.corrcoef(torch.stack([masks[:, 20, 20], masks[:, 20, 21]]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([masks[:, 20, 20], masks[:, 20, 44]]))[0, 1].abs() < 0.1


def test_a_group_for_each_channel_and_no_polynomial_is_scorecam():
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    every = clustercam(trace, of_class(2), k=12, degree=None)
    torch.testing.assert_close(every, scorecam(trace, of_class(2)), atol=1e-5, rtol=1e-4)


def test_groups_are_found_and_merged():
    """Six channels of two kinds: their groups, what the network says of each, and the sum."""
    net = tailed(lambda x: torch.stack([x[:, 0].sum((1, 2)), x[:, 1].sum((1, 2))], 1), 2, (2, 3))
    left, right = torch.tensor([[1.0, 0, 0], [1, 0, 0]]), torch.tensor([[0.0, 0, 1], [0, 0, 1]])
    batch = torch.stack([left * 2, right * 4, left, right * 3, left * 5, torch.ones(2, 3)])[None]
    (found,) = clusters(net.trace(batch), of_class(0), k=2)
    assert found.group.tolist() == [0, 1, 0, 1, 0, -1]  # what speaks most for class 0 comes first
    torch.testing.assert_close(found.maps, torch.stack([left, right]))
    # through the left mask the logits are (4, 0), through the right one (0, 8)
    torch.testing.assert_close(found.confidences, torch.tensor([sigmoid(4), sigmoid(-8)]))
    torch.testing.assert_close(found.map, sigmoid(4) * 8 * left + sigmoid(-8) * 7 * right)


def test_groups_of_several_layers_lie_on_the_finest_grid():
    net = whatwhere.load(gap_net(), preprocess=plain(SIZE))
    (found,) = clusters(net.trace(images(1)), of_class(0), k=5, layers=["2", "4"])
    assert found.group.shape == (8 + 12,)
    assert found.map.shape == found.maps.shape[1:] == (12, 20)
    assert set(found.group.tolist()) - {-1} == set(range(5))
    with pytest.raises(InputError, match="no layer 'nowhere'"):
        clusters(net.trace(images(1)), of_class(0), layers=["nowhere"])


def test_evened_uses_the_range_evenly():
    skewed = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) ** 3
    even = evened(skewed, 10)
    assert even.min() >= 0
    assert even.max() <= 1
    assert skewed.mean() < 0.3
    torch.testing.assert_close(even.mean(1), torch.full((3,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(even.quantile(0.25, 1), torch.full((3,), 0.25), atol=0.04, rtol=0)
    # it depends on the value alone, and rises with it
    order = skewed.argsort(1)
    assert (even.gather(1, order).diff(dim=1) > -0.02).all()


def test_kmeans_finds_what_lies_apart():
    generator = torch.Generator().manual_seed(3)
    centres = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    truth = torch.randint(3, (60,), generator=generator)
    points = centres[truth] + torch.randn(60, 2, generator=generator) * 0.3
    group = kmeans(points, 3, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(truth, group, strict=True)}) == 3
    assert torch.equal(group, kmeans(points, 3, seed=0))
    assert kmeans(points[:2].repeat(3, 1), 5, seed=0).unique().tolist() == [0, 1]


@pytest.mark.parametrize("batch", [1, 5, 7, 100])
def test_any_batch_is_the_same(batch):
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    for method in (scorecam, clustercam, occlusion, ablationcam):
        again = trace.net.trace(images(2))
        torch.testing.assert_close(method(trace, of_class(2), batch=batch), method(again, of_class(2)))


def test_several_classes_share_the_forwards():
    net, sizes = whatwhere.load(gap_net(), preprocess=plain(SIZE)), []
    trace = net.trace(images(2))
    for method in (scorecam, partial(iscam, samples=2), clustercam, occlusion, partial(rise, samples=9)):
        method(trace, of_class(0))
        with net.network[0].register_forward_hook(lambda module, args, output: sizes.append(len(output))):
            shared = method(trace, of_class(3))
        torch.testing.assert_close(shared, method(net.trace(images(2)), of_class(3)))
    assert sizes == []


def test_what_would_take_too_much_is_not_kept(monkeypatch):
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    expected = scorecam(trace, of_class(1))
    monkeypatch.setattr("whatwhere.maps.seen.KEPT_BYTES", 100)
    again = trace.net.trace(images(2))
    torch.testing.assert_close(scorecam(again, of_class(1)), expected)
    assert not again.asked


def test_scores_that_do_not_pick_classes_are_taken_of_the_logits(summing):
    """Through mask 0 the logits are (2, 0), through mask 1 they are (0, 4)."""
    found = scorecam(summing, similarity(torch.tensor([1.0, 0])))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 2]]]))
    torch.testing.assert_close(scorecam(summing, probability(0)), scorecam(summing, of_class(0)))
    torch.testing.assert_close(
        scorecam(summing, against(margin(0))), torch.tensor([[[4 * (1 - 2 * sigmoid(-4)), 2 * (1 - 2 * sigmoid(2))]]])
    )


@pytest.mark.parametrize("method", [scorecam, clustercam, ablationcam, occlusion, partial(rise, samples=3), gradcam])
def test_a_score_gives_one_number_an_image(method):
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(1))
    for wrong in (lambda logits: logits.squeeze(0), lambda logits: logits[:, :1], lambda logits: logits.sum()):
        with pytest.raises(InputError, match="one number for each of 1 images, got"):
            method(trace, wrong)


def test_a_score_that_writes_changes_no_trace():
    def writing(logits):
        logits[:, 0] = -9
        return logits[:, 1]

    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(2))
    before = trace.logits.detach().clone()
    for method in (scorecam, ablationcam, occlusion):
        torch.testing.assert_close(method(trace, writing), method(trace, lambda logits: logits[:, 1]))
    assert torch.equal(trace.logits.detach(), before)


def test_ablation_compares_what_was_computed_alike():
    net = whatwhere.load(deep_head_net(), preprocess=plain(SIZE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net.trace(images(2))
    lost = ablationcam.weights(rough, of_class(1))
    exact = ablationcam.weights(net.trace(images(2)), of_class(1))
    torch.testing.assert_close(lost, exact, atol=2e-3, rtol=0.05)
    assert (lost[exact == 0] == 0).all()


def test_no_more_at_once_than_the_budget_pays_for():
    assert [list(part) for part in parts(5, 2)] == [[0, 1], [2, 3], [4]]
    assert per_batch(10, 35, "auto") == 3
    assert per_batch(10, 5, "auto") == 1
    assert per_batch(10, 5, 9) == 9
    net = whatwhere.load(gap_net((112, 224)), preprocess=plain((112, 224)))
    trace, sizes = net.trace(images(1, (112, 224))), []
    with net.network[0].register_forward_hook(lambda module, args, output: sizes.append(len(output))):
        rise(trace, top_class, samples=70)
    assert sizes == [32, 32, 6]


def test_each_image_has_its_own_score():
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(3))
    of_each = of_class(torch.tensor([4, 0, 2]))
    found = scores_of(trace, of_each, 2, lambda part: images(3)[list(part)], 3, read="logit", batch=2, key=0)
    torch.testing.assert_close(found, trace.logits.detach()[:, 2])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (scorecam, {"batch": 0}),
        (sscam, {"samples": 0}),
        (sscam, {"noise": -1.0}),
        (iscam, {"samples": 0}),
        (clustercam, {"k": 0}),
        (clustercam, {"degree": 0}),
        (rise, {"samples": 0}),
        (rise, {"share": 0.0}),
        (occlusion, {"window": (0, 3)}),
        (occlusion, {"window": (4, 4), "stride": (8, 4)}),
        (ablationcam, {"batch": -2}),
    ],
)
def test_what_they_take_is_said(method, options):
    trace = whatwhere.load(gap_net(), preprocess=plain(SIZE)).trace(images(1))
    with pytest.raises(InputError, match="got"):
        method(trace, of_class(0), **options)


@pytest.mark.parametrize("method", [rise, occlusion])
def test_windows_are_of_images(method):
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 2))
    trace = whatwhere.load(net, preprocess=whatwhere.Preprocess((6, 7, 8), (0.0,), (1.0,))).trace(
        torch.randn(1, 1, 6, 7, 8)
    )
    with pytest.raises(UnsupportedError, match="use gradcam"):
        method(trace, of_class(0))
