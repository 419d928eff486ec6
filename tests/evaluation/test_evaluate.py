"""The whole evaluation: laws of addition, planted failures that it must catch, published rules on real pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import boxed_scene, plain, red_net, scene
from torch import nn

import whatwhere
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError, InputError
from whatwhere.evaluation import evaluate as room
from whatwhere.evaluation.evaluate import evaluate, evaluate_each, plan_of
from whatwhere.evaluation.run import calibrate, gathered, missing, run
from whatwhere.geometry import Box

LABELS = ["blue", "red"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red ellipses on texture, with boxes and masks; some pictures of blue without any."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    rows = ["path,class,x0,y0,x1,y1"]
    for number in range(7):
        rows.append(boxed_scene(root, f"test/red/{number}.png", number, (45, 65)))
        (root / "masks" / "test" / "red").mkdir(parents=True, exist_ok=True)
        mask = scene(number, (45, 65))[1].astype(np.uint8) * 255
        Image.fromarray(mask).save(root / "masks" / "test" / "red" / f"{number}.png")
    for number in range(2):
        (root / "test" / "blue").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, (45, 65))[0][:, :, ::-1].copy()).save(root / "test" / "blue" / f"{number}.png")
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def dataset(pictures):
    return open_dataset(pictures)


@pytest.fixture(scope="module")
def red():
    return whatwhere.load(red_net(), preprocess=plain((45, 65)), labels=LABELS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, request):
    if "imagenet_boxes" in request.fixturenames:
        return
    monkeypatch.setattr(room, "CHUNK", 4)


def test_a_network_that_knows_is_right_everywhere(red, dataset):
    found = evaluate(red, dataset, plan_of(["cam"]))
    assert found.classification["top-1"].value == 1
    assert found.classification["map-scored top-1"].value == 1
    where = found.where("cam")
    for name in ("MaxBoxAcc", "MaxBoxAccV2", "GT-known loc", "top-1 loc", "top-5 loc", "pointing"):
        assert where[name].value == 1, name
    assert where["PxAP"].value > 0.99
    assert where["pixel ROC AUC"].value > 0.99
    assert where["energy"].value > 0.95
    assert where["TPR"].value > 0.95
    assert where["FPR"].value < 0.05
    assert found.shortcuts("cam")[0].reasons == ()
    for name in ("centre Gaussian", "random map", "whole image"):
        assert found.where(name)["MaxBoxAccV2"].value < 1
        assert found.where(name)["PxAP"].value < where["PxAP"].value
    assert found.where("whole image")["pixel ROC AUC"].value == pytest.approx(0.5)


def test_only_what_has_boxes_is_boxed(red, dataset):
    found = evaluate(red, dataset, plan_of(["cam"]))
    assert found.tally["cam/boxed"][0] == 7
    assert len(found.rows) == 9
    assert found.tally["what/top-1.count"][0] == 9


@pytest.mark.parametrize("protocol", ["half-open", "wsol2020"])
@pytest.mark.parametrize("methods", [["gradcam"], ["gradcam", "eigencam"]])
def test_parts_in_any_order_make_the_whole(red, dataset, protocol, methods):
    plan = plan_of(methods, protocol, batch=3)
    whole = evaluate(red, dataset, plan)
    parts = list(evaluate_each(red, dataset, plan, chunks=[2, 0, 1]))
    again = parts[0] + parts[1] + parts[2]
    assert again.tally.same(whole.tally)
    assert again.rows == whole.rows
    assert again.chunks == whole.chunks == {0, 1, 2}
    assert ("gradcam", "eigencam") in again.agreement or len(methods) == 1
    with pytest.raises(InputError, match="the same images are in both"):
        again + parts[0]


def test_an_interrupted_run_is_taken_up(red, dataset, tmp_path):
    plan = plan_of(["gradcam"])
    started = run(red, dataset, plan, tmp_path)
    next(started)
    started.close()
    assert missing(gathered(tmp_path)) == 2
    last = list(run(red, dataset, plan, tmp_path))[-1]
    whole = evaluate(red, dataset, plan)
    assert last.tally.same(whole.tally)
    assert gathered(tmp_path).tally.same(whole.tally)
    assert gathered(tmp_path).rows == whole.rows
    with pytest.raises(InputError, match=r"differ in \['protocol'\]; use another folder"):
        list(run(red, dataset, plan_of(["gradcam"], "wsol2020"), tmp_path, (1, 1)))


def test_what_changed_is_not_taken_up(red, dataset, tmp_path):
    list(run(red, dataset, plan_of(["gradcam"]), tmp_path))
    moved = replace(dataset, samples=[*dataset.samples[:-1], replace(dataset.samples[-1], boxes={})])
    with pytest.raises(InputError, match=r"differ in \['fingerprint'\]"):
        list(run(red, moved, plan_of(["gradcam"]), tmp_path))
    other = red_net()
    with torch.no_grad():
        other[4].bias.add_(1)
    net = whatwhere.load(other, preprocess=plain((45, 65)), labels=LABELS)
    with pytest.raises(InputError, match=r"differ in \['fingerprint'\]"):
        list(run(net, dataset, plan_of(["gradcam"]), tmp_path))


def test_nothing_that_can_be_used(red, dataset, tmp_path):
    (tmp_path / "x" / "red").mkdir(parents=True)
    (tmp_path / "x" / "red" / "1.png").write_bytes(b"nothing")
    found = evaluate(red, open_dataset(tmp_path / "x"), plan_of(["cam"]))
    assert list(found.failed) == ["red/1.png"]
    assert found.classification == {}
    assert found.where("cam") == {}


def test_another_plan_in_a_finished_folder_is_refused(red, dataset, tmp_path):
    list(run(red, dataset, plan_of(["gradcam"]), tmp_path))
    with pytest.raises(InputError, match="use another folder"):
        list(run(red, dataset, plan_of(["cam"]), tmp_path))


def test_shards_make_the_whole(red, dataset, tmp_path):
    plan = plan_of(["gradcam"])
    for which in (2, 1):
        for _ in run(red, dataset, plan, tmp_path, (which, 2)):
            pass
    assert gathered(tmp_path).tally.same(evaluate(red, dataset, plan).tally)
    with pytest.raises(InputError, match="a shard is one of"):
        list(run(red, dataset, plan, tmp_path, (3, 2)))


def test_a_damaged_file_of_numbers_is_named(tmp_path):
    (tmp_path / "evaluation.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"evaluation\.npz: no tally can be read"):
        gathered(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no evaluation"):
        gathered(tmp_path / "other")


def test_bad_images_are_named_and_lose_nothing(red, dataset, tmp_path, pictures):
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "test" / "red" / "0.png").read_bytes()[:200])
    turned = replace(dataset.samples[3], size=(65, 45))
    samples = [*dataset.samples[:2], replace(dataset.samples[2], path=broken), turned, *dataset.samples[4:]]
    found = evaluate(red, replace(dataset, samples=samples), plan_of(["cam"]))
    assert sorted(found.failed) == sorted([dataset.samples[2].name, turned.name])
    assert dataset.samples[2].name in found.failed[dataset.samples[2].name]
    assert "annotations are for 45 x 65" in found.failed[turned.name]
    rest = [sample for number, sample in enumerate(dataset.samples) if number not in {2, 3}]
    alone = evaluate(red, replace(dataset, samples=rest), plan_of(["cam"]))
    assert found.tally.same(alone.tally)


def test_images_of_other_classes_are_left_out(dataset):
    net = whatwhere.load(red_net(), preprocess=plain((45, 65)), labels=["green", "red"])
    found = evaluate(net, dataset, plan_of(["cam"]))
    assert found.left_out == 2
    assert found.settings["classes"] == ["red"]
    assert found.tally["what/top-1.count"][0] == 7


def test_classes_go_by_a_mapping(dataset):
    net = whatwhere.load(red_net(), preprocess=plain((45, 65)))
    with pytest.raises(InputError, match="knows none of the classes"):
        evaluate(net, dataset, plan_of(["cam"]))
    found = evaluate(net, dataset, plan_of(["cam"], mapping={"red": 1, "blue": "class 0"}))
    assert found.classification["top-1"].value == 1


def test_wrong_plans_are_refused(red, dataset):
    with pytest.raises(InputError, match="nearest: gradcam"):
        plan_of(["gradcm"])
    with pytest.raises(InputError, match="each once"):
        plan_of(["cam", "cam"])
    with pytest.raises(InputError, match="at least 1 image"):
        plan_of(["cam"], batch=0)
    cropped = whatwhere.load(red_net(), preprocess=replace(plain((45, 45)), fit="crop"), labels=LABELS)
    with pytest.raises(InputError, match="wsol2020 is for images that are resized whole"):
        evaluate(cropped, dataset, plan_of(["cam"], "wsol2020"))


def test_an_image_with_two_classes_is_measured_for_each(red, dataset, tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[5:15, 4:14, 0] = 255
    pixels[8:12, 20:36, 2] = 255
    (tmp_path / "x" / "red").mkdir(parents=True)
    (tmp_path / "x" / "blue").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "red" / "1.png")
    Image.fromarray(pixels).save(tmp_path / "x" / "blue" / "2.png")
    (tmp_path / "x" / "boxes.csv").write_text(
        "path,class,x0,y0,x1,y1\nred/1.png,red,4,5,14,15\nred/1.png,blue,20,8,36,12\n"
    )
    found = evaluate(red, open_dataset(tmp_path / "x"), plan_of(["cam"]))
    assert [(row["name"], row["class"]) for row in found.rows] == [
        ("blue/2.png", 0),
        ("red/1.png", 0),
        ("red/1.png", 1),
    ]
    assert found.tally["cam/boxed"][0] == 2
    assert found.where("cam")["MaxBoxAcc"].value == 1


def test_a_map_of_nan_counts_as_nothing(red, dataset):
    def broken(trace, score):
        return torch.full((len(trace.images), 2, 3), float("nan"))

    found = evaluate(red, dataset, plan_of([broken]))
    assert found.where("broken")["MaxBoxAcc"].value == 0


class Watermarked(nn.Module):
    """Says red of the corner's brightness alone."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
        with torch.no_grad():
            self.features.weight.fill_(1)
            self.head[2].weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))

    def forward(self, images):
        corner = torch.zeros_like(images)
        corner[:, :, -8:, -8:] = 1
        return self.head(self.features(images * corner))


