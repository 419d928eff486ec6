"""Where pictures come from: a folder, a glob, a list of paths, a store, tar shards -> items, one after another.

The order is that of the names, or of the list. No more is held at once than the names in one folder.
"""

import codecs
import fnmatch
import hashlib
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from whatwhere.errors import DataError, InputError, WhatWhereError, extra
from whatwhere.images import image_suffixes, printable

_MAGIC = re.compile(r"[*?\[]")
_LISTS = {".txt", ".lst", ".parquet"}
BLOCK = 512
"""Bytes that a tar archive counts in."""


@dataclass(frozen=True)
class Item:
    """A picture of a source; names may hold bytes that are no UTF-8, as surrogates.

    Attributes:
        name: under the source's root; of a tar shard's member, the shard's name and the member's.
        shard: the archive that holds it, under the root; empty where it is a file of its own.
        offset: of its first byte in the shard.
        size: its bytes in the shard.
        error: why it could not even be listed, or empty.
    """

    name: str
    shard: str = ""
    offset: int = 0
    size: int = 0
    error: str = ""

    @property
    def path(self) -> str:
        r"""The name as text, with bytes that are no UTF-8 written as \xff."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")

    def told(self) -> bytes:
        """All of it, as bytes that no other item has."""
        words = [self.name, self.shard, str(self.offset), str(self.size), self.error]
        return b"\0".join(os.fsencode(word.replace("\0", "\\0")) for word in words) + b"\n"


@dataclass(frozen=True)
class Source:
    """What was named on the command line, made out.

    Attributes:
        root: the folder, or the address in a store, under which the names are.
        kind: "folder", "glob", "list" or "file".
        given: what lies under the root: a pattern, a list or a file; empty for a folder.
    """

    root: str
    kind: str
    given: str = ""

    def items(self, leave_out: Path | None = None) -> Iterator[Item]:
        """The pictures, always in the same order.

        Args:
            leave_out: a folder that is not looked into: what we write ourselves.

        Raises:
            DataError: a list cannot be read.
        """
        files = files_under(self.root)
        if self.kind == "list":
            names: Iterable[str | Item] = _listed(files, self.given)
        elif self.kind == "file":
            names = [self.given]
        else:
            names = _walked(files, self.given, os.path.realpath(leave_out) if leave_out else "")
        for name in names:
            if isinstance(name, Item):
                yield name
            elif name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
                yield from _members(files, name)
            else:
                yield Item(name)


def source_of(given: str) -> Source:
    """Make out what a source is.

    Args:
        given: a folder, a pattern with * ? [], a picture, a .tar, a list (.txt, .parquet), or any of these in a
            store that fsspec knows: s3://bucket/folder.

    Raises:
        InputError: an empty name.
        DataError: there is no such thing.
        MissingExtraError: a store's package is not installed.
    """
    if not given:
        raise InputError("wanted a folder, a pattern, a list or an address of pictures, got an empty name")
    store = given[: given.index("://") + 3] if "://" in given else ""
    magic = None if not store and os.path.lexists(given) else _MAGIC.search(given)
    if magic:
        fixed, slash, _ = given[len(store) : magic.start()].rpartition("/")
        root = store + fixed if store else str(Path(fixed or slash or ".").absolute())
        return Source(root, "glob", given[len(store) + len(fixed) + len(slash) :])
    path = given[len(store) :].rstrip("/") if store else str(Path(given).absolute())
    root, (parent, _, name) = store + path, path.rpartition("/")
    parent = store + parent or "/"
    try:
        if files_under(root).is_folder(""):
            return Source(root, "folder")
        is_there = files_under(parent).is_file(name)
    except WhatWhereError:
        raise
    except Exception as error:  # what stores raise is as various as they are
        raise DataError(f"{printable(given)}: {_why(error)}") from error
    if not is_there:
        raise DataError(f"{printable(given)}: no such file or folder")
    kind = "list" if posixpath.splitext(name.lower())[1] in _LISTS else "file"
    return Source(parent, kind, name)


class LocalFiles:
    """Names under a folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of that name."""
        return Path(self.path(name)).is_dir()

    def is_file(self, name: str) -> bool:
        """Whether there is anything else of that name."""
        return os.path.lexists(self.path(name))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """The names in a folder, sorted, and whether each is a folder itself; links to folders are none."""
        with os.scandir(self.path(folder)) as found:
            return sorted((one.name, one.is_dir(follow_symlinks=False)) for one in found)

    def open(self, name: str) -> BufferedReader:
        """For reading.

        Raises:
            DataError: it is a directory, a device, a socket, or empty.
            OSError: it is not there, or cannot be read.
        """
        path = Path(self.path(name))
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError("wanted an image file, this is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        if status.st_size == 0:
            raise DataError("the file is empty")
        return path.open("rb")

    def part(self, name: str, start: int, size: int) -> bytes:
        """Some bytes of a file."""
        with self.open(name) as file:
            file.seek(start)
            return file.read(size)

    def real(self, name: str) -> str:
        """Where it is, without links; empty in a store."""
        return os.path.realpath(self.path(name))

    def path(self, name: str) -> str:
        """Where it is; absolute names stay as they are."""
        return str(Path(self.root, name))


class StoredFiles:
    """Names under an address that fsspec knows."""

    def __init__(self, root: str) -> None:
        with extra("scale", f"reading {root}"):
            import fsspec
        try:
            self.files, self.root = fsspec.core.url_to_fs(root)
        except ImportError as error:
            raise DataError(f"{printable(root)}: fsspec needs a package for this store: {error}") from error
        except ValueError as error:
            raise DataError(f"{printable(root)}: {error}") from error
        self.root = self.root.rstrip("/")

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of that name."""
        return bool(self.files.isdir(self.path(name)))

    def is_file(self, name: str) -> bool:
        """Whether there is anything else of that name."""
        return bool(self.files.isfile(self.path(name)))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """The names in a folder, sorted, and whether each is a folder itself; links to folders are none."""
        path = self.path(folder)
        found = self.files.ls(path, detail=True)
        self.files.invalidate_cache(path)  # what has been walked through is not kept
        own = path.strip("/")  # a folder may be an object itself, of no bytes
        names = ((one["name"].strip("/"), one["type"] == "directory") for one in found)
        named = ((name.rpartition("/")[2], is_folder) for name, is_folder in names if name != own)
        return sorted(one for one in named if one[0])

    def open(self, name: str) -> Any:
        """For reading: what fsspec gives is a binary file in all but its type."""
        return self.files.open(self.path(name), "rb")

    def part(self, name: str, start: int, size: int) -> bytes:
        """Some bytes of a file."""
        data: bytes = self.files.cat_file(self.path(name), start=start, end=start + size)
        return data

    def real(self, name: str) -> str:
        """Where it is, without links; empty in a store."""
        return ""

    def path(self, name: str) -> str:
        """Where it is in the store; whole addresses stay as they are."""
        if "://" in name:
            return str(self.files._strip_protocol(name))
        return f"{self.root}/{name}" if name else self.root


