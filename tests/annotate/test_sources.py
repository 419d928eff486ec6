"""Where pictures come from, and that their list is the same whoever asks."""

import io
import os
import tarfile

import pytest
from scenes import plain

from whatwhere.annotate.listing import Listing, write_list
from whatwhere.annotate.reading import Failed, Read, Reader
from whatwhere.annotate.sources import Item, LocalFiles, digest_of, matches, source_of
from whatwhere.errors import DataError, InputError

pytest.importorskip("pyarrow")


def names(given, **options) -> list[str]:
    return [item.name for item in source_of(str(given)).items(**options)]


@pytest.fixture
def tree(tmp_path, a_png):
    root = tmp_path / "root"
    for name in ("b.png", "a/2.png", "a/1.PNG", "a/deep/er.png", "a.png", ".hidden.png", ".git/x.png", "a/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(a_png)
    return root


@pytest.fixture
def a_png():
    from corpus import image, saved

    return saved(image(), "PNG")


def archive(path, members: dict[str, bytes], **options) -> bytes:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            told = tarfile.TarInfo(name)
            told.size = len(data)
            tar.addfile(told, io.BytesIO(data))
    return path.read_bytes()


def test_a_folder_in_the_order_of_its_names(tree):
    assert names(tree) == ["a/1.PNG", "a/2.png", "a/deep/er.png", "a.png", "b.png"]
    assert names(tree, leave_out=tree / "a") == ["a.png", "b.png"]


def test_links_to_folders_are_no_way_in(tree):
    (tree / "loop").symlink_to(tree)
    assert "loop/b.png" not in names(tree)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.png", "*.png", True),
        ("a/b.png", "*.png", False),
        ("a/b.png", "**/*.png", True),
        ("b.png", "**/*.png", True),
        ("a/b/c.png", "a/**/c.png", True),
        ("a/c.png", "a/**/c.png", True),
        ("x.png", "[ab].png", False),
        ("ab.png", "a?.png", True),
    ],
)
def test_patterns_as_in_a_shell(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_a_pattern(tree):
    assert names(f"{tree}/a/*.png") == ["2.png"]
    assert names(f"{tree}/**/*er*") == ["a/deep/er.png"]
    assert source_of(f"{tree}/a/*.png").root == str(tree / "a")


def test_a_pattern_looks_into_no_folder_that_it_does_not_name(tree, monkeypatch):
    looked = []
    plainly = LocalFiles.entries
    monkeypatch.setattr(LocalFiles, "entries", lambda self, name: looked.append(name) or plainly(self, name))
    assert names(f"{tree}/*.png") == ["a.png", "b.png"]
    assert names(f"{tree}/*/deep/*.png") == ["a/deep/er.png"]
    assert looked == ["", "", "a", "a/deep"]


def test_a_folder_however_deep(tmp_path, monkeypatch):
    def entries(_, folder):
        return [("d", True)] if folder.count("/") < 1500 else [("x.png", False)]

    monkeypatch.setattr(LocalFiles, "entries", entries)
    (item,) = source_of(str(tmp_path)).items()
    assert item.name == "d/" * 1501 + "x.png"


def test_a_file_whose_name_is_a_pattern(tree, a_png):
    (tree / "x[1].png").write_bytes(a_png)
    assert names(tree / "x[1].png") == ["x[1].png"]


def test_a_list_in_its_own_order_with_any_bytes(tree):
    (tree / "list.txt").write_bytes(b"b.png\r\n\na/2.png\nb.png\n\xff.png\n" + os.fsencode(tree / "a.png"))
    assert names(tree / "list.txt") == ["b.png", "a/2.png", "b.png", "\udcff.png", str(tree / "a.png")]


def test_a_list_that_begins_with_a_mark_of_its_encoding(tree):
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfb.png\n\xef\xbb\xbfa.png\n")
    assert names(tree / "list.txt") == ["b.png", "\ufeffa.png"]


def test_a_name_that_no_file_has(tree):
    (tree / "list.txt").write_bytes(b"x\0.tar\nx\0.png\nb.png\n")
    archived, picture, other = source_of(str(tree / "list.txt")).items()
    assert "embedded null byte" in archived.error
    reader = Reader(str(tree), plain((30, 42)))
    assert [type(reader(item)) for item in (archived, picture, other)] == [Failed, Failed, Read]


def test_a_list_in_parquet(tree):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"label": [1, 2], "path": ["b.png", "a.png"]}), tree / "list.parquet")
    assert names(tree / "list.parquet") == ["b.png", "a.png"]
    pq.write_table(pa.table({"label": [1, 2], "other": ["b.png", "a.png"]}), tree / "list.parquet")
    with pytest.raises(DataError, match="wanted a column called path, got label, other"):
        names(tree / "list.parquet")
    odd = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff.png"], pa.binary()).buffers())
    pq.write_table(pa.table({"path": odd}), tree / "list.parquet")
    with pytest.raises(DataError, match="no paths can be read"):
        names(tree / "list.parquet")
    (tree / "list.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="no paths can be read"):
        names(tree / "list.parquet")


@pytest.mark.parametrize("given", ["nowhere", "", "nosuch://x/y"])
def test_what_is_not_there(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, InputError)):
        names(given)


