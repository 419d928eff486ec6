"""Files that nobody ever finds half written."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whatwhere.errors import InputError


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write a file to; it takes the name that it is meant to have when it is done, and never if it fails.

    Args:
        path: what it is to be called, in a folder that is there. What has that name is written over.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".whatwhere-") as scratch:
        written = Path(scratch, path.name)
        yield written
        written.replace(path)


@contextmanager
def together(*paths: Path) -> Iterator[list[Path]]:
    """Places to write files to that belong together; they take their names when all are done, and none if one fails.

    Whenever the process ends, the last of them is there with the others that were written with it, or is not there.

    Args:
        paths: in one folder; the last is the one that readers open first. What has these names is written over.
    """
    with tempfile.TemporaryDirectory(dir=paths[-1].parent, prefix=".whatwhere-") as scratch:
        written = [Path(scratch, path.name) for path in paths]
        yield written
        paths[-1].unlink(missing_ok=True)  # it would be found beside what is not its own
        for file, path in zip(written, paths, strict=True):
            file.replace(path)


@contextmanager
def lasting(path: Path) -> Iterator[Path]:
    """As ``aside``, of a file that stays if the power fails next: its bytes reach the disk before its name does.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; what had that name is as it was.
    """
    with aside(path) as written:
        yield written
        with written.open("rb+") as file:
            os.fsync(file.fileno())
    settle(path.parent)


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """For a while, nobody else holds the file of that name; it is let go however the process ends.

    Raises:
        InputError: somebody holds it.
    """
    try:
        import fcntl
    except ImportError:  # where there are no such locks, two at once are not found out
        yield
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path.parent}: another process is at work in this folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(file)