def test_a_watermark_is_found(dataset):
    net = whatwhere.load(Watermarked(), preprocess=plain((45, 65)), labels=LABELS, layer="features")
    found = evaluate(net, dataset, plan_of(["cam"]))
    first = found.shortcuts("cam")[0]
    assert found.settings["classes"][first.label] == "red"
    assert len(first.reasons) == 3
    assert first.inside == pytest.approx(0, abs=1e-6)
    assert first.border > 1.3
    assert first.sameness > 0.9
    assert found.where("cam")["MaxBoxAcc"].value < found.where("centre Gaussian")["MaxBoxAcc"].value


def test_shuffled_and_swapped_maps_fall_to_the_baselines(red, dataset):
    from whatwhere.maps import METHODS

    def swapped(trace, score):
        maps = METHODS["cam"](trace, score)
        return maps.transpose(1, 2)

    def shuffled(trace, score):
        maps = METHODS["cam"](trace, score)
        order = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(0))
        return maps.flatten(1)[:, order].reshape(maps.shape)

    found = evaluate(red, dataset, plan_of(["cam", swapped, shuffled]))
    scores = {name: found.where(name) for name in ("cam", "swapped", "shuffled", "whole image", "random map")}
    assert scores["cam"]["MaxBoxAccV2"].value == 1
    assert scores["swapped"]["MaxBoxAccV2"].value < 0.8
    assert scores["shuffled"]["PxAP"].value < scores["whole image"]["PxAP"].value + 0.1
    assert scores["shuffled"]["MaxBoxAccV2"].value <= scores["whole image"]["MaxBoxAccV2"].value + 0.05


