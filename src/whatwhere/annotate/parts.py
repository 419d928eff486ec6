"""A run's folder: what was told, the list of pictures, and the parts, which are the truth.

run.json            what decides the rows, and a digest of the list
source.parquet      the pictures, in order
parts/*.parquet     rows; a part is there whole or not at all
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatwhere.annotate.listing import Listing
from whatwhere.annotate.rows import Picture, Row, pictures_of, rows_in, table_of
from whatwhere.annotate.sources import Item
from whatwhere.errors import DataError, InputError, extra
from whatwhere.files import lasting, settle
from whatwhere.images import printable

RUN, PARTS = "run.json", "parts"
_PART = re.compile(r"part-(\d{6,})\.parquet")


def part_file(folder: Path, number: int) -> Path:
    """Where a part is, or will be."""
    return folder / PARTS / f"part-{number:06d}.parquet"


def parts_done(folder: Path) -> list[int]:
    """The parts that are there, in order; what an interrupted run left half written is not."""
    try:
        names = [file.name for file in (folder / PARTS).iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := _PART.fullmatch(name)))


def write_part(folder: Path, number: int, rows: list[Row]) -> None:
    """Write a part, so that it is there whole and to stay, or not at all.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    with extra("scale", "whatwhere annotate"):
        import pyarrow.parquet as pq
    table = table_of(rows)
    with refused(folder), lasting(part_file(folder, number)) as written, written.open("wb") as opened:
        pq.write_table(table, opened, compression="zstd")  # Arrow takes no names that are no text


class refused:  # noqa: N801
    """What the system says of writing into a folder, as an error that says what to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Says it better."""
        if isinstance(error, OSError):
            why = os.strerror(error.errno) if error.errno else str(error)
            raise DataError(
                f"{printable(self.folder)}: cannot be written to: {why}; what is there is whole, and --resume goes on"
            ) from error


@dataclass(frozen=True)
class Told:
    """What is in ``run.json``.

    Attributes:
        settings: plain data; all that decides the rows.
        model: digest of the classifier.
        name: what it is called.
        labels: names of the classes that are asked for, by index.
        source: as it was named.
        root: of the source.
        images: how many pictures there are.
        part: how many of them make a part.
        list_digest: of the list.
    """

    settings: dict[str, Any]
    model: str
    name: str
    labels: dict[int, str]
    source: str
    root: str
    images: int
    part: int
    list_digest: str

    @property
    def version(self) -> str:
        """The model's name and the beginning of its digest: runs of one network have one name."""
        return f"{self.name} ({self.model[:12]})"

    def save(self, folder: Path) -> None:
        """Write it down, to stay."""
        told = vars(self) | {"labels": {str(index): name for index, name in self.labels.items()}}
        with lasting(folder / RUN) as written:
            written.write_text(json.dumps(told, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Told":
        """What ``save`` wrote.

        Raises:
            DataError: the folder holds no annotations, or they are damaged.
        """
        try:
            told = json.loads((folder / RUN).read_text(encoding="utf-8"))
            labels = {int(index): name for index, name in told.pop("labels").items()}
            return cls(**told, labels=labels)
        except FileNotFoundError:
            raise DataError(f"{printable(folder)}: it holds no annotations, it has no {RUN}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{printable(folder / RUN)}: damaged: {error}") from error

    def check_same(self, other: "Told", folder: Path) -> None:
        """Refuse to go on with what was begun otherwise.

        Raises:
            InputError: they differ; says in what.
        """
        differing = [
            f"{word} {then} then, {now} now"
            for word, then, now in _differences(self, other)
            if json.dumps(then) != json.dumps(now)
        ]
        if differing:
            raise InputError(
                f"{printable(folder)}: cannot go on with what was begun otherwise: {'; '.join(differing)}; "
                "use another folder"
            )


def _differences(then: Told, now: Told) -> Iterator[tuple[str, Any, Any]]:
    yield "model", then.version, now.version
    for word in sorted({*then.settings, *now.settings}):
        yield word, then.settings.get(word), now.settings.get(word)
    yield "part", then.part, now.part
    old, new = (f"{one.images} images ({one.list_digest[:12]})" for one in (then, now))
    yield "source list", old, new


def tidy(folder: Path) -> None:
    """Make the folders, and take away what an interrupted run left half written."""
    with refused(folder):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / PARTS):
            for left in place.glob(".whatwhere-*"):
                shutil.rmtree(left)
        settle(folder)


class Annotations:
    """A finished or growing run's rows, read part by part as often as need be."""

    def __init__(self, folder: Path, min_trust: float = 0.0) -> None:
        self.folder, self.min_trust = Path(folder), min_trust
        self.told = Told.load(self.folder)
        self._listing = Listing(self.folder, self.told.images, self.told.part)

    def item(self, picture: Picture) -> Item:
        """What the source says of a picture."""
        return self._listing.item(picture.image)

    def rows(self) -> Iterator[Row]:
        """All of them, in order.

        Raises:
            DataError: a part cannot be read.
        """
        with extra("scale", "whatwhere annotate"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        for number in parts_done(self.folder):
            file = part_file(self.folder, number)
            try:
                with file.open("rb") as opened:
                    table = pq.read_table(opened)
                yield from rows_in(table)
            except (OSError, pa.ArrowException, TypeError) as error:
                raise DataError(f"{printable(file)}: cannot be read: {error}; remove it, and --resume") from error

    def __iter__(self) -> Iterator[Picture]:
        """The pictures, in order, with the regions of at least ``min_trust``."""
        return pictures_of(self.rows(), self.min_trust)
