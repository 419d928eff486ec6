"""Whatever is in a folder, each file has its row."""

import os
from xml.etree import ElementTree

import corpus
import pytest
from scenes import plain, red_net

import whatwhere
from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.reading import Failed, Reader
from whatwhere.annotate.run import annotate, write_formats
from whatwhere.annotate.sources import Item
from whatwhere.images import printable

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad") / "files"
    wanted = corpus.written(root)
    net = whatwhere.load(red_net(), preprocess=plain((30, 42)), labels=["blue", "red"])
    found = annotate(net, str(root), root.parent / "out", batch=8, part=32, workers=1)
    return root, wanted, found


def test_there_are_many_kinds(looked_at):
    _, wanted, _ = looked_at
    assert len(wanted) >= 60
    assert sum(not good for good in wanted.values()) >= 40


def test_every_file_has_its_rows(looked_at):
    _, wanted, found = looked_at
    pictures = {picture.path: picture for picture in found}
    assert pictures.keys() == {Item(name).path for name in wanted}
    assert {"new\nline.jpg", "\\xff\\xfe bytes.jpg", "narrow\u202fspace.jpg"} <= pictures.keys()
    for name, is_good in wanted.items():
        picture = pictures[Item(name).path]
        assert (picture.error is None) == is_good, (name, picture.error)
        if picture.error is not None:
            assert picture.error.startswith(printable(name) + ": ")
            assert "\n" not in picture.error
            assert " at 0x" not in picture.error


def test_turned_pictures_are_measured_upright(looked_at):
    _, _, found = looked_at
    sizes = {picture.path: picture.size for picture in found}
    assert sizes["turned 3.jpg"] == (30, 42)
    assert sizes["turned 6.jpg"] == sizes["turned 8.jpg"] == (42, 30)


def test_every_format_takes_what_is_left(looked_at):
    from whatwhere.annotate.formats import FORMATS

    root, _, found = looked_at
    folders = write_formats(Annotations(found.folder), list(FORMATS))
    assert all(any(folder.iterdir()) for folder in folders)
    names = {image.get("name") for image in ElementTree.parse(folders[3] / "annotations.xml").iter("image")}
    assert {"new\nline.jpg", "bell?.jpg"} <= names
    assert {path.name for path in (root.parent / "out").iterdir()} >= FORMATS.keys()


def test_what_may_not_be_read_says_so(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").chmod(0)
    answer = as_nobody(lambda: Reader(str(tmp_path), plain((4, 6)))(Item("a.jpg")), tmp_path)
    assert answer == repr(Failed("a.jpg: Permission denied"))


def test_a_folder_that_may_not_be_written_to(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").touch()
    net = whatwhere.load(red_net(), preprocess=plain((4, 6)), labels=["a", "b"])

    def tried():
        try:
            annotate(net, str(tmp_path / "in"), tmp_path / "out")
        except whatwhere.DataError as error:
            return str(error)

    assert "out: cannot be written to: Permission denied" in as_nobody(tried, tmp_path)


def as_nobody(ask, folder):
    """What a user who owns nothing is told."""
    if os.geteuid():
        return repr(ask())
    for parent in (folder, *folder.parents):  # the way there is open
        if "pytest" in str(parent):
            parent.chmod(0o755)
    read, write = os.pipe()
    if not os.fork():
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(write, repr(ask()).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.wait()
    return said