def test_tar_shards_are_read_at_their_places(tree, a_png):
    archive(tree / "shards-0.tar", {"x/1.png": a_png, "x/1.cls": b"7", "x/2.png": a_png[:90]})
    items = [item for item in source_of(str(tree)).items() if item.shard]
    assert [item.name for item in items] == ["shards-0.tar/x/1.png", "shards-0.tar/x/2.png"]
    reader = Reader(str(tree), plain((30, 42)))
    whole, cut = (reader(item) for item in items)
    file = reader(Item("b.png"))
    assert isinstance(whole, Read)
    assert isinstance(file, Read)
    assert (whole.digest, whole.size) == (file.digest, (30, 42))
    assert (whole.resized == file.resized).all()
    assert isinstance(cut, Failed)
    assert cut.error.startswith("shards-0.tar/x/2.png: ")
    assert len(names(tree / "shards-0.tar")) == 2


@pytest.mark.parametrize("cut", [100, 600, 1000, -1025, -1200])
def test_a_damaged_shard_is_an_item_that_says_so(tmp_path, a_png, cut):
    whole = archive(tmp_path / "whole.tar", {"1.png": a_png, "2.png": a_png})
    whole = whole.rstrip(b"\0") + bytes(1024)
    (tmp_path / "whole.tar").write_bytes(whole[:cut])
    *items, last = source_of(str(tmp_path)).items()
    assert last.error.startswith("whole.tar: ")
    assert len(items) < 2 or cut < 0  # what is cut in its last bytes is found out when it is read


def test_a_shard_whose_header_says_nonsense(tmp_path):
    told = tarfile.TarInfo("a.png")
    told.size = 1024
    told.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(told, io.BytesIO(b"x" * 1024))
    (item,) = source_of(str(tmp_path)).items()
    assert item.error.startswith("x.tar: ")


def test_a_link_inside_a_shard_is_an_item_that_says_so(tmp_path, a_png):
    archive(tmp_path / "x.tar", {"a.png": a_png})
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE), ("d", tarfile.SYMTYPE)):
            told = tarfile.TarInfo(name)
            told.type, told.linkname = kind, "a.png"
            tar.addfile(told)
    first, *links = source_of(str(tmp_path)).items()
    assert not first.error
    assert [(one.name, "a link" in one.error) for one in links] == [("x.tar/b.png", True), ("x.tar/c.png", True)]


