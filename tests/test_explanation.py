import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from scenes import gap_net, plain, red_net, scene, tight

import whatwhere
from whatwhere.errors import DataError, InputError
from whatwhere.explanation import classes_of, explain_each
from whatwhere.regions import rle

SCHEMA = Path(whatwhere.__path__[0], "reports", "explanation.schema.json")


@pytest.fixture(scope="module")
def red():
    return whatwhere.load(red_net(), preprocess=plain((45, 65)), labels=["blue", "red"])


def test_what_is_in_the_photographs_and_where(net, photos):
    chelsea, coffee, _ = (seen[0] for seen in whatwhere.explain(net, photos))
    assert chelsea.label == "Egyptian cat"
    assert coffee.label == "espresso"
    assert coffee.probability > 0.8
    # the cup, in pixels of the photograph, as one sees it
    assert coffee.box.iou(whatwhere.Box(170, 15, 500, 330)) > 0.5


def test_one_image_gives_a_list_of_its_targets(net, photos):
    seen = whatwhere.explain(net, photos[0], target="top5")
    assert len(seen) == 5
    assert [one.probability for one in seen] == sorted((one.probability for one in seen), reverse=True)
    assert seen[0].box is not None


def test_several_targets_and_one_for_each_image(net, photos):
    both = whatwhere.explain(net, photos[:2], target=["tabby", 967])
    assert [[one.index for one in seen] for seen in both] == [[281, 967], [281, 967]]
    each = whatwhere.explain(net, photos[:2], targets=["tabby", ["top2", "espresso"]])
    assert [len(seen) for seen in each] == [1, 3]
    # what is found for a target does not depend on what else is asked
    torch.testing.assert_close(torch.from_numpy(each[0][0].map), torch.from_numpy(both[0][0].map))
    torch.testing.assert_close(torch.from_numpy(each[1][2].map), torch.from_numpy(both[1][1].map))


def test_paths_pil_images_and_arrays_are_the_same(net, photos):
    image = Image.open(photos[0])
    found = whatwhere.explain(net, [photos[0], str(photos[0]), image, np.asarray(image)])
    assert len({json.dumps({**seen[0].to_dict(), "source": ""}) for seen in found}) == 1
    assert [seen[0].source for seen in found] == [str(photos[0]), str(photos[0]), "image 2", "image 3"]


def test_batches_do_not_matter(net, photos):
    one = whatwhere.explain(net, [*photos, photos[0]], batch=1)
    four = whatwhere.explain(net, [*photos, photos[0]], batch=4)
    for a, b in zip(one, four, strict=True):
        assert a[0].box == b[0].box
        np.testing.assert_allclose(a[0].map, b[0].map, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_planted_ellipse_is_found(red, seed):
    pixels, mask = scene(seed)
    (seen,) = whatwhere.explain(red, pixels, target="red", threshold=0.5)
    assert seen.box.iou(tight(mask)) > 0.9
    assert (seen.mask & mask).sum() / (seen.mask | mask).sum() > 0.9


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_other_frames_lead_back_too(fit):
    net = whatwhere.load(red_net(), preprocess=whatwhere.Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3, fit=fit))
    pixels, mask = scene(1)
    (seen,) = whatwhere.explain(net, pixels, target=1, threshold=0.5)
    inside = np.zeros_like(mask)
    edges = [round(edge) for edge in seen.frame.seen.to_list()]
    inside[max(edges[1], 0) : edges[3], max(edges[0], 0) : edges[2]] = True
    assert not seen.mask[~inside].any()
    assert (seen.mask & mask).sum() / (seen.mask | (mask & inside)).sum() > 0.85


def test_heat_is_in_original_pixels_between_0_and_1(net, photos):
    (seen,) = whatwhere.explain(net, photos[0])
    assert seen.heat.shape == seen.mask.shape == seen.size == seen.pixels.shape[:2]
    assert seen.heat.min() >= 0
    assert 0.9 < seen.heat.max() <= 1
    assert (seen.heat > 0.25 * seen.heat.max()).tolist() == seen.mask.tolist()


def test_to_dict_is_json_of_the_documented_schema(net, photos):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for at in (0.25, "otsu", "p90"):
        for one in whatwhere.explain(net, photos[0], target="top2", threshold=at):
            data = json.loads(json.dumps(one.to_dict()))
            jsonschema.validate(data, schema)
            assert np.array_equal(rle.decode(data["mask"]), one.mask)
            assert set(schema["required"]) == set(data) == set(schema["properties"])


def test_nothing_found_is_said(red):
    (seen,) = whatwhere.explain(red, np.zeros((45, 65, 3), np.uint8), target=1)
    jsonschema.validate(seen.to_dict(), json.loads(SCHEMA.read_text()))
    assert seen.to_dict()["box"] is None


