"""Which numbers a setting may be; None, where a setting was not given, may always be."""

import math
from collections.abc import Callable
from numbers import Integral

from pipeline.errors import InputError

Number = float | None


def whole(**values: Number) -> list[str]:
    """Why the settings of these names cannot be so; nothing if they are whole and above 0."""
    return _unlike("a whole number above 0", lambda v: isinstance(v, Integral) and v > 0, values)


def positive(**values: Number) -> list[str]:
    return _unlike("above 0 and finite", lambda v: 0 < v < math.inf, values)


def not_negative(**values: Number) -> list[str]:
    return _unlike("at least 0 and finite", lambda v: 0 <= v < math.inf, values)


def shares(**values: Number) -> list[str]:
    return _unlike("a share, at least 0 and at most 1", lambda v: 0 <= v <= 1, values)


def positive_shares(**values: Number) -> list[str]:
    return _unlike("a share, above 0 and at most 1", lambda v: 0 < v <= 1, values)


def below_one(**values: Number) -> list[str]:
    return _unlike("at least 0 and below 1", lambda v: 0 <= v < 1, values)


def seeds(**values: Number) -> list[str]:
    return _unlike(
        "a whole number, at least 0 and below 2^63", lambda v: isinstance(v, Integral) and 0 <= v < 2**63, values
    )


def refuse(reasons: list[str]) -> None:
    """Raise InputError with all reasons, if there is any."""
    if reasons:
        raise InputError("; ".join(reasons))


def _unlike(what: str, fits: Callable[[float], bool], values: dict[str, Number]) -> list[str]:
    return [
        f"{name} must be {what}, not {value}" for name, value in values.items() if value is not None and not fits(value)
    ]
