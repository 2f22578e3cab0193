"""Finding what a spec names: a column, or a dotted path into one (`meta.source`), in records and in Arrow schemas.

A name that has dots itself wins over the path, at every level. A path goes through the fields of structs, the keys of
maps, and JSON, also JSON that is held as a text; a None on the way gives None.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import pyarrow as pa

from pipeline.corpus.formats.arrow_types import is_text, plain_type

MISSING: Final = object()
"""What is found where there is nothing: None is a value."""
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def splits(path: str) -> Iterator[tuple[str, str]]:
    """Every first step of a path and what is left of it, the longest step first."""
    yield path, ""
    at = len(path) - 1
    while (at := path.rfind(".", 0, at)) > 0:
        yield path[:at], path[at + 1 :]


def find(value: Any, path: str) -> Any:
    """Return what a path leads to in a record, or MISSING."""
    if isinstance(value, dict) and path in value:  # most often
        return value[path]
    if isinstance(value, str | bytes):
        value = parsed(value)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return MISSING
    for name, rest in splits(path):
        if name in value:
            found = find(value[name], rest) if rest else value[name]
            if found is not MISSING:
                return found
    return MISSING


def parsed(text: str | bytes) -> Any:
    """Return the value of a JSON text; MISSING where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return MISSING


def names_in(record: Mapping[str, Any], paths: Iterable[str]) -> Iterator[str]:
    """The names that a record has, and below those that begin one of the paths also the names within."""
    for name, value in record.items():
        yield name
        within = [path[len(name) + 1 :] for path in paths if path.startswith(f"{name}.")]
        if within and isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in names_in(value, within))


@dataclass(frozen=True)
class Route:
    """Where in an Arrow table a path leads."""

    names: tuple[str, ...]
    """A column, and fields of structs within it."""
    inside: str = ""
    """What is left of the path, within the values of a map or of JSON."""

    @property
    def column(self) -> str:
        """The path as Parquet knows it: it reads no other fields of a struct."""
        return ".".join(self.names)


def find_route(fields: Sequence[pa.Field], path: str) -> Route | None:
    """Return where a path leads among columns, or fields of a struct."""
    for name, rest in splits(path):
        for field in fields:
            if field.name != name:
                continue
            if not rest:
                return Route((name,))
            found = plain_type(field.type)
            if pa.types.is_struct(found):
                if inner := find_route(fields_of(found), rest):
                    return Route((name, *inner.names), inner.inside)
            elif pa.types.is_map(found) or is_text(found):
                return Route((name,), rest)
    return None


def schema_names(fields: Sequence[pa.Field], paths: Iterable[str]) -> Iterator[str]:
    """What `names_in` gives of records with these columns."""
    for field in fields:
        yield field.name
        within = [path[len(field.name) + 1 :] for path in paths if path.startswith(f"{field.name}.")]
        if within and pa.types.is_struct(found := plain_type(field.type)):
            yield from (f"{field.name}.{inner}" for inner in schema_names(fields_of(found), within))


def fields_of(struct: pa.DataType) -> list[pa.Field]:
    return [struct.field(i) for i in range(struct.num_fields)]


def partitions(url: str) -> dict[str, str | None]:
    """The keys of the folders that a file is in, as Hive, Spark and pandas write them: `lang=en/part-0.parquet`."""
    found = re.findall(r"(?<=/)([^/=]+)=([^/]*)(?=/)", f"/{url}")
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, value in found}
