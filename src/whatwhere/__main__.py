"""``python -m whatwhere``."""

from whatwhere.apps.cli import main

main()
