import pytest
import torch
from torch.nn.functional import interpolate

from whatwhere.geometry import Frame
from whatwhere.maps.shape import positive, to_original, unit, upsample


def test_positive_keeps_what_speaks_for():
    assert positive(torch.tensor([[[-1.0, 2, 0]]])).tolist() == [[[0, 2, 0]]]


def test_unit_goes_from_0_to_1_each_map_for_itself():
    maps = torch.tensor([[[2.0, 4, 6]], [[-1.0, 0, 3]]])
    assert unit(maps).tolist() == [[[0, 0.5, 1]], [[0, 0.25, 1]]]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_a_constant_map_becomes_zeros(value):
    assert unit(torch.full((1, 2, 3), value)).eq(0).all()


def test_nan_stays_nan():
    assert unit(torch.tensor([[[1.0, 2], [float("nan"), 3]]])).isnan().all()


def test_what_varies_by_rounding_alone_is_constant():
    assert unit(torch.tensor([[[1000.0, 1000.0001, 999.9999]]])).eq(0).all()
    assert unit(torch.tensor([[[1000.0, 1001, 999]]])).amax() == 1


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(7, 11), (30, 20), (224, 300)])
def test_upsample_is_interpolate(mode, size):
    maps = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = interpolate(maps[:, None], size, mode=mode, align_corners=False)[:, 0]
    torch.testing.assert_close(upsample(maps, size, mode), expected, atol=1e-5, rtol=1e-5)


def test_upsample_by_hand():
    # two cells over four pixels: centres at -0.25, 0.25, 0.75, 1.25 cells; edges repeated
    assert upsample(torch.tensor([[[0.0, 1]]]), (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]


def test_to_original_of_the_whole_image_is_upsample():
    maps = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    frame = Frame.whole((50, 81), (24, 32))
    torch.testing.assert_close(to_original(maps, frame), upsample(maps, (50, 81)))


def test_to_original_of_a_crop_is_nothing_where_the_network_did_not_look():
    frame = Frame.crop((40, 100), (20, 20))
    assert (frame.seen.x0, frame.seen.x1) == (30, 70)
    heat = to_original(torch.ones(1, 5, 5), frame)[0]
    assert heat[:, 30:70].eq(1).all()
    assert heat[:, :30].eq(0).all()
    assert heat[:, 70:].eq(0).all()


def test_to_original_of_a_letterbox_leaves_the_padding_out():
    frame = Frame.letterbox((20, 40), (40, 40))
    assert (frame.placed.y0, frame.placed.y1) == (10, 30)
    maps = torch.arange(1600.0).reshape(1, 40, 40)  # one cell a pixel of the input
    torch.testing.assert_close(to_original(maps, frame), maps[:, 10:30])


def test_to_original_of_a_cell_lies_where_the_cell_looked():
    frame = Frame.crop((60, 90), (20, 30), fraction=0.5)
    maps = torch.zeros(1, 2, 3)
    maps[0, 1, 2] = 1
    heat = to_original(maps, frame)[0]
    rows, columns = torch.where(heat == heat.max())
    # the crop is rows 15..45 and columns 22.5..67.5; the last cell's centre is at (37.5, 60)
    assert abs(rows.float().mean() + 0.5 - 37.5) <= 8
    assert rows.min() >= 37
    assert columns.min() >= 59