def test_the_network_is_asked_again(red, dataset):
    part = replace(dataset, samples=dataset.samples[2:4])
    where = evaluate(red, part, plan_of(["cam"], faithful=True, baselines=False)).where("cam")
    assert where["average drop"].value < 0.05
    assert where["insertion"].value > where["deletion"].value
    assert where["ROAD least"].value > where["ROAD most"].value
    assert {"sensitivity", "CC when randomized"} <= where.keys()


def test_calibration_is_kept_with_the_classifier(photos, pictures, tmp_path):
    net, dataset = whatwhere.load(), open_dataset(photos[0].parent)
    net.trusts["cam"] = (0.0, 0.0, 0.0, 0.0, 1.0)
    found = calibrate(net, dataset, ["gradcam"])
    assert net.thresholds == found
    assert 0 <= found["gradcam"] < 1
    whatwhere.save(net, tmp_path / "run")
    again = whatwhere.load(tmp_path / "run")
    assert again.thresholds == found
    assert again.trusts == net.trusts
    (trusted,) = whatwhere.explain(again, photos[0], method="cam")
    assert trusted.trust == pytest.approx(1 / (1 + np.exp(-1)))
    assert whatwhere.load(tmp_path / "run", layer="blocks.4").thresholds == {}
    (one,) = whatwhere.explain(again, photos[0])
    assert one.threshold == found["gradcam"]
    (other,) = whatwhere.explain(again, photos[0], threshold=0.5)
    assert other.threshold == 0.5
    # what is measured afterwards is measured at it
    again.thresholds["gradcam"] = 0.9
    measured = evaluate(again, dataset, plan_of(["gradcam", "layercam"]))
    assert measured.threshold("gradcam") == 0.9
    assert measured.where("gradcam")["GT-known loc"].value < measured.where("gradcam")["MaxBoxAcc"].value
    assert measured.where("layercam")["GT-known loc"] == measured.where("layercam")["MaxBoxAcc"]
    mapping = {"red": 5, "blue": 6}
    bare = replace(open_dataset(pictures), samples=open_dataset(pictures).samples[:2])
    with pytest.raises(InputError, match="neither boxes nor masks"):
        calibrate(net, bare, ["gradcam"], mapping=mapping)
    (first, *_), corner = dataset.samples, (Box(0, 0, 1, 1),)
    hopeless = replace(dataset, samples=[replace(first, boxes=dict.fromkeys(first.labels, corner))])
    with pytest.raises(InputError, match="no map of photos has a box that fits"):
        calibrate(net, hopeless, ["gradcam"])