Files = LocalFiles | StoredFiles


def files_under(root: str) -> Files:
    """The files under a folder, or under an address."""
    return StoredFiles(root) if "://" in root else LocalFiles(root)


def _walked(files: Files, pattern: str, leave_out: str) -> Iterator[str | Item]:
    """What a folder holds, in the order of names, folders among them where theirs fall; without hidden ones."""
    suffixes, wanted = image_suffixes() | {".tar"}, pattern.split("/")
    waiting = [("", True)]  # the next one last
    while waiting:
        folder, is_folder = waiting.pop()
        if not is_folder:
            yield folder
            continue
        try:
            entries = files.entries(folder)
        except Exception as error:
            yield Item(folder or ".", error=f"the folder cannot be listed: {_why(error)}")
            continue
        for name, is_folder in reversed(entries):
            inner = f"{folder}/{name}" if folder else name
            if name.startswith("."):
                continue
            if is_folder:
                is_wanted = not (leave_out and files.real(inner) == leave_out)
                is_wanted = is_wanted and not (pattern and not _leads(inner.split("/"), wanted))
            elif pattern:
                is_wanted = matches(inner, pattern)
            else:
                is_wanted = posixpath.splitext(name)[1].lower() in suffixes
            if is_wanted:
                waiting.append((inner, is_folder))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def matches(name: str, pattern: str) -> bool:
    """As in a shell: * and ? stop at a slash, ** does not."""
    return _pattern(name.split("/"), pattern.split("/"))


def _pattern(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_pattern(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _pattern(parts[1:], wanted[1:])


def _leads(folder: list[str], wanted: list[str]) -> bool:
    """Whether what matches a pattern may lie in a folder."""
    for part, pattern in zip(folder, wanted, strict=False):
        if pattern == "**":
            return True
        if not fnmatch.fnmatchcase(part, pattern):
            return False
    return len(folder) < len(wanted)


def _listed(files: Files, name: str) -> Iterator[str]:
    """The lines of a text, or the column ``path`` of a Parquet file; paths are absolute or beside the list."""
    try:
        with files.open(name) as file:
            if name.lower().endswith(".parquet"):
                yield from _column(file, name)
                return
            for number, line in enumerate(file):
                path = os.fsdecode((line if number else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\r\n"))
                if path:
                    yield path
    except (OSError, DataError) as error:
        raise DataError(f"{printable(name)}: {_why(error)}") from error


def _column(file: Any, name: str) -> Iterator[str]:
    with extra("scale", "a list in Parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        column = "path" if "path" in columns else columns[0] if len(columns) == 1 else None
        if column is None:
            raise DataError(f"wanted a column called path, got {', '.join(columns)}")
        for batch in table.iter_batches(4096, columns=[column]):
            for path in batch.column(0).to_pylist():
                yield os.fsdecode(path if path is not None else "")
    except (pa.ArrowException, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"no paths can be read from it: {error}") from error


def _members(files: Files, shard: str) -> Iterator[Item]:
    """The pictures in a tar archive, in its order, with where their bytes lie."""
    said = printable(shard)
    suffixes = image_suffixes()
    try:
        with files.open(shard) as file:
            if not shard.lower().endswith(".tar"):
                raise DataError("a compressed archive cannot be read from its middle; wanted a plain .tar")
            with tarfile.open(fileobj=file, mode="r:", errorlevel=1) as archive:
                while (member := archive.next()) is not None:
                    name = f"{shard}/{member.name}"
                    if posixpath.splitext(name)[1].lower() not in suffixes:
                        pass
                    elif member.isfile():
                        yield Item(name, shard, member.offset_data, member.size)
                    elif member.islnk() or member.issym():
                        yield Item(name, error="a link inside an archive, which is not followed")
                    archive.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
                _check_end(file, archive.offset)
    except Exception as error:  # headers that say anything make tarfile raise anything
        yield Item(shard, error=f"{said}: {_why(error)}")


def _check_end(file: Any, offset: int) -> None:
    """An archive that was cut off between two members looks whole to tarfile."""
    file.seek(offset)
    if file.read(BLOCK).strip(b"\0"):
        raise DataError("the archive is damaged behind its last readable member")


def digest_of(items: Iterable[Item]) -> str:
    """What tells one list of pictures from another."""
    found = hashlib.sha256()
    for item in items:
        found.update(item.told())
    return found.hexdigest()