def test_a_compressed_shard_is_refused(tmp_path, a_png):
    archive(tmp_path / "x.tar", {"1.png": a_png})
    (tmp_path / "x.tar.gz").write_bytes(b"")
    (item,) = source_of(str(tmp_path / "x.tar.gz")).items()
    assert "wanted a plain .tar" in item.error or "empty" in item.error


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_store(tree, a_png, protocol):
    fsspec = pytest.importorskip("fsspec")
    archive(tree / "s.tar", {"1.png": (tree / "b.png").read_bytes()})
    (tree / "list.txt").write_text("b.png\n")
    root = f"file://{tree}" if protocol == "file" else "memory://bucket/pictures"
    if protocol == "memory":
        store = fsspec.filesystem("memory")
        for path in tree.rglob("*"):
            if path.is_file():
                store.pipe(f"/bucket/pictures/{path.relative_to(tree)}", path.read_bytes())
    assert names(root) == names(tree)
    assert names(f"{root}/a/*.png") == ["2.png"]
    assert names(f"{root}/list.txt") == ["b.png"]
    assert names(f"{root}/s.tar") == ["s.tar/1.png"]
    at_home, away = Reader(str(tree), plain((30, 42))), Reader(root, plain((30, 42)))
    for item in source_of(str(tree)).items():
        here, there = at_home(item), away(item)
        assert isinstance(here, Read)
        assert isinstance(there, Read)
        assert (here.digest, here.size) == (there.digest, there.size)
    if protocol == "memory":
        store.pipe("/top.png", a_png)
        assert names("memory://top.png") == names("memory://t*.png") == ["top.png"]
        assert names("memory://b*/pictures/a/*.png") == ["bucket/pictures/a/2.png"]
        assert "top.png" in names("memory://")
    gone = away(Item("gone.png"))
    assert isinstance(gone, Failed)
    assert gone.error.startswith("gone.png: ")


def test_a_folder_that_is_an_object_of_its_store(tree, monkeypatch):
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    store = memory()
    store.pipe("/kept/folder/a.png", b"x")
    plainly = memory.ls

    def listed(self, path, detail=True, **options):
        own = [{"name": f"{path}/", "type": "directory", "size": 0}] if path.endswith("folder") else []
        return own + plainly(self, path, detail=detail, **options)

    monkeypatch.setattr(memory, "ls", listed)
    assert list(source_of("memory://kept/folder").items()) == [Item("a.png")]
    assert list(source_of("memory://kept").items()) == [Item("folder/a.png")]


def test_a_store_that_raises_what_it_likes(monkeypatch):
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    memory().pipe("/shut/a.png", b"x")
    source = source_of("memory://shut")

    def refused(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(memory, "ls", refused)
    (item,) = source.items()
    assert item == Item(".", error="the folder cannot be listed: no credentials")
    monkeypatch.setattr(memory, "isdir", refused)
    with pytest.raises(DataError, match="memory://shut: no credentials"):
        source_of("memory://shut")


def test_the_list_comes_back_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr("whatwhere.annotate.listing.GROUP", 3)
    items = [Item(f"{i}\udcff\n.png", "s.tar" if i % 2 else "", i, 2 * i, "" if i % 5 else "odd") for i in range(29)]
    count, digest = write_list(iter(items), tmp_path, part=4)
    assert (count, digest) == (29, digest_of(items))
    listing = Listing(tmp_path, 29, 4)
    assert len(listing) == 8
    assert [one for number in range(8) for one in listing.items(number)] == list(enumerate(items))
    assert listing.items(3)[0] == (12, items[12])
    assert [listing.size_of(number) for number in range(8)] == [4] * 7 + [1]


def test_lists_that_differ_have_other_digests():
    lists = [[Item("a"), Item("b")], [Item("b"), Item("a")], [Item("ab")], [Item("a", size=1), Item("b")], []]
    assert len({digest_of(items) for items in lists}) == len(lists)


def test_a_file_that_is_written_to_while_it_is_read(tmp_path, a_png, monkeypatch):
    import whatwhere.annotate.reading as reading

    (tmp_path / "a.png").write_bytes(a_png)
    plainly = reading.photo_in

    def slowly(file, name, max_pixels):
        with (tmp_path / "a.png").open("ab") as other:
            other.write(b"more")
        return plainly(file, name, max_pixels)

    monkeypatch.setattr(reading, "photo_in", slowly)
    answer = Reader(str(tmp_path), plain((30, 42)))(Item("a.png"))
    assert isinstance(answer, Failed)
    assert answer.error == "a.png: the file was written to while it was read"
