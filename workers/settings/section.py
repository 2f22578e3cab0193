"""What every section of a spec is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.sites import expand_sites


class Settings(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


def _as_sites(value: Any) -> Any:
    value = _as_list(value)
    return expand_sites(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # a number, to Python
        raise ValueError(f"a token is an id or a string, not {str(value).lower()}")
    return value


TokenName = Annotated[int | str, BeforeValidator(_no_truth_value)]
TokenNames = Annotated[tuple[TokenName, ...], BeforeValidator(_as_list)]
"""Tokens, by their ids or by their strings."""
Sites = Annotated[tuple[str, ...], BeforeValidator(_as_sites)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Seconds = Annotated[float, Field(gt=0)]
