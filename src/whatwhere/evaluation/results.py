"""What was measured: sums that can be added, written down, and read as numbers with intervals."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.errors import DataError, InputError
from whatwhere.evaluation.classification import classification_result
from whatwhere.evaluation.localization import SHARES, at, best_threshold, boxes_result, pixels_result
from whatwhere.evaluation.shortcuts import Shortcut, shortcuts_result
from whatwhere.evaluation.tally import Measure, Tally, means_of
from whatwhere.evaluation.trusted import trust_result
from whatwhere.explanation import THRESHOLD

NOTES = "notes"
"""What the file of an evaluation calls all that is no tally."""
KEPT = 50
"""Thresholds at which the overlap of every image is kept, for tables of images and galleries."""

AT_ONE = ("GT-known loc", "top-1 loc", "top-5 loc", "mean IoU", "trust ROC AUC", "trusted half", "TPR", "FPR")
"""Numbers of a method at one threshold, or of what boxes at it are trusted; no longer true where it changes."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured. Those of the same settings can be added, in any order.

    Attributes:
        settings: classifier, data set, methods and rules, as plain data; "asked" says how that was asked for.
        tally: all counts.
        rows: one for each image and class that it shows, by name.
        failed: images that could not be used, and why.
        left_out: images that show none of the classifier's classes.
        chunks: which parts of the data set are in it.
    """

    settings: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    rows: tuple[dict[str, Any], ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    chunks: frozenset[int] = frozenset()

    def __add__(self, other: "Evaluation") -> "Evaluation":
        keys = (self.settings.keys() | other.settings.keys()) - {"asked"}  # how it was asked for does not matter
        different = sorted(key for key in keys if self.settings.get(key) != other.settings.get(key))
        if different:
            raise InputError(f"only evaluations of the same settings can be added; these differ in {different}")
        if twice := self.chunks & other.chunks:
            raise InputError(f"the same images are in both: part {min(twice)}, and {len(twice)} in all")
        return Evaluation(
            self.settings,
            self.tally + other.tally,
            tuple(sorted((*self.rows, *other.rows), key=lambda row: (row["name"], row["class"]))),
            dict(sorted({**self.failed, **other.failed}.items())),
            self.left_out + other.left_out,
            self.chunks | other.chunks,
        )

    @property
    def methods(self) -> list[str]:
        """Names of the methods, without the baselines."""
        return list(self.settings["methods"])

    @cached_property
    def classification(self) -> dict[str, Measure]:
        """What it says (``classification_result``), and by its maps (``map_scores``)."""
        return {**classification_result(self.tally.part("what")), **means_of(self.tally.part("by maps"))}

    def threshold(self, method: str) -> float | None:
        """The share of the maximum that boxes are taken at; None without boxes.

        The one that the classifier was calibrated to, or else the one at which MaxBoxAcc is reached here.
        """
        tally = self.tally.part(method)
        if "hits" not in tally:
            return None
        calibrated: float | None = self.settings["thresholds"].get(method)
        return best_threshold(tally) if calibrated is None else calibrated

    def where(self, method: str, threshold: float | None = None) -> dict[str, Measure]:
        """All numbers of a method, or of a baseline, by name.

        Args:
            method: its name.
            threshold: for what needs one; by default ``self.threshold``, or without boxes ``THRESHOLD``.
        """
        tally = self.tally.part(method)
        found: dict[str, Measure] = {}
        known = self.threshold(method) if threshold is None else threshold
        if "hits" in tally:
            found |= boxes_result(tally, known)
        if "trust" in tally:
            found |= trust_result(tally)
        if "pixels" in tally:
            found |= pixels_result(tally, THRESHOLD if known is None else known)
        return {**found, **means_of(tally)}

    @property
    def agreement(self) -> dict[tuple[str, str], dict[str, Measure]]:
        """Of each pair of methods, how far their maps say the same."""
        tally = self.tally.part("agreement")
        pairs = {name.partition("/")[0] for name in tally}
        return {tuple(pair.split("~")): means_of(tally.part(pair)) for pair in sorted(pairs)}  # type: ignore[misc]

    def shortcuts(self, method: str) -> list[Shortcut]:
        """Of each class, where its evidence lies; those first that users must know of."""
        return shortcuts_result(self.tally.part(method).part("shortcuts"))

    def save(self, file: Path) -> None:
        """Write all of it to one file (.npz), aside and renamed: no half is ever there."""
        notes = {
            "settings": self.settings,
            "rows": self.rows,
            "failed": self.failed,
            "left_out": self.left_out,
            "chunks": sorted(self.chunks),
        }
        text = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        Tally({**self.tally, NOTES: text}).save(file)

    @classmethod
    def load(cls, file: Path) -> "Evaluation":
        """What ``save`` wrote.

        Raises:
            DataError: it cannot be read.
        """
        arrays = dict(Tally.load(file))
        try:
            notes = json.loads(arrays.pop(NOTES).tobytes())
            return cls(
                notes["settings"],
                Tally(arrays),
                tuple(notes["rows"]),
                notes["failed"],
                notes["left_out"],
                frozenset(notes["chunks"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{file}: no evaluation can be read from it: {error}") from error


def iou_at(row: dict[str, Any], method: str, threshold: float) -> float | None:
    """The overlap of an image's largest box at the threshold, of the KEPT ones below it; None without boxes."""
    kept = row["where"][method].get("iou")
    return None if kept is None else bytes.fromhex(kept)[at(threshold) * KEPT // len(SHARES)] / 255
