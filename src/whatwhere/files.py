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
        except OSError:
            raise InputError(f"{path.parent}: another process is at work in this folder") from None
        yield
    finally:
        os.close(file)