def test_an_explanation_is_frozen(net, photos):
    (seen,) = whatwhere.explain(net, photos[0])
    with pytest.raises(AttributeError):
        seen.label = "dog"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcan"}, "no method is called 'gradcan'; nearest: gradcam"),
        ({"target": "tabbi"}, "nearest: tabby"),
        ({"target": 1000}, r"in 0\.\.999"),
        ({"target": "top0"}, "top1, top2"),
        ({"target": []}, "empty"),
        ({"targets": [1]}, "got 1 for 2 images"),
        ({"threshold": 2.0}, "threshold"),
    ],
)
def test_wrong_arguments(net, photos, options, message):
    with pytest.raises(InputError, match=message):
        whatwhere.explain(net, photos[:2], **options)


def test_a_bad_image_is_named(net, photos, tmp_path):
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        whatwhere.explain(net, [photos[0], tmp_path / "bad.jpg"])


def test_explain_each_goes_on_after_a_bad_image(net, photos, tmp_path):
    (tmp_path / "bad.jpg").write_text("text")
    files = [tmp_path / "bad.jpg", *photos, tmp_path / "none.png", photos[0]]
    for batch in (1, 2, 16):
        found = list(explain_each(net, files, batch=batch))
        assert [isinstance(one, DataError) for one in found] == [True, False, False, False, True, False]
        assert [one[0].source for one in found if isinstance(one, list)] == [str(p) for p in (*photos, photos[0])]


class NanOnDark(torch.nn.Sequential):
    def forward(self, images):
        return super().forward(images) / (images.amax((1, 2, 3)) > 0).float()[:, None]


def test_nan_is_the_image_s_error_and_not_the_batch_s():
    net = whatwhere.load(NanOnDark(*red_net()), preprocess=plain((45, 65)))
    good, dark = scene(0)[0], np.zeros((45, 65, 3), np.uint8)
    with pytest.raises(DataError, match="image 1: NanOnDark gives nan"):
        whatwhere.explain(net, [good, dark])
    found = list(explain_each(net, [good, dark, good], target=1))
    assert [isinstance(one, DataError) for one in found] == [False, True, False]


def test_explain_each_reads_no_further_than_a_batch(net, photos):
    read = []

    def files():
        for photo in [*photos, *photos]:
            read.append(photo)
            yield photo

    next(explain_each(net, files(), batch=2))
    assert len(read) == 2


def test_no_images_are_no_explanations(net):
    assert whatwhere.explain(net, []) == []
    assert list(explain_each(net, [])) == []


def test_a_batch_of_no_images_is_refused(net, photos):
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        whatwhere.explain(net, photos, batch=0)
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        list(explain_each(net, photos, batch=0))


def test_a_method_of_ones_own(net, photos):
    def middle(trace, score):
        maps = torch.zeros_like(trace.features[:, 0])
        maps[:, 3, 3] = 1
        return maps

    (seen,) = whatwhere.explain(net, photos[0], method=middle)
    assert seen.method == "middle"
    H, W = seen.size
    assert abs((seen.box.x0 + seen.box.x1) / 2 - W / 2) <= 1
    assert abs((seen.box.y0 + seen.box.y1) / 2 - H / 2) <= 1


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("method", ["cam", "gradcam", "gradcampp", "layercam"])
def test_inside_any_context(net, photos, context, method):
    (expected,) = whatwhere.explain(net, photos[1], method=method)
    with context():
        (seen,) = whatwhere.explain(net, photos[1], method=method)
        assert seen.heat.dtype == np.float32
    assert seen.label == expected.label
    assert seen.box.iou(expected.box) > 0.9


def test_the_most_probable_are_told_apart_where_probabilities_saturate():
    labels = whatwhere.Labels.numbered(3)
    assert classes_of("top1", labels, torch.tensor([20.0, 30, 25])) == [1]
    assert classes_of("top3", labels, torch.tensor([0.0, 120, 300])) == [2, 1, 0]


def test_an_array_of_another_kind_is_its_own_error(net, photos):
    found = list(explain_each(net, [photos[0], np.zeros((4, 4)), photos[1]]))
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "image 1: an array of pixels is uint8" in str(found[1])


def test_pixels_are_ours(red):
    pixels, _ = scene(0)
    (seen,) = whatwhere.explain(red, pixels, target=1)
    pixels[:] = 0
    assert seen.pixels.any()


def test_threads_share_a_network():
    net = whatwhere.load(gap_net(), preprocess=plain((24, 40)))
    net.network.train()
    pixels = [scene(seed, (30, 50))[0] for seed in range(8)]
    before = {key: value.clone() for key, value in net.network.state_dict().items()}
    expected = [whatwhere.explain(net, one, target=1)[0].map for one in pixels]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: whatwhere.explain(net, one, target=1)[0].map, pixels * 10))
    for i, one in enumerate(found):
        np.testing.assert_allclose(one, expected[i % 8], atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in net.network.state_dict().items())
    assert all(module.training for module in net.network.modules())
