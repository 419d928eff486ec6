"""Rows are those of ``explain``, whoever makes them; what was begun otherwise, or elsewhere, is refused."""

import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from deadly import Deadly, wrong
from PIL import Image
from scenes import deep_head_net, gap_net, plain, red_net, scene, tight

import whatwhere
from whatwhere.annotate.formats import FORMATS
from whatwhere.annotate.listing import LIST
from whatwhere.annotate.looking import Looker, Settings, digest_of_model, settings_for
from whatwhere.annotate.parts import RUN, Annotations, part_file, parts_done
from whatwhere.annotate.reading import Failed, Read, Reader
from whatwhere.annotate.run import annotate, write_formats
from whatwhere.annotate.sources import Item
from whatwhere.annotate.workers import Workers
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.files import held
from whatwhere.regions.components import components

pytest.importorskip("pyarrow")
SIZE = (24, 40)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red ellipses in pictures of several shapes, one of them twice."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        Image.fromarray(scene(i, (45 + i % 3, 65))[0]).save(root / f"{i:02}.png")
    (root / "copy.png").write_bytes((root / "03.png").read_bytes())
    return root


def red(size=SIZE):
    return whatwhere.load(red_net(), preprocess=plain(size), labels=["blue", "red"])


def rows(found: Annotations):
    return list(found.rows())


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run with 2 processes."""
    return annotate(red(), str(pictures), tmp_path_factory.mktemp("out") / "whole", batch=2, part=4, workers=2)


def test_rows_are_those_of_explain(pictures, whole):
    net = red()
    for picture in Annotations(whole.folder):
        (one,) = whatwhere.explain(net, pictures / picture.path, target="top1", method="cam")
        assert picture.size == one.size
        assert [row.box for row in picture.regions] == list(one.boxes)
        first = picture.regions[0]
        assert (first.label, first.method) == (one.label, "cam")
        assert first.probability == pytest.approx(one.probability, abs=1e-6)
        assert first.trust == pytest.approx(one.trust, abs=1e-6)
        assert (first.pixels == components(one.mask).mask(0)).all()
        assert sum(row.pixels.sum() for row in picture.regions) == one.mask.sum()


def test_a_preset_refines_with_the_pixels_that_were_read(pictures, tmp_path):
    net = red()
    found = annotate(net, str(pictures), tmp_path / "out", method="balanced", batch=2, part=4, workers=1)
    for picture in found:
        (one,) = whatwhere.explain(net, pictures / picture.path, preset="balanced")
        assert [row.box for row in picture.regions] == list(one.boxes)
        assert (picture.regions[0].pixels == components(one.mask).mask(0)).all()
        (plainly,) = whatwhere.explain(net, pictures / picture.path, method="cam", threshold=one.threshold)
        assert (one.heat != plainly.heat).any()


def test_a_red_ellipse_is_where_it_is(tmp_path):
    pixels, mask = scene(4, (90, 130))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (row,) = rows(annotate(red((90, 130)), str(tmp_path / "a.png"), tmp_path / "out", workers=1, threshold=0.5))
    assert row.label == "red"
    assert row.box.iou(tight(mask)) > 0.95
    assert (row.image, row.path, row.height, row.width) == (0, "a.png", 90, 130)
    assert len(row.sha256) == len(row.model) == 64


def test_smaller_regions_have_their_share_of_the_trust(tmp_path):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[2:12, 2:12, 0], pixels[15:20, 20:25, 0] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    large, small = rows(annotate(red(), str(tmp_path), tmp_path / "out", workers=1))
    assert small.trust == pytest.approx(large.trust / 4)
    assert (small.x0, small.y0, small.x1, small.y1) == (20, 15, 25, 20)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_nothing(pictures, whole, tmp_path, workers):
    again = annotate(red(), str(pictures), tmp_path / "out", batch=2, part=4, workers=workers)
    assert rows(again) == rows(whole)


def test_a_run_goes_on_with_the_graph_that_it_kept(pictures, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    net = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE))
    told = {"batch": 2, "part": 4, "workers": 1, "backend": "onnxruntime"}
    out, made = annotate(net, str(pictures), tmp_path / "out", **told), []
    before, graph = rows(out), out.folder / f"graph-{digest_of_model(net)[:16]}.onnx"
    assert not graph.exists()  # of a run that is whole
    Looker(net, Settings("cam", 0.25, (), 2, "onnxruntime"), "m", graph)(
        [(0, Item("0"))], [read_of(bytes_like(3, *SIZE))]
    )
    assert graph.exists()
    part_file(out.folder, 1).unlink()
    monkeypatch.setattr("whatwhere.classifiers.compiled.Graphs._exported", lambda *_: made.append(1))
    assert rows(annotate(net, str(pictures), out.folder, resume=True, **told)) == before
    assert not made
    assert not graph.exists()


def test_what_is_done_is_not_done_again(pictures, whole, tmp_path, monkeypatch):
    out, told = tmp_path / "out", []
    annotate(red(), str(pictures), out, batch=2, part=4, workers=1)
    before = part_file(out, 0).stat().st_mtime_ns
    part_file(out, 1).unlink()
    annotate(red(), str(pictures), out, batch=2, part=4, workers=1, resume=True, watch=lambda *n: told.append(n))
    assert told == [(8, 12, 0), (10, 12, 0), (12, 12, 0)]
    assert part_file(out, 0).stat().st_mtime_ns == before
    assert rows(Annotations(out)) == rows(whole)
    monkeypatch.setattr("whatwhere.annotate.run.Looker", None)  # nothing is left to look at
    annotate(red(), str(pictures), out, batch=2, part=4, workers=1, resume=True)


def test_another_run_is_refused_with_the_reason(pictures, whole, tmp_path):
    def again(net=None, source=pictures, **changed):
        options = {"batch": 2, "part": 4, "workers": 1, "resume": True} | changed
        annotate(net or red(), str(source), whole.folder, **options)

    with pytest.raises(InputError, match="holds annotations already; --resume goes on"):
        again(resume=False)
    other = red()
    with torch.no_grad():
        other.network[4].bias.add_(1)
    with pytest.raises(InputError, match=r"model Sequential \(\w{12}\) then, Sequential \(\w{12}\) now"):
        again(other)
    with pytest.raises(InputError, match="method cam then, eigencam now"):
        again(method="eigencam")
    with pytest.raises(InputError, match=r"threshold 0\.25 then, otsu now; use another folder"):
        again(threshold="otsu")
    with pytest.raises(InputError, match="batch 2 then, 4 now"):
        again(batch=4)
    with pytest.raises(InputError, match=r"source list 12 images \(\w+\) then, 1 images"):
        again(source=pictures / "00.png")
    more = tmp_path / "more"
    more.mkdir()
    for file in pictures.iterdir():
        (more / file.name).symlink_to(file)
    again(source=more)  # the same names, elsewhere
    (more / "05.png").rename(more / "05b.png")
    with pytest.raises(InputError, match="source list 12 images"):
        again(source=more)


def test_two_at_once_in_one_folder(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="another process is at work"):
        annotate(red(), str(pictures), tmp_path / "out")


def test_no_other_run_tidies_up_while_formats_are_written(whole, monkeypatch):
    def written(found, folder):
        with pytest.raises(InputError, match="another process is at work"):
            annotate(red(), found.told.root, found.folder, batch=2, part=4, workers=1, resume=True)
        (folder / "done").touch()

    monkeypatch.setitem(FORMATS, "csv", written)
    (folder,) = write_formats(whole, ["csv"])
    assert [one.name for one in folder.iterdir()] == ["done"]
    shutil.rmtree(folder)


def test_the_source_is_no_folder_to_write_to(pictures):
    for source in (pictures, pictures / "*.png"):
        with pytest.raises(InputError, match="taken for the source's"):
            annotate(red(), str(source), pictures)
    assert not (pictures / ".lock").exists()


def test_a_full_disk_is_said_and_gone_on_from(pictures, whole, tmp_path):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    annotate(red(), str(pictures), out, batch=2, part=4, workers=1)
    room = part_file(out, 1).stat().st_size - 1
    for number in (1, 2):
        part_file(out, number).unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match="cannot be written to: File too large; what is there is whole, and --re"):
            annotate(red(), str(pictures), out, batch=2, part=4, workers=1, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 1 not in parts_done(out)
    annotate(red(), str(pictures), out, batch=2, part=4, workers=1, resume=True)
    assert rows(Annotations(out)) == rows(whole)
    assert not list((out / "parts").glob(".*"))


def test_a_source_that_changes_after_it_was_listed(pictures, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (root / name).write_bytes((pictures / "00.png").read_bytes())
    (root / "d.txt").touch()

    def gone(done, total, failed):
        (root / "b.png").unlink(missing_ok=True)
        (root / "z.png").touch()

    found = annotate(red(), str(root), out, batch=1, part=1, workers=1, watch=gone)
    assert [(row.path, row.error) for row in found.rows()] == [
        ("a.png", None),
        ("b.png", "b.png: No such file or directory"),
        ("c.png", None),
    ]


def test_nothing_in_it(tmp_path):
    (tmp_path / "a.txt.gz").touch()
    with pytest.raises(DataError, match="no pictures in it"):
        annotate(red(), str(tmp_path), tmp_path / "out")


def test_what_is_in_the_way_of_the_run_is_not_looked_at(pictures, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes((pictures / "00.png").read_bytes())
    for _ in range(2):
        found = annotate(red(), str(root), root / "out", workers=1, resume=True)
        (root / "out" / "contact.jpg").touch()
    assert [row.path for row in found.rows()] == ["a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "camm"}, "nearest: cam"),
        ({"classes": ["blu"]}, "nearest: blue"),
        ({"backend": "tpu"}, "got 'tpu'"),
        ({"engine": "spark"}, "got 'spark'"),
        ({"batch": 3, "part": 8}, "a whole number of batches of 3, got 8"),
        ({"threshold": 2}, "threshold"),
        ({"workers": 0}, "at least 1 process"),
    ],
)
def test_wrong_words(pictures, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        annotate(red(), str(pictures), tmp_path / "out", **options)


def test_the_method_is_the_plain_one_where_it_is_exact():
    linear = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE))
    deep = whatwhere.load(deep_head_net(), preprocess=plain(SIZE))
    assert settings_for(linear).method == "cam"
    assert settings_for(deep).method == "gradcam"
    linear.thresholds["gradcam"] = 0.4  # of the same map
    assert settings_for(linear).threshold == 0.4
    linear.thresholds["cam"] = 0.3
    assert settings_for(linear).threshold == 0.3


def read_of(image):
    """What a reader answers for a picture that is this input."""
    return Read("0", (30, 50), (image * 255).round().byte().permute(1, 2, 0).numpy())


def bytes_like(*shape):
    """Inputs that bytes can be."""
    return torch.randint(0, 256, shape) / 255


def look(net, images, classes=(), **settings):
    told = {"method": "cam", "threshold": 0.25, "classes": tuple(classes), "batch": 4, "backend": "torch"} | settings
    items = [(i, Item(f"{i}")) for i in range(len(images))]
    answers = [read_of(image) for image in images]
    return Looker(net, Settings(**told), "m")(items, answers)


def test_boxes_are_trusted_as_the_model_was_calibrated(pictures):
    net = red()
    net.thresholds, net.trusts = {"gradcam": 0.7}, {"gradcam": (0.0, 0.0, 0.0, 0.0, 1.0)}
    settings = settings_for(net)
    assert (settings.method, settings.threshold, settings.trust) == ("cam", 0.7, net.trusts["gradcam"])
    read = Reader(str(pictures), net.preprocess, 10**6)(Item("00.png"))
    (row, *_) = Looker(net, settings, "x")([(0, Item("00.png"))], [read])
    assert row.trust == pytest.approx(1 / (1 + np.exp(-1)))
    assert list(net.trusts) == ["gradcam"]
    assert settings_for(net, method="cam").trust is None
    net.thresholds["cam"] = 0.6  # of its own
    assert settings_for(net).trust is None


def test_classes_that_are_asked_for():
    net = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE), labels=list("abcde"))
    images = bytes_like(4, 3, *SIZE)
    logits = net.logits(images)
    firsts = {row.image: row.class_index for row in look(net, images)}
    assert list(firsts.values()) == logits.argmax(1).tolist()
    some = {row.image: row.class_index for row in look(net, images, [1, 4])}
    assert list(some.values()) == [(1, 4)[i] for i in logits[:, [1, 4]].argmax(1).tolist()]
    several = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE), activation="sigmoid")
    found = {(row.image, row.class_index) for row in look(several, images)}
    expected = {(i, k) for i in range(4) for k in range(5) if logits[i, k] >= 0} | {
        (i, int(k)) for i, k in enumerate(logits.argmax(1))
    }
    assert found == expected


def test_a_picture_that_the_network_gives_nan_for_is_alone_at_fault():
    network = red_net()
    with torch.no_grad():
        network[0].weight.mul_(1e38)
    net = whatwhere.load(network, preprocess=plain(SIZE), labels=["blue", "red"])
    images = torch.zeros(3, 3, *SIZE)
    images[1, 0] = 1
    found = look(net, images)
    assert [row.error is None for row in found] == [True, False, True]
    assert "gives nan" in found[1].error


def test_another_engine_gives_the_same():
    backend = "onnxruntime"
    pytest.importorskip(backend)
    net = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE))
    images = bytes_like(3, 3, *SIZE)
    plainly, compiled = look(net, images), look(net, images, backend=backend)
    assert [(row.image, row.label) for row in plainly] == [(row.image, row.label) for row in compiled]
    assert [row.probability for row in plainly] == pytest.approx([row.probability for row in compiled], abs=1e-5)
    with pytest.raises(UnsupportedError, match=r"\.eager"):
        look(net, images, backend=backend, method="layercam")


def test_the_digest_is_of_what_decides():
    digests = {
        digest_of_model(red()),
        digest_of_model(red((24, 41))),
        digest_of_model(whatwhere.load(red_net(), preprocess=plain(SIZE), labels=["blue", "green"])),
        digest_of_model(whatwhere.load(red_net(), preprocess=plain(SIZE), labels=["blue", "red"], layer="0")),
        digest_of_model(whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE))),
    }
    assert len(digests) == 5
    assert digest_of_model(red()) == digest_of_model(red())


def test_a_process_that_dies_is_replaced_and_the_guilty_file_found(tmp_path, pictures):
    names = [f"{i:02}.png" for i in range(11)]
    for name in names:
        (tmp_path / name).symlink_to(pictures / name)
    deadly = [Item("deadly.png"), Item("unlucky.png")]
    (tmp_path / "unlucky.png").symlink_to(pictures / "00.png")
    items = [Item(name) for name in names]
    batches = [items[:4], [*items[4:6], deadly[0], items[6]], [deadly[1], *items[7:9]], items[9:]]
    with Workers(Deadly(str(tmp_path), plain(SIZE)), 2) as pool:
        answers = list(pool.answers(batches))
        deaths = pool.deaths
    assert [len(several) for several in answers] == [4, 4, 3, 2]
    flat = [answer for several in answers for answer in several]
    failed = [answer.error for answer in flat if isinstance(answer, Failed)]
    assert failed == ["deadly.png: reading it ends the process: SIGKILL"]
    # of the deadly batch: whole, whole again, one half, the file; of the unlucky one: once
    assert deaths == 5
    inputs = [answer.resized for answer in flat if isinstance(answer, Read)]
    reader = Reader(str(tmp_path), plain(SIZE))
    wanted = [reader(item) for batch in batches for item in batch if item not in deadly[:1]]
    assert all((one == other.resized).all() for one, other in zip(inputs, wanted, strict=True))


def test_a_process_that_hangs_is_given_up(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("whatwhere.annotate.workers.PATIENCE", 1.5)
    (tmp_path / "a.png").symlink_to(pictures / "00.png")
    with Workers(Deadly(str(tmp_path), plain(SIZE)), 1) as pool:
        ((hung,),) = pool.answers([[Item("stops.png")]])
        monkeypatch.setattr("whatwhere.annotate.workers.PATIENCE", 300)
        ((good,),) = pool.answers([[Item("a.png")]])
    assert "SIGKILL" in hung.error
    assert isinstance(good, Read)


def test_what_is_no_files_fault_is_raised():
    with Workers(wrong, 1) as pool, pytest.raises(InputError, match="a setting is wrong"):
        list(pool.answers([[Item("a.png")]]))


def test_the_folder_is_readable_by_others(whole):
    import pyarrow.parquet as pq

    table = pq.read_table(whole.folder / "parts")
    assert table.num_rows == len(rows(whole))
    assert {RUN, LIST} <= {path.name for path in whole.folder.iterdir()}
    damaged = part_file(whole.folder, 7)
    damaged.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-000007.parquet: cannot be read.*remove it"):
        rows(whole)
    damaged.unlink()
    with pytest.raises(DataError, match="holds no annotations"):
        Annotations(Path(whole.folder, "parts"))


def test_threads_look_at_once_with_a_network_each():
    net = whatwhere.load(gap_net(SIZE), preprocess=plain(SIZE))
    looker, images = Looker(net, Settings("gradcam", 0.25, (), 4, "torch"), "m"), bytes_like(4, 3, *SIZE)
    items, answers = [(0, Item("0"))], [read_of(images[0])]
    assert looker.is_many
    with ThreadPoolExecutor(2) as pool:
        barrier = Barrier(2)
        nets = list(pool.map(lambda _: (barrier.wait(), looker.net)[1], range(2)))
        rows = list(pool.map(lambda _: looker(items, answers), range(8)))
    assert nets[0].network is not nets[1].network is not net.network
    assert all(one == rows[0] for one in rows)
