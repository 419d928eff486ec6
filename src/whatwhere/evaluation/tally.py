"""Results that can be added: a data set is a sum, so halves, shards and resumed runs agree to the last bit.

A tally is named arrays of integers. Those that are to have an interval begin with an axis of 1 + REPLICATES rows: the
images themselves, then as many bootstrap samples of them.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from whatwhere.errors import DataError
from whatwhere.files import aside
from whatwhere.images import printable

REPLICATES = 200
ONE = 2**30
"""Numbers are summed as integers, in units of 1 / ONE, so that the order does not matter."""


class Tally(Mapping[str, np.ndarray]):
    """Named arrays of integers, which add name by name; what one of two does not have counts as zeros."""

    def __init__(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        self._arrays = dict(arrays or {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __add__(self, other: "Tally") -> "Tally":
        both = {name: self[name] + other[name] if name in self else other[name] for name in other}
        return Tally({**self._arrays, **both})

    def same(self, other: "Tally") -> bool:
        """Whether all numbers are equal."""
        return self.keys() == other.keys() and all(np.array_equal(self[name], other[name]) for name in self)

    def part(self, prefix: str) -> "Tally":
        """What is called ``prefix/name``, as ``name``."""
        start = prefix + "/"
        return Tally({name.removeprefix(start): array for name, array in self.items() if name.startswith(start)})

    def called(self, prefix: str) -> "Tally":
        """The same with names ``prefix/name``."""
        return Tally({f"{prefix}/{name}": array for name, array in self.items()})

    def save(self, path: Path) -> None:
        """Write it to a file (.npz), aside and renamed."""
        with aside(path) as written, written.open("wb") as file:
            np.savez_compressed(file, **self._arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """What ``save`` wrote.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls({name: arrays[name] for name in arrays})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{printable(path)}: no tally can be read from it: {error}") from error


class Measure(NamedTuple):
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def measure(rows: Float[np.ndarray, "rows"]) -> Measure:
    """The number of the images themselves, and the percentile interval of the bootstrap samples."""
    known = rows[1:][np.isfinite(rows[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Measure(float(rows[0]), float(low), float(high))


def weights(names: Sequence[str]) -> Int[np.ndarray, "rows n"]:
    """How often each image counts: once, and in each bootstrap sample Poisson(1) times; of the image's name alone."""
    return _weights(tuple(names))


@lru_cache(maxsize=4)
def _weights(names: tuple[str, ...]) -> Int[np.ndarray, "rows n"]:
    """How often each image counts: once, and in each bootstrap sample Poisson(1) times.

    By the image's name, whatever order or machine it comes in (Chamandy et al., Estimating Uncertainty for Massive
    Data Streams, 2012).
    """
    drawn = [np.random.default_rng(zlib.crc32(name.encode())).poisson(1.0, REPLICATES) for name in names]
    return np.concatenate([np.ones((1, len(names)), int), np.stack(drawn, 1) if drawn else np.zeros((200, 0), int)])


def weighted(rows: Int[np.ndarray, "rows n"], counts: np.ndarray) -> np.ndarray:
    """Sums of counts (n ...) over the images, for each row of weights: (rows ...)."""
    # in floating point for speed, and exact: counts and their sums are far below 2 ** 53
    flat = rows.astype(np.float64) @ counts.reshape(len(counts), -1).astype(np.float64)
    return flat.astype(np.int64).reshape(len(rows), *counts.shape[1:])


def means(names: Sequence[str], values: Mapping[str, Float[np.ndarray, "n"]]) -> Tally:
    """What one number an image has a mean of: ``name.count`` and ``name.total``; nan is not counted."""
    rows = weights(names)
    arrays = {}
    for name, several in values.items():
        known = np.isfinite(several)
        units = np.round(np.where(known, several, 0) * ONE).astype(np.int64)
        arrays[f"{name}.count"] = rows @ known.astype(np.int64)
        arrays[f"{name}.total"] = rows @ units
    return Tally(arrays)


def mean_of(tally: Tally, name: str) -> Measure | None:
    """The mean of what ``means`` counted; None where nothing was."""
    if f"{name}.count" not in tally or not tally[f"{name}.count"][0]:
        return None
    counts, totals = tally[f"{name}.count"], tally[f"{name}.total"]
    return measure(np.divide(totals / ONE, counts, out=np.full(len(counts), np.nan), where=counts > 0))


def means_of(tally: Tally) -> dict[str, Measure]:
    """All that ``means`` counted."""
    names = [name.removesuffix(".count") for name in tally if name.endswith(".count")]
    return {name: found for name in names if (found := mean_of(tally, name)) is not None}
