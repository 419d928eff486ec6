"""Each number against one worked out by hand on 5 x 7 pixels, and against scikit-learn."""

import numpy as np
import pytest

from whatwhere.errors import InputError
from whatwhere.evaluation import wsol2020
from whatwhere.evaluation.localization import (
    HITS,
    SHARES,
    best_threshold,
    boxes_result,
    boxes_tally,
    iou,
    overlaps,
    pixels_of,
    pixels_result,
    pixels_tally,
)
from whatwhere.evaluation.protocols import HALF_OPEN, PROTOCOLS, find_protocol, region_of
from whatwhere.evaluation.saliency import EPS, saliency
from whatwhere.geometry import Box, Frame

HEAT = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.8, 0.2, 0.0, 0.0, 0.0],
        [0.0, 0.8, 0.4, 0.2, 0.0, 0.0, 0.6],
        [0.0, 0.2, 0.2, 0.2, 0.0, 0.0, 0.6],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
TRUTH = Box(1, 1, 3, 3)
ON = np.zeros((5, 7), dtype=np.int8)
ON[1:3, 1:3] = 1


def tally(*found, top1=True, top5=True):
    count = len(found)
    return boxes_tally([str(i) for i in range(count)], found, np.full(count, top1), np.full(count, top5))


def test_boxes_by_hand():
    found = overlaps(HEAT, [TRUTH])
    # below 0.2 the largest part is 3 x 3 around the true 2 x 2; then it is 2 x 2 until 0.8; then one pixel
    assert np.allclose(found.largest, np.select([SHARES < 0.2, SHARES < 0.8], [4 / 9, 1.0], 1 / 4))
    assert (found.any == found.largest).all()
    one = tally(found)
    for row, reached in enumerate((0.3, 0.5, 0.7)):
        assert (one["hits"][0, row] == (found.any >= reached)).all()
    result = boxes_result(one, threshold=0.1)
    assert result["MaxBoxAcc"].value == result["MaxBoxAccV2"].value == 1
    assert result["mean IoU"].value == pytest.approx(4 / 9)
    assert result["GT-known loc"].value == 0
    assert boxes_result(one)["GT-known loc"].value == 1
    assert best_threshold(one) == 0.5  # of 0.2 to 0.799


def test_any_box_counts_for_the_second_version():
    small = tally(overlaps(HEAT, [Box(6, 2, 7, 4)]))
    assert boxes_result(small)["MaxBoxAcc"].value == 0
    assert boxes_result(small)["MaxBoxAccV2"].value == 1
    assert (small["hits"][0, HITS.index("any 0.7")] == (SHARES < 0.6)).all()


def test_localization_wants_the_class_too():
    found = overlaps(HEAT, [TRUTH])
    result = boxes_result(
        boxes_tally(["a", "b", "c"], [found] * 3, np.array([True, False, False]), np.array([True, True, False]))
    )
    assert result["GT-known loc"].value == 1
    assert result["top-1 loc"].value == pytest.approx(1 / 3)
    assert result["top-5 loc"].value == pytest.approx(2 / 3)


def test_two_true_boxes_take_the_nearer():
    both = overlaps(HEAT, [Box(6, 2, 7, 4), TRUTH])
    assert (both.largest == overlaps(HEAT, [TRUTH]).largest).all()


def test_a_map_of_nothing_hits_nothing():
    nothing = boxes_result(tally(overlaps(np.zeros((5, 7)), [TRUTH])))
    assert nothing["MaxBoxAcc"].value == nothing["MaxBoxAccV2"].value == nothing["mean IoU"].value == 0


def test_swapped_axes_lose():
    wide = np.zeros((5, 7))
    wide[1:3, 1:7] = 1
    assert boxes_result(tally(overlaps(wide, [Box(1, 1, 7, 3)])))["MaxBoxAcc"].value == 1
    assert boxes_result(tally(overlaps(wide.T, [Box(1, 1, 7, 3)])))["MaxBoxAcc"].value == 0


def test_the_best_threshold_is_one_for_the_split():
    first, second = overlaps(HEAT, [TRUTH]), overlaps(HEAT, [Box(1, 1, 4, 4)])
    both = boxes_result(tally(first, second))
    assert both["MaxBoxAcc"].value == 0.5  # one wants more than 0.2, the other less
    assert boxes_result(tally(first))["MaxBoxAcc"].value == boxes_result(tally(second))["MaxBoxAcc"].value == 1


def test_halves_make_the_whole():
    generator = np.random.default_rng(0)
    parts = [
        boxes_tally([str(i)], [overlaps(generator.random((5, 7)), [TRUTH])], np.array([True]), np.array([True]))
        for i in range(6)
    ]
    forwards, backwards = parts[0], parts[5]
    for part in parts[1:]:
        forwards = forwards + part
    for part in parts[4::-1]:
        backwards = backwards + part
    assert forwards.same(backwards)
    low, high = boxes_result(forwards)["MaxBoxAcc"][1:]
    assert 0 <= low <= high <= 1
    assert forwards["boxed"][0] == 6
    assert not forwards.same(parts[0])


