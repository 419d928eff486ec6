"""Keep freed memory in the process, so that a forward does not fetch its pages again each time."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to give large blocks back to the system after every layer.

    For programs, at their start; a library has no business changing this. Memory in use stays at its peak.

    Returns:
        Whether the setting was taken; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_M_MMAP_MAX, 0))
