"""The source's pictures, written down before anything is done, so that every part is known by its number alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whatwhere.annotate.sources import Item, digest_of
from whatwhere.errors import DataError, extra
from whatwhere.files import lasting
from whatwhere.images import printable

LIST = "source.parquet"
GROUP = 64
"""Parts whose items are read at once."""


class Listing:
    """The list of a run: items by the number of their part.

    Attributes:
        folder: of the run.
        images: how many there are.
        part: how many of them make a part; the last one has what is left.
    """

    def __init__(self, folder: Path, images: int, part: int) -> None:
        self.folder, self.images, self.part = folder, images, part
        self._kept: tuple[int, list[Item]] = (-1, [])

    def __len__(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part)

    def items(self, number: int) -> list[tuple[int, Item]]:
        """A part's pictures, each with its number in the source.

        Raises:
            DataError: the list cannot be read.
        """
        first = number * self.part
        return [(image, self.item(image)) for image in range(first, first + self.size_of(number))]

    def item(self, image: int) -> Item:
        """A picture, by its number in the source.

        Raises:
            DataError: the list cannot be read.
        """
        group, place = divmod(image, GROUP * self.part)
        if self._kept[0] != group:
            self._kept = group, self._read(group)
        return self._kept[1][place]

    def _read(self, group: int) -> list[Item]:
        with extra("scale", "whatwhere annotate"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        try:
            with (self.folder / LIST).open("rb") as file:
                return [_item(row) for row in pq.ParquetFile(file).read_row_group(group).to_pylist()]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{printable(self.folder / LIST)}: cannot be read: {error}") from error

    def size_of(self, number: int) -> int:
        """How many pictures a part has."""
        return min(self.part, self.images - number * self.part)


def write_list(items: Iterator[Item], folder: Path, part: int) -> tuple[int, str]:
    """Write a source down, as it comes.

    Returns:
        How many items there are, and what tells this list from another.
    """
    with extra("scale", "whatwhere annotate"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    binary, number = pa.binary(), pa.int64()
    schema = pa.schema([("name", binary), ("shard", binary), ("offset", number), ("size", number), ("error", binary)])
    count = 0
    with (
        lasting(folder / LIST) as written,
        written.open("wb") as opened,  # Arrow takes no names that are no text
        pq.ParquetWriter(opened, schema, compression="zstd") as writer,
    ):

        def noted() -> Iterator[Item]:
            nonlocal count
            some: list[dict[str, Any]] = []
            for item in items:
                some.append({name: _stored(value) for name, value in vars(item).items()})
                count += 1
                if len(some) == part * GROUP:
                    writer.write_table(pa.Table.from_pylist(some, schema))
                    some.clear()
                yield item
            if some:
                writer.write_table(pa.Table.from_pylist(some, schema))

        digest = digest_of(noted())
    return count, digest


def _stored(value: str | int) -> bytes | int:
    return os.fsencode(value) if isinstance(value, str) else value


def _item(row: dict[str, Any]) -> Item:
    words: dict[str, Any] = {name: os.fsdecode(one) if isinstance(one, bytes) else one for name, one in row.items()}
    return Item(**words)
