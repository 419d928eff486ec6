"""The source's pictures, written down before anything is done, so that every part is known by its number alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whatwhere.annotate.sources import Item, digest_of
from whatwhere.errors import extra
from whatwhere.files import lasting

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
        with extra("scale", "whatwhere annotate"):
            import pyarrow.parquet as pq
        self.folder, self.images, self.part = folder, images, part
        self._file = pq.ParquetFile(folder / LIST)
        self._kept: tuple[int, list[Item]] = (-1, [])

    def __len__(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part)

    def items(self, number: int) -> list[tuple[int, Item]]:
        """A part's pictures, each with its number in the source."""
        group, place = divmod(number, GROUP)
        if self._kept[0] != group:
            rows = self._file.read_row_group(group).to_pylist()
            self._kept = group, [_item(row) for row in rows]
        some = self._kept[1][place * self.part : (place + 1) * self.part]
        return [(number * self.part + i, item) for i, item in enumerate(some)]

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
    with lasting(folder / LIST) as written, pq.ParquetWriter(written, schema, compression="zstd") as writer:

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