def test_bootstrap_intervals_are_those_of_a_share():
    # of 400 images every fourth is right: the normal interval is .25 +- 1.96 sqrt(.25 .75 / 400)
    right, wrong = overlaps(HEAT, [TRUTH]), overlaps(HEAT, [Box(0, 0, 7, 5)])
    several = tally(*([right, wrong, wrong, wrong] * 100))
    value, low, high = boxes_result(several)["MaxBoxAcc"]
    assert value == 0.25
    assert low == pytest.approx(0.25 - 0.0424, abs=0.015)
    assert high == pytest.approx(0.25 + 0.0424, abs=0.015)


def test_iou_is_that_of_boxes():
    generator = np.random.default_rng(1)
    boxes = generator.integers(0, 9, (8, 4))
    found = iou(boxes, boxes[:3].astype(float))
    for i, one in enumerate(boxes.tolist()):
        for j, other in enumerate(boxes[:3].tolist()):
            if one[0] < one[2] and one[1] < one[3] and other[0] < other[2] and other[1] < other[3]:
                assert found[i, j] == pytest.approx(Box(*one).iou(Box(*other)))


def test_pixels_by_hand():
    truth = ON.copy()
    truth[3, 6] = -1
    counts = pixels_of(HEAT, truth)
    assert counts.sum(1).tolist() == [30, 4]
    # the four are 1, 0.8, 0.8, 0.4; off them lies one pixel of 0.6, then five of 0.2
    result = pixels_result(pixels_tally(["a"], [counts]), 0.5)
    assert result["PxAP"].value == pytest.approx(1 / 4 + 2 / 4 + 1 / 4 * 4 / 5)
    assert (result["TPR"].value, result["FPR"].value) == (3 / 4, 1 / 30)
    assert result["pixel ROC AUC"].value == pytest.approx((3 * 30 + 29) / (4 * 30))
    assert result["mask IoU"].value == pytest.approx(4 / 5)


def test_masks_overlap_at_one_threshold_for_all():
    # of one all four are the object, of the other only the highest: best at once at .8, apart at .2 and .8
    top = (HEAT == 1).astype(np.int8)
    tally = pixels_tally(["a"], [pixels_of(HEAT, ON)]) + pixels_tally(["b"], [pixels_of(HEAT, top)])
    assert pixels_result(tally, 0.5)["mask IoU"].value == pytest.approx((1 / 4 + 1) / 2)


def test_pixels_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    heat = generator.integers(0, 1001, (5, 7)) / 1000
    heat[0, 0] = 1
    truth = generator.integers(-1, 2, (5, 7)).astype(np.int8)
    result, seen = pixels_result(pixels_tally(["a"], [pixels_of(heat, truth)]), 0.5), truth >= 0
    assert result["PxAP"].value == pytest.approx(metrics.average_precision_score(truth[seen], heat[seen]))
    assert result["pixel ROC AUC"].value == pytest.approx(metrics.roc_auc_score(truth[seen], heat[seen]))


def test_saliency_by_hand():
    found = saliency(HEAT, ON)
    p = HEAT / HEAT.sum()
    q = ON / ON.sum()
    assert HEAT.sum() == pytest.approx(5.2)
    assert found["pointing"] == 1
    assert found["energy"] == pytest.approx(3.0 / 5.2)
    assert found["SIM"] == pytest.approx(np.minimum(p, q).sum())
    assert found["SIM"] == pytest.approx((0.4 + 0.8 + 0.8 + 1.0) / 5.2 if 1.0 / 5.2 < 0.25 else 0)
    assert found["CC"] == pytest.approx(np.corrcoef(HEAT.ravel(), ON.ravel())[0, 1])
    assert found["NSS"] == pytest.approx(((HEAT - HEAT.mean()) / HEAT.std())[ON == 1].mean())
    assert found["KL"] == pytest.approx(0.25 * sum(np.log(0.25 / (v / 5.2)) for v in (1, 0.8, 0.8, 0.4)), abs=1e-5)
    assert EPS < 1e-5


def test_saliency_leaves_out_what_is_not_known():
    truth = ON.copy()
    truth[:, 6] = -1
    cut = saliency(HEAT[:, :6], ON[:, :6])
    assert saliency(HEAT, truth) == pytest.approx(cut)


def test_saliency_of_nothing():
    found = saliency(np.zeros((5, 7)), ON)
    assert (found["pointing"], found["CC"], found["NSS"]) == (0, 0, 0)
    assert found["energy"] == pytest.approx(4 / 35)
    assert np.isnan(saliency(HEAT, np.zeros((5, 7), dtype=np.int8))["energy"])


def test_wrong_truths_are_refused():
    with pytest.raises(InputError, match="image 7: wanted at least one true box"):
        overlaps(HEAT, [], "image 7")
    with pytest.raises(InputError, match=r"in \[0, 1\)"):
        boxes_result(tally(overlaps(HEAT, [TRUTH])), 1.0)
    with pytest.raises(InputError, match="no protocol is called 'wsol'; nearest: wsol2020"):
        find_protocol("wsol")


