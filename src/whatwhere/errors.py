"""What can go wrong, as one tree.

    WhatWhereError
    ├── InputError          an argument is wrong: a name, a shape, a range
    ├── DataError           a file or an image cannot be used; names it and says why
    ├── UnsupportedError    the method and the network do not go together; names the method that would do
    ├── TrainingError       a training cannot go on; says where it stopped and what is kept
    └── MissingExtraError   an optional package is not installed; names the extra that brings it

Each message says what was wanted, what came, and what to do.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class WhatWhereError(Exception):
    """Everything raised on purpose by this package."""


class InputError(WhatWhereError, ValueError):
    """An argument is wrong."""


class DataError(WhatWhereError, ValueError):
    """A file or an image cannot be used."""


class UnsupportedError(WhatWhereError):
    """The method does not apply to this network."""


class TrainingError(WhatWhereError):
    """A training cannot go on."""


class MissingExtraError(WhatWhereError):
    """An optional package is not installed."""


@contextmanager
def settings_blamed(what: str) -> Iterator[None]:
    """What other people's code says of values that we pass on becomes an error that names the setting.

    Raises:
        InputError: anything was raised that is not ours already.
    """
    try:
        yield
    except (WhatWhereError, OSError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}") from error


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Imports of what an extra brings.

    Raises:
        MissingExtraError: it is not installed; says what needs it.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{what} needs {error.name}; run: pip install 'whatwhere[{name}]'") from error


def not_one_an_image(b: int, came: tuple[int, ...]) -> InputError:
    """What to raise where a score does not give (b,)."""
    return InputError(f"a score gives one number for each of {b} images, got shape {came}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The three known names nearest to ``word``, for the end of an error message."""
    by_folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=3, cutoff=0.0)
    return ", ".join(by_folded[name] for name in close)
