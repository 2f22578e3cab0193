"""Words to the person who waits, while something takes long or is waited for."""

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Who is told."""


def announce(text: str) -> None:
    """Print a sentence to standard error, as standard output is for results."""
    print(text, file=sys.stderr, flush=True)
