"""Files that nobody ever finds half written."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
