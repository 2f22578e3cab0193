"""Environment variables in a spec: `${NAME}` in a value is what the variable holds where the spec is read.

That is the machine where `granary` was typed: `submit` sends the spec on with the values in it, as it does with
relative paths and `~`. Keys are left as they are, and so is a `$` alone, which globs, patterns and SQL may hold.
`$${NAME}` is the text `${NAME}`. A variable that is not set, or empty, is refused: a path that lost a part is another
path. docs/decisions/0015-variables-in-a-spec.md gives the reasons.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

REFERENCE = re.compile(r"\$?\$\{(?P<name>[^{}]*)\}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def expanded(value: Any, environment: Mapping[str, str] = os.environ) -> tuple[Any, list[str]]:
    """Return a value with every variable in its texts replaced, and what cannot be, each with its key."""
    problems: list[str] = []

    def replace(text: str, key: str) -> str:
        return REFERENCE.sub(lambda found: _value(found, environment, key, problems), text)

    return _with_texts(value, "", replace), problems


def escaped(value: Any) -> Any:
    """Return a value that `expanded` turns back into this one: for a spec that is read again, elsewhere."""
    return _with_texts(value, "", lambda text, key: re.sub(r"\$\{[^{}]*\}", lambda found: f"${found.group()}", text))


def _with_texts(value: Any, key: str, change: Callable[[str, str], str]) -> Any:
    """Return a value whose texts are changed. `change` is given a text and its key, as `corpus.path[0]`."""
    if isinstance(value, str):
        return change(value, key)
    if isinstance(value, dict):
        return {
            name: _with_texts(inner, f"{key}.{name}" if key else str(name), change) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_with_texts(inner, f"{key}[{number}]", change) for number, inner in enumerate(value)]
    return value


def _value(found: re.Match[str], environment: Mapping[str, str], key: str, problems: list[str]) -> str:
    text, name = found.group(), found["name"]
    if text.startswith("$$"):
        return text[1:]
    if NAME.fullmatch(name) is None:
        problems.append(
            f"{key}: {text} names no environment variable (letters, digits and _); write ${text} for the text itself"
        )
    elif not environment.get(name):
        state = "empty" if name in environment else "not set"
        problems.append(
            f"{key}: the environment variable {name} is {state}: set it, or write ${text} for the text itself"
        )
    return environment.get(name, text)
