"""Type hints as run-time checks, an int being good enough for a float."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_known: set[tuple[str, str]] = set()


def check(function: Callable) -> Callable:
    """The function with its hints checked.

    One within a function is made anew whenever that runs, and the check of it with it, which costs more than most of
    them do; so the first one is checked.
    """
    name = function.__module__, function.__qualname__
    if "<locals>" in function.__qualname__ and name in _known:
        return function
    _known.add(name)
    return _checked(function)
