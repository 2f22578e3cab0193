"""Environment variables that go along with a run to workers elsewhere: named in the spec, never spelled out.

A spec, a store, a job's metadata and every message hold names. The values are taken from the environment where
`granary` is typed, and travel in Ray's runtime environment alone. Workers of a Ray that the run starts by itself have
that environment anyway.
"""

import os
import re
from collections.abc import Iterable, Mapping

from pipeline.errors import InputError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REPLACED = re.compile(r"\$(\w|\{)")
"""What Ray takes for another variable, within a value."""
KEY = "cluster.env"
"""Also of what `granary submit --env` gives, which is put beside it."""


def problem_of(name: str) -> str | None:
    """Why a text is no name of a variable that may go along. Says nothing of what follows a `=`, which is a value."""
    before, is_value, _ = name.partition("=")
    if is_value:
        return (
            f"give the name of a variable alone ({before}), and set it where granary is run: values stay out of specs"
        )
    if NAME.fullmatch(name) is None:
        return "expected names of environment variables (letters, digits and _), and found something else"
    if name.startswith("RAY_"):
        return f"{name} is Ray's own and says where this process is; workers have theirs from their cluster"
    return None


def values_of(names: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The values of the named variables. Raises InputError, without any value in it, for those that cannot be given."""
    names = list(dict.fromkeys(names))
    for name in names:
        if problem := problem_of(name):
            raise InputError(f"{KEY}: {problem}")
    if missing := [name for name in names if not environment.get(name)]:
        states = ", ".join(f"{name} is {'empty' if name in environment else 'not set'}" for name in missing)
        raise InputError(f"{KEY}: {states} in the environment here: set it, or leave its name out")
    if replaced := [name for name in names if REPLACED.search(environment[name])]:
        raise InputError(
            f"{KEY}: the value of {', '.join(replaced)} has a $ before a letter, which Ray would replace on the way; "
            "set it on the cluster's machines"
        )
    return {name: environment[name] for name in names}
