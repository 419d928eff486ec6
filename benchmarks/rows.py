"""What a study has measured, a row at a time in a CSV file: what has a row need not be done again."""

import csv
from collections.abc import Sequence
from pathlib import Path


class Rows:
    """A CSV file of so many columns, which is made with its first row."""

    def __init__(self, file: Path, fields: Sequence[str]) -> None:
        self.file, self.fields = file, fields

    def all(self) -> list[dict[str, str]]:
        """What was measured."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(self, row: dict[str, object]) -> None:
        """One more; it is printed too."""
        with self.file.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