def test_the_published_numbers_on_real_pictures(net, imagenet_boxes):
    # an independent implementation: 63.9 (87.5, 68.3, 35.8), 68.3 and 60.3, on thresholds in steps of .02
    found = evaluate(net, open_dataset(imagenet_boxes), plan_of(["cam"]))
    assert found.classification["top-1"].value == pytest.approx(0.837, abs=0.003)
    assert found.classification["top-5"].value == pytest.approx(0.957, abs=0.003)
    where, centre = found.where("cam"), found.where("centre Gaussian")
    assert 100 * where["MaxBoxAccV2"].value == pytest.approx(63.9, abs=0.5)
    assert 100 * where["MaxBoxAcc"].value == pytest.approx(68.3, abs=0.5)
    assert 100 * centre["MaxBoxAccV2"].value == pytest.approx(60.3, abs=0.5)


def test_calibration_fits_trust_to_what_boxes_turned_out_to_be(tmp_path):
    """Boxes of half the pictures are somewhere else; what their maps look like says which."""
    net = whatwhere.load(red_net(), preprocess=plain((40, 60)), labels=["blue", "red"])
    folder = tmp_path / "red"
    folder.mkdir()
    lines = ["path,class,x0,y0,x1,y1"]
    for number in range(12):
        pixels = np.full((40, 60, 3), 20, np.uint8)
        pixels[8:20, 10:30] = (250, 10, 10)
        box = "10,8,30,20"
        if number % 2:  # faint all over
            pixels[:, :, 0] = np.linspace(20, 200, 60, dtype=np.uint8)
            box = "0,0,6,6"
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        lines.append(f"red/{number:02}.png,red,{box}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    dataset = open_dataset(tmp_path)
    said = evaluate(net, dataset, plan_of(["cam", "gradcam"], baselines=False))
    measured = {f"{method} {name}": one.value for method in said.methods for name, one in said.where(method).items()}
    net.about = {"measured": {"on": "elsewhere", "top-1": 0.5, **measured}}
    calibrate(net, dataset, ["cam"])
    seen = [whatwhere.explain(net, folder / f"{number:02}.png", target="red", method="cam")[0] for number in (0, 1)]
    assert seen[0].trust > 0.7
    assert seen[1].trust < 0.3
    # what it said before stands where it is still true
    after = evaluate(net, dataset, plan_of(["cam", "gradcam"], baselines=False))
    left = net.about["measured"]
    assert {"on", "top-1", "cam MaxBoxAcc", "gradcam mean IoU", "gradcam trust ROC AUC"} <= left.keys()
    assert not {"cam mean IoU", "cam top-1 loc", "cam trust ROC AUC"} & left.keys()
    for method in after.methods:
        for name, one in after.where(method).items():
            assert left.get(f"{method} {name}", one.value) == pytest.approx(one.value, nan_ok=True)
