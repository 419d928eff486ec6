import pytest
from hypothesis import given
from hypothesis import strategies as st

from whatwhere.errors import InputError
from whatwhere.geometry import Box, Frame

side = st.integers(1, 4000)
sizes = st.tuples(side, side)
networks = st.tuples(st.integers(1, 512), st.integers(1, 512))
frames = st.one_of(
    st.builds(Frame.whole, sizes, networks),
    st.builds(Frame.letterbox, sizes, networks),
    st.builds(Frame.crop, sizes, networks, st.floats(0.1, 1)),
)
share = st.floats(0, 1)


def test_iou_by_hand():
    # 4 x 3 and 4 x 2 pixels share 2 x 1: 2 / (12 + 8 - 2)
    assert Box(0, 0, 4, 3).iou(Box(2, 2, 6, 4)) == pytest.approx(2 / 18)
    assert Box(0, 0, 2, 2).iou(Box(2, 0, 4, 2)) == 0, "touching boxes share no pixel"
    assert Box(1, 1, 1, 5).iou(Box(1, 1, 1, 5)) == 0
    assert Box(1, 2, 5, 9).iou(Box(1, 2, 5, 9)) == 1


def test_area_is_half_open():
    box = Box(2, 3, 7, 5)
    assert (box.width, box.height, box.area) == (5, 2, 10)


def test_whole_frame_by_hand():
    frame = Frame.whole((100, 200), (50, 20))
    assert frame.to_network(Box(20, 10, 120, 40)) == Box(2, 5, 12, 20)
    assert frame.to_original(Box(2, 5, 12, 20)) == Box(20, 10, 120, 40)


def test_crop_frame_by_hand():
    # the shorter side of 100 keeps 0.5; the network is square
    frame = Frame.crop((100, 300), (10, 10), 0.5)
    assert frame.seen == Box(125, 25, 175, 75)
    assert frame.to_original(Box(0, 0, 10, 10)) == Box(125, 25, 175, 75)
    assert frame.to_network(Box(0, 0, 150, 50)) == Box(0, 0, 5, 5)


def test_letterbox_frame_by_hand():
    frame = Frame.letterbox((100, 200), (40, 40))
    assert frame.placed == Box(0, 10, 40, 30)
    assert frame.to_original(Box(0, 0, 40, 40)) == Box(0, 0, 200, 100)
    assert frame.to_original(Box(10, 10, 20, 15)) == Box(50, 0, 100, 25)


@given(frames, share, share, share, share)
def test_there_and_back_is_the_identity(frame, a, b, c, d):
    seen = frame.seen
    x0, x1 = sorted(seen.x0 + share * seen.width for share in (a, b))
    y0, y1 = sorted(seen.y0 + share * seen.height for share in (c, d))
    box = Box(x0, y0, x1, y1)
    back = frame.to_original(frame.to_network(box))
    assert back.to_list() == pytest.approx(box.to_list(), abs=0.01)


@given(frames, st.floats(-100, 600), st.floats(-100, 600), st.floats(0, 600), st.floats(0, 600))
def test_a_box_never_leaves_the_image(frame, x, y, width, height):
    found = frame.to_original(Box(x, y, x + width, y + height))
    H, W = frame.original
    if found.area:
        assert 0 <= found.x0 <= found.x1 <= W
        assert 0 <= found.y0 <= found.y1 <= H


@given(frames)
def test_what_was_seen_is_all_of_the_input_without_padding(frame):
    assert frame.to_network(frame.seen).to_list() == pytest.approx(frame.placed.to_list())
    assert frame.to_original(frame.placed).to_list() == pytest.approx(frame.seen.to_list(), abs=1e-6)


@given(sizes, networks, st.floats(0.1, 1))
def test_a_crop_keeps_the_aspect_ratio_and_the_centre(original, network, fraction):
    frame = Frame.crop(original, network, fraction)
    sx, sy = frame.scale
    assert sx == pytest.approx(sy)
    assert (frame.seen.x0 + frame.seen.x1) / 2 == pytest.approx(original[1] / 2)
    assert (frame.seen.y0 + frame.seen.y1) / 2 == pytest.approx(original[0] / 2)


@pytest.mark.parametrize("make", [Frame.whole, Frame.crop, Frame.letterbox])
def test_a_size_without_pixels_is_refused(make):
    with pytest.raises(InputError, match="at least 1 pixel"):
        make((0, 5), (10, 10))


@pytest.mark.parametrize("fraction", [0, 1.5])
def test_a_crop_of_more_than_there_is_is_refused(fraction):
    with pytest.raises(InputError, match="fraction"):
        Frame.crop((5, 5), (5, 5), fraction)
