"""Readers that die, for the tests of the processes that run them."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from whatwhere.annotate.reading import Answer, Reader
from whatwhere.annotate.sources import Item
from whatwhere.errors import InputError


@dataclass(frozen=True)
class Deadly(Reader):
    """Dies of files called deadly, and once of one called unlucky."""

    def __call__(self, item: Item) -> Answer:
        if "deadly" in item.name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stops" in item.name:
            time.sleep(1000)
        if "unlucky" in item.name:
            seen = Path(self.root, "seen")
            if not seen.exists():
                seen.touch()
                os._exit(3)
        return super().__call__(item)


def wrong(item: Item) -> Answer:
    raise InputError("a setting is wrong")
