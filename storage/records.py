"""Small JSON records and the digests that name things by what they are.

One canonical form (sorted keys, no spaces) is hashed, so that equal values have equal digests on every machine.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from storage.errors import StorageError

Record = dict[str, Any]


def digest(value: Any) -> str:
    """The sha256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode(record: Record) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def read_record(path: Path) -> Record:
    """Read a JSON record. Raises StorageError when it is there but is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"the record {path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise StorageError(f"the record {path} is damaged: it is not a JSON object")
    return value


def differences(expected: Record, found: Record, prefix: str = "") -> list[str]:
    """Name every key in which two records differ, with both values: 'model.dtype: x in the store, y in the spec'."""
    lines = []
    for key in sorted(expected.keys() | found.keys()):
        a, b, name = expected.get(key), found.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {_shown(a)} in the store, {_shown(b)} in the spec")
    return lines


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)
