"""Names of the classes, and the class that somebody means by a word."""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import SupportsIndex

from whatwhere.errors import InputError, nearest


class Labels(Sequence[str]):
    """Class names in the order of the logits; a class is found by name, synonym or index.

    Args:
        names: one name a class, shown to people.
        synonyms: other words for each class; matched without regard to case.
    """

    def __init__(self, names: Sequence[str], synonyms: Sequence[Sequence[str]] | None = None) -> None:
        if synonyms is not None and len(synonyms) != len(names):
            raise InputError(f"synonyms for each of {len(names)} classes, got {len(synonyms)}")
        odd = [name for name in names if not isinstance(name, str)]
        if odd:
            raise InputError(f"names of classes are strings, got {odd[0]!r}")
        self._names = tuple(names)
        self.synonyms = tuple(tuple(words) for words in synonyms or [()] * len(names))
        self._by_word: dict[str, list[int]] = defaultdict(list)
        for index, (name, words) in enumerate(zip(self._names, self.synonyms, strict=True)):
            for word in {name.casefold(), *(word.casefold() for word in words)}:
                self._by_word[word].append(index)

    @classmethod
    def numbered(cls, count: int) -> "Labels":
        """Names for classes that have none: "class 0", "class 1", ..."""
        return cls([f"class {index}" for index in range(count)])

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._names[index]

    def __repr__(self) -> str:
        return f"Labels({len(self)}: {', '.join(self._names[:3])}, ...)"

    def find(self, wanted: str | int) -> int:
        """The index of a class.

        Raises:
            InputError: no such class (with the three nearest names), or a word for several classes.
        """
        if not isinstance(wanted, str):
            if not isinstance(wanted, SupportsIndex) or not 0 <= operator.index(wanted) < len(self):
                raise InputError(f"a class is a name or an index in 0..{len(self) - 1}, got {wanted!r}")
            return operator.index(wanted)
        if wanted in self._names and self._names.count(wanted) == 1:
            return self._names.index(wanted)
        found = self._by_word.get(wanted.strip().casefold(), [])
        if len(found) == 1:
            return found[0]
        if wanted.strip().isdecimal() and not found:
            return self.find(int(wanted))
        if found:
            which = ", ".join(f"{index} ({self[index]})" for index in found)
            raise InputError(f"{wanted!r} means several classes; say which by its index: {which}")
        raise InputError(f"no class is called {wanted!r}; nearest: {nearest(wanted, self._by_word)}")


@cache
def imagenet() -> Labels:
    """The 1000 classes of ILSVRC 2012, by their first word; WordNet's other words and ids are synonyms."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = [[word.strip() for word in text.split(",")] for text in info.label_descriptions()]
    ids = info.label_names()  # type: ignore[no-untyped-call]
    firsts = [first for first, *_ in words]
    names = [first if firsts.count(first) == 1 else f"{first} ({id})" for first, id in zip(firsts, ids, strict=True)]
    return Labels(names, [[*some, id] for some, id in zip(words, ids, strict=True)])
