"""Labels to doubt, copies and groups: by hand on small arrays, on changed photographs, and as a command."""

import base64
import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import tailed
from torch import nn
from typer.testing import CliRunner

from whatwhere.apps.cli import app
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.labels import Labels
from whatwhere.curation.doubts import Doubts, doubted
from whatwhere.curation.duplicates import Pair, duplicates, originals
from whatwhere.curation.groups import find_groups
from whatwhere.curation.kinds import distances, grouped, seeded
from whatwhere.curation.pooled import pooled
from whatwhere.datasets import open_dataset, open_splits
from whatwhere.errors import DataError, InputError, MissingExtraError
from whatwhere.images import Preprocess
from whatwhere.reports.groups import rows_of, write_groups

RED, TEAL, BLACK = (255, 0, 0), (0, 51, 102), (0, 0, 0)


def painted(path, left, right, size=(8, 12)):
    """A picture of two colours, the left one on a third of it."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 3], pixels[:, size[1] // 3 :] = left, right
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def channels(names=("red", "green", "blue"), preprocess=None):
    """A classifier whose features are the image and whose logits are the means of its channels."""
    net = tailed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, (4, 6))
    return HookedClassifier(net.network, Labels(names), preprocess or net.preprocess, "channels", layer="features")


def test_features_are_pooled_where_the_class_is(tmp_path):
    painted(tmp_path / "red/a.png", RED, TEAL)
    painted(tmp_path / "blue/b.png", RED, TEAL)
    found = pooled(channels(), open_dataset(tmp_path))
    assert found.classes == ("blue", "red")
    assert found.unknown == ()
    # the map of a class is its channel: red is on the left third alone, blue on the rest
    assert found.where == pytest.approx(np.array([[0, 0.2, 0.4], [1, 0, 0]]))
    assert found.whole == pytest.approx(np.array([[1, 0.4, 0.8]] * 2) / 3)
    assert [box.to_list() for box in found.boxes] == [[4, 0, 12, 8], [0, 0, 4, 8]]
    assert found.small.shape == (2, 64, 64)
    assert found.digests[0] == found.digests[1]


def test_of_classes_that_the_model_does_not_have_the_map_is_of_its_first(tmp_path):
    painted(tmp_path / "red/a.png", RED, TEAL)
    painted(tmp_path / "cat/b.png", RED, TEAL)  # red is 1/3 of it, blue 0.8/3
    painted(tmp_path / "cat/c.png", BLACK, TEAL)
    found = pooled(channels(), open_dataset(tmp_path))
    assert found.unknown == ("cat",)
    assert found.where == pytest.approx(np.array([[1, 0, 0], [0, 0.2, 0.4], [1, 0, 0]]))
    told = pooled(channels(), open_dataset(tmp_path), mapping={"cat": "green"})
    assert told.unknown == ()
    assert told.where[0] == pytest.approx([0, 0.2, 0.4])
    with pytest.raises(InputError, match="no class 'dog'"):
        pooled(channels(), open_dataset(tmp_path), mapping={"dog": 1})


def test_a_map_of_nothing_weighs_all_alike_and_padding_does_not_count(tmp_path):
    painted(tmp_path / "red/a.png", BLACK, TEAL)
    found = pooled(channels(), open_dataset(tmp_path))
    assert found.where == pytest.approx(found.whole)
    assert found.boxes == (None,)
    painted(tmp_path / "red/a.png", RED, TEAL, size=(8, 24))
    boxed = Preprocess((6, 6), (0.5,) * 3, (1.0,) * 3, "nearest", "letterbox")  # 2 x 6 of 6 x 6 are picture
    found = pooled(channels(preprocess=boxed), open_dataset(tmp_path))
    assert found.whole[0] + 0.5 == pytest.approx(np.array([1, 0.4, 0.8]) / 3)
    assert found.where[0] + 0.5 == pytest.approx([1, 0, 0])


def test_a_picture_of_two_classes_is_two_entries(tmp_path):
    painted(tmp_path / "a.png", RED, TEAL)
    painted(tmp_path / "red/b.png", RED, TEAL)
    (tmp_path / "boxes.csv").write_text("path,class,x0,y0,x1,y1\na.png,red,0,0,4,8\na.png,blue,4,0,12,8\n")
    found = pooled(channels(), open_dataset(tmp_path))
    assert len(found.samples) == 2
    assert sorted(zip(found.pictures, found.labels, strict=True)) == [(0, 0), (0, 1), (1, 1)]
    for label, where in zip(found.labels, found.where, strict=True):
        assert where == pytest.approx([[0, 0.2, 0.4], [1, 0, 0]][label])
    whole = find_groups(channels(), open_dataset(tmp_path))
    assert np.isnan(whole.doubts.doubt).all()  # there is one class of pictures that show one
    assert len(list(rows_of(whole))) == 3


def test_bad_pictures_are_listed(tmp_path):
    class Odd(nn.Module):
        def forward(self, features):
            return features.mean((2, 3)) / (features[:, 1].mean((1, 2)) > 0).float()[:, None]  # red alone: 1 / 0

    net = tailed(Odd(), 3, (4, 6))
    painted(tmp_path / "x/good.png", RED, TEAL)
    painted(tmp_path / "x/odd.png", RED, RED)
    (tmp_path / "x/bad.png").write_bytes(b"no picture")
    told = []
    for batch in (1, 2, 16):
        found = pooled(net, open_dataset(tmp_path), batch=batch, seen=lambda done, total: told.append((done, total)))
        assert [sample.name for sample in found.samples] == ["x/good.png"]
        assert found.failed.keys() == {"x/bad.png", "x/odd.png"}
        assert "nan or infinite" in found.failed["x/odd.png"]
        assert told[-1] == (3, 3)
    (tmp_path / "x/good.png").unlink()
    with pytest.raises(DataError, match=r"no picture can be used: .*bad.png"):
        pooled(net, open_dataset(tmp_path))


def blobs(*sizes, width=40, seed=0, spread=0.1):
    """Points around one random direction each."""
    draw = np.random.default_rng(seed)
    middles = draw.normal(size=(len(sizes), width))
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    noise = draw.normal(size=(sum(sizes), width)) * spread / np.sqrt(width)
    return (np.repeat(middles, sizes, 0) + noise).astype(np.float32), np.repeat(np.arange(len(sizes)), sizes)


def test_a_wrong_label_on_the_far_side_is_doubted_most():
    vectors, truth = blobs(12, 12, 3)
    labels = truth.copy()
    labels[[2, 20]] = 1, 2
    found = doubted(vectors, labels, np.arange(27))
    assert set(found.ranked()[:2]) == {2, 20}
    assert found.likelier.tolist() == truth.tolist()
    assert found.doubt[[2, 20]].min() > 0.5 > np.delete(found.doubt, [2, 20]).max()
    again = doubted(vectors, labels, np.arange(27))
    assert np.array_equal(found.doubt, again.doubt)
    # it is the direction that counts
    assert doubted(vectors * 50, labels, np.arange(27)).doubt == pytest.approx(found.doubt, abs=1e-3)


def test_copies_do_not_vouch_for_one_another():
    vectors, labels = blobs(10, 10, spread=1.5)
    vectors = np.concatenate([vectors, vectors[:1]])
    labels = np.append(labels, 1)
    labels[0] = 1
    apart, together = (
        doubted(vectors, labels, copies).doubt for copies in (np.arange(21), np.append(np.arange(20), 0))
    )
    assert together[[0, 20]].min() > 0.5
    assert together[[0, 20]].min() > apart[[0, 20]].max() + 0.2


def test_what_cannot_be_judged_is_said_so():
    vectors, labels = blobs(6, 6, 1, 2)
    copies = np.append(np.arange(13), [13, 13])  # the last class is one picture twice
    found = doubted(vectors, labels, copies)
    assert np.isnan(found.doubt).tolist() == [False] * 12 + [True] * 3
    assert found.likelier[12:].tolist() == [-1] * 3
    assert found.ranked()[12:].tolist() == [12, 13, 14]
    for few in (vectors[:6], vectors[:1], vectors[:0]):
        assert np.isnan(doubted(few, np.zeros(len(few), dtype=int), np.arange(len(few))).doubt).all()
    assert np.isnan(doubted(vectors[[0, 6]], np.array([0, 1]), np.arange(2)).doubt).all()
    pairs = doubted(vectors[[0, 1, 6, 7]], np.array([0, 0, 1, 1]), np.arange(4))
    assert pairs.likelier.tolist() == [0, 0, 1, 1]
    assert Doubts(np.array([0.2, np.nan, 0.7]), np.zeros(3, dtype=int)).ranked().tolist() == [2, 0, 1]


@pytest.mark.parametrize("by", ["kmeans", "hdbscan"])
def test_as_many_groups_as_there_are_blobs(by):
    for sizes in ((20, 12), (8, 15, 30)):
        vectors, truth = blobs(*sizes)
        found = grouped(vectors * np.linspace(1, 9, len(vectors))[:, None], by=by)
        assert found.group.tolist() == (len(sizes) - 1 - truth if sizes[0] == 8 else truth).tolist()
        assert found.silhouette > 0.7
    for one in (blobs(40, spread=1)[0], np.ones((9, 4), np.float32), blobs(1)[0], blobs(2)[0], blobs(5)[0]):
        found = grouped(one, by=by)
        assert found.group.tolist() == [0] * len(one)
        assert np.isnan(found.silhouette)


def test_one_picture_is_no_group():
    vectors, truth = blobs(20, 12, 1)
    assert grouped(vectors).group.tolist() == np.where(truth == 2, -1, truth).tolist()


def test_hdbscan_leaves_out_what_is_scattered():
    draw = np.random.default_rng(0)
    heaps = np.array([[1.0, 0, 0], [0, 1, 0]]).repeat([20, 12], 0) + draw.normal(size=(32, 3)) * 0.02
    found = grouped(np.concatenate([heaps, draw.normal(size=(15, 3))]), by="hdbscan").group
    assert found[:32].tolist() == [0] * 20 + [1] * 12
    assert (found[32:] < 0).any()


def test_seeds_pull_the_groups():
    # four heaps at the corners of an upright rectangle, on a far plane: left and right are a little farther apart
    draw = np.random.default_rng(0)
    corners = np.array([[0.11, 0.1], [0.11, -0.1], [-0.11, 0.1], [-0.11, -0.1]]).repeat(10, 0)
    vectors = np.column_stack([corners + draw.normal(size=(40, 2)) * 0.005, np.ones(40)])
    upper = corners[:, 1] > 0
    seeds = np.full(40, -1)
    seeds[[0, 20]], seeds[[10, 30]] = 0, 1
    assert seeded(vectors, seeds).group.tolist() == (~upper).astype(int).tolist()
    sides = np.full(40, -1)
    sides[0], sides[39] = 1, 0
    assert seeded(vectors, sides).group.tolist() == (corners[:, 0] > 0).astype(int).tolist()
    assert len(set(grouped(vectors).group.tolist())) == 4
    same = seeded(np.ones((4, 3)), np.array([0, -1, 1, -1]))
    assert len(same.group) == 4
    assert seeded(vectors, np.zeros(40, dtype=int)).group.tolist() == [0] * 40


def test_distances_by_hand():
    vectors = np.array([[2.0, 0], [3, 0], [0, 1], [0, 4], [1, 1], [-1, 0]])
    distance, outlier = distances(vectors, np.array([0, 0, 1, 1, -1, -1]))
    assert distance == pytest.approx([0, 0, 0, 0, 1 - 0.5**0.5, 1])
    assert outlier.tolist() == [False] * 4 + [True] * 2
    angles = np.deg2rad([-3, -2, -1, 0, 1, 2, 3, 40])
    distance, outlier = distances(np.column_stack([np.cos(angles), np.sin(angles)]), np.zeros(8, dtype=int))
    assert outlier.tolist() == [False] * 7 + [True]
    assert distance.argmax() == 7


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


CHANGES = {
    "again": lambda image: image,
    "quality": compressed,
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((0, image.height // 20, image.width - image.width // 20, image.height)),
    "dark": lambda image: image.point(lambda value: value // 2),
}


@pytest.fixture(scope="module")
def copied(net, photos, tmp_path_factory):
    """The three photographs and changed copies of them, some in another split or class; and two that are blank."""
    root = tmp_path_factory.mktemp("copied")
    for number, photo in enumerate(photos):
        image = Image.open(photo).convert("RGB")
        image.thumbnail((240, 240))
        places = [root / "train/thing" / f"{photo.stem}.png"]
        places += [root / ("train", "test")[i % 2] / ("thing", "other")[number % 2] / f"{photo.stem}-{name}.png"
                   for i, name in enumerate(CHANGES)]  # fmt: skip
        for place, change in zip(places, [lambda one: one, *CHANGES.values()], strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            change(image).save(place)
    for name, size in (("blank", (40, 60)), ("empty", (60, 40))):
        Image.new("RGB", size, "white").save(root / "train/thing" / f"{name}.png")
    return find_groups(net, open_splits(root))


def test_copies_are_found_and_nothing_else(copied):
    pairs = copied.pairs
    names = [Path(sample.name).stem for sample in copied.pooled.samples]
    first = originals(len(names), pairs)
    for name, one in zip(names, first, strict=True):
        assert names[one].partition("-")[0] == name.partition("-")[0]
    assert len(set(first.tolist())) == 3 + 2  # blank ones are nobody's copy
    assert {frozenset((names[pair.first], names[pair.second])) for pair in pairs if pair.identical} == {
        frozenset((name, f"{name}-again")) for name in ("chelsea", "coffee", "rocket")
    }
    turned = {name for pair in pairs if pair.mirrored for name in (names[pair.first], names[pair.second])}
    assert {f"{name}-mirrored" for name in ("chelsea", "coffee", "rocket")} <= turned
    assert all(0.97 <= pair.correlation <= 1.0001 and pair.first < pair.second for pair in pairs)


def test_few_or_blank_pictures_are_no_copies():
    small = np.zeros((3, 64, 64), np.uint8)
    assert duplicates(np.ones((3, 4), np.float32), small, ["a", "b", "c"]) == []
    assert duplicates(np.ones((3, 4), np.float32), small, ["a", "b", "a"]) == [Pair(0, 2, 1.0, False, True)]
    assert duplicates(np.ones((1, 4), np.float32), small[:1], ["a"]) == []
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64)).astype(np.uint8)
    assert duplicates(np.eye(2, dtype=np.float32), noise, ["a", "b"]) == []


def test_copies_of_copies_are_of_the_first():
    pairs = [Pair(one, other, 1.0, mirrored=False, identical=False) for one, other in ((3, 4), (1, 3), (0, 5))]
    assert originals(6, pairs).tolist() == [0, 1, 2, 1, 1, 0]


@pytest.fixture
def coloured(tmp_path):
    """Twelve red and twelve teal pictures in two classes, one in the wrong one; a class of one; one unreadable."""
    draw = np.random.default_rng(1)
    root = tmp_path / "data"
    for name, colour in (("red", RED), ("teal", TEAL)):
        for number in range(12):
            place = root / ("teal" if (name, number) == ("red", 7) else name) / f"{name}-{number:02}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array(colour) + draw.normal(0, 12, (16, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)
    painted(root / "alone/one.png", RED, TEAL)
    (root / "red/bad.png").write_bytes(b"no picture")
    return root


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_found_is_the_same_again_and_for_any_batch(coloured, tmp_path):
    several = [find_groups(channels(), open_splits(coloured), batch=batch) for batch in (16, 16, 5)]
    tables = [list(rows_of(found)) for found in several]
    assert tables[0] == tables[1]
    for one, other in zip(tables[0], tables[2], strict=True):
        assert {key: one[key] for key in ("path", "likelier", "group")} == {
            key: other[key] for key in ("path", "likelier", "group")
        }
    assert min(several[0].doubts.doubt[several[0].doubts.ranked()[:1]]) > 0.5
    named = several[0].pooled.samples[several[0].pooled.pictures[several[0].doubts.ranked()[0]]].name
    assert named == "teal/red-07.png"


def test_the_command_writes_a_page_and_a_table(coloured, tmp_path):
    (tmp_path / "seeds.csv").write_text("path,group\nred/red-00.png,plain\nred/red-01.png,odd\n")
    out = tmp_path / "out"
    words = [
        "groups",
        "efficientnet-lite0",
        coloured,
        "--out",
        out,
        "--seeds",
        tmp_path / "seeds.csv",
        "--method",
        "hirescam",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 1, done.output
    assert "red/bad.png" in done.stderr
    table = rows(out / "groups.csv")
    assert list(table[0]) == [
        "path", "split", "label", "likelier", "doubt", "rank", "group", "distance", "outlier", "duplicate_of",
    ]  # fmt: skip
    assert len(table) == 25
    by_name = {row["path"]: row for row in table}
    assert by_name["alone/one.png"]["rank"] == by_name["alone/one.png"]["doubt"] == ""
    assert sorted(int(row["rank"]) for row in table if row["rank"]) == list(range(1, 25))
    wrong = by_name["teal/red-07.png"]
    assert (wrong["label"], wrong["likelier"], wrong["rank"]) == ("teal", "red", "1")
    assert {row["group"] for row in table if row["label"] == "red"} <= {"plain", "odd"}
    assert done.stdout.splitlines()[1].split()[:3] == ["teal/red-07.png", "teal", "red"]
    page = (out / "index.html").read_text()
    assert "teal, or <b>red</b>?" in page
    assert "red/bad.png" in page
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(addresses) >= 15
    assert max(Image.open(io.BytesIO(base64.b64decode(one))).size[0] for one in addresses) <= 112
    assert "http" not in page


def test_copies_are_on_the_page(copied, tmp_path):
    page = write_groups(copied, tmp_path, model="a <b>", data="c")
    text = page.read_text()
    assert "different labels" in text
    assert "in different splits" in text
    assert "identical" in text
    assert "a &lt;b&gt;" in text
    of = {row["path"]: row["duplicate_of"] for row in rows(tmp_path / "groups.csv")}
    assert of["test/thing/chelsea-quality.png"] == "train/thing/chelsea-again.png"
    assert of["train/thing/blank.png"] == ""


def test_a_page_does_not_grow_without_bound(coloured, tmp_path, monkeypatch):
    found = find_groups(channels(), open_splits(coloured))
    for name, value in (("THUMBNAILS", 6), ("DOUBTED", 0)):
        monkeypatch.setattr(f"whatwhere.reports.groups.{name}", value)
    text = write_groups(found, tmp_path, model="m", data="d").read_text()
    assert text.count("<img") <= 6
    assert re.search(r"\d classes are not here, for want of room", text)
    assert len(rows(tmp_path / "groups.csv")) == 25


def test_wrong_words_to_groups(coloured, tmp_path):
    (tmp_path / "seeds.csv").write_text("path,group\nred/red-99.png,plain\n")
    (tmp_path / "short.csv").write_text("path,group\nred\n")
    cases = [
        (["--by", "kmean"], "kmeans or hdbscan", 2),
        (["--seeds", tmp_path / "seeds.csv"], "nearest: red/red-09.png", 2),
        (["--seeds", tmp_path / "seeds.csv", "--by", "hdbscan"], "seeds are for kmeans", 2),
        (["--seeds", tmp_path / "short.csv"], "row 2: wanted two columns", 1),
        (["--split", "tset"], "no split 'tset'", 2),
        (["--method", "gradcan"], "nearest: gradcam", 2),
    ]
    for words, message, code in cases:
        words = ["groups", "efficientnet-lite0", coloured, "--out", tmp_path / "out", *words]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, done.output
        assert message in " ".join(done.stderr.split())


def test_without_scikit_learn_it_says_what_to_install(coloured, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"sklearn; run: pip install 'whatwhere\[classic\]'"):
        find_groups(channels(), open_splits(coloured))