def test_regions_of_boxes():
    region = region_of([Box(0.4, 1, 2.6, 3), Box(5.5, 0, 9, 1)], (5, 7))
    assert region.sum() == 3 * 2 + 2
    assert region[1:3, :3].all()
    assert region[0, 5:].all()


def square(x0, y0, x1, y1, *, size=224, value=1.0, under=None):
    heat = np.zeros((size, size), dtype=np.float32) if under is None else under
    heat[y0:y1, x0:x1] = value
    return heat


WHOLE = np.array([[0.0, 0.0, 224.0, 224.0]])


@pytest.mark.parametrize(
    ("heat", "truth", "largest", "some"),
    [
        # a 10 x 20 part comes out as x0 20, y0 30, x1 30, y1 50, which counts as 11 x 21
        (square(20, 30, 30, 50), [[20, 30, 30, 50]], 1, 1),
        (square(20, 30, 30, 50), [[20, 30, 29, 49]], 200 / 231, 200 / 231),
        # nothing above the threshold is the box of the first pixel
        (np.zeros((224, 224), dtype=np.float32), [[0, 0, 9, 9]], 1 / 100, 1 / 100),
        # two parts: the largest is the one with more area
        (square(100, 100, 140, 140, under=square(0, 0, 20, 20)), [[0, 0, 20, 20]], 0, 1),
        # a hole has a contour too, one pixel around it
        (square(50, 50, 60, 60, value=0.0, under=square(20, 20, 90, 90)), [[49, 49, 61, 61]], 13**2 / 71**2, 1),
        # parts that touch at a corner are one
        (square(30, 30, 40, 40, under=square(20, 20, 30, 30)), [[20, 20, 40, 40]], 1, 1),
        # a part at the edge ends at 223
        (square(200, 200, 224, 224), [[200, 200, 223, 223]], 1, 1),
        # a line has no area, so a smaller square is larger
        (square(60, 60, 63, 63, under=square(0, 0, 100, 1)), [[60, 60, 63, 63]], 1, 1),
    ],
    ids=["one", "shorter", "nothing", "two", "hole", "corner", "edge", "line"],
)
def test_the_wsol_rules(heat, truth, largest, some):
    found = wsol2020.overlaps(heat, np.array(truth, dtype=float))
    assert np.allclose(found.largest, largest)
    assert np.allclose(found.any, some)


def test_the_wsol_threshold_is_strict_and_cut_to_levels():
    # .5 is level 127; of a maximum of 255 the threshold .498 is level 126 and .5 is 127
    heat = square(100, 100, 110, 110, value=0.5, under=square(10, 10, 40, 40))
    found = wsol2020.overlaps(heat, np.array([[100.0, 100, 110, 110]]))
    assert found.any[498] == 1
    assert found.any[500] == 0


def test_the_wsol_map():
    map = np.array([[-2.0, 0.0], [0.0, 2.0]])
    heat = wsol2020.heat_of(map)
    assert heat.shape == (224, 224)
    assert (heat.min(), heat.max()) == (0, 1)
    assert heat[0, 223] == pytest.approx(0.5, abs=1e-6)
    assert not wsol2020.heat_of(np.full((2, 3), 4.0)).any()
    assert not wsol2020.heat_of(np.array([[1.0, np.nan]])).any()


def test_the_wsol_boxes_are_scaled_and_cut():
    assert wsol2020.scaled([Box(10, 5, 99.9, 50)], (50, 100)).tolist() == [[22, 22, 223, 224]]


def test_the_wsol_pixels_reach_a_threshold_that_they_equal():
    levels = wsol2020.levels_of(np.array([[0.0, 0.5, 1.0]]))
    assert levels.tolist() == [[0, 500, 1000]]
    assert HALF_OPEN.levels(np.array([[0.0, 0.5, 1.0]])).tolist() == [[0, 500, 1000]]


def test_the_wsol_threshold_matches_one_by_one():
    generator = np.random.default_rng(0)
    heat = wsol2020.heat_of(generator.standard_normal((7, 7)))
    truth = np.array([[30.0, 40, 150, 120]])
    found = wsol2020.overlaps(heat, truth)
    import cv2

    levels = (heat * 255).astype(np.uint8)
    for number in range(0, 1000, 97):
        cut = int(SHARES[number] * levels.max())
        contours, _ = cv2.findContours((levels > cut).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
        boxes = [cv2.boundingRect(contour) for contour in contours]
        best = max(
            wsol2020.inclusive_iou(np.array([[x, y, min(x + w, 223), min(y + h, 223)]], dtype=float), truth)[0, 0]
            for x, y, w, h in boxes
        )
        assert found.any[number] == pytest.approx(best)


def test_half_open_heat_is_that_of_explanations():
    frame = Frame.crop((50, 90), (24, 24))
    map = np.array([[-1.0, 0.5], [2.0, 1.0]], dtype=np.float32)
    heat = PROTOCOLS["half-open"].heat(map, frame)
    assert heat.shape == (50, 90)
    assert heat[:, 0].max() == 0  # was not seen
    assert heat.max() == pytest.approx(1, abs=0.02)
