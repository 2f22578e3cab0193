"""Small JSON records, sealed, and the digests that name things by what they are.

One canonical form (sorted keys, no spaces) is hashed, so that equal values have equal digests on every machine.

Invariant: every JSON file of a store carries a seal, the crc32c of its own bytes, which is compared whenever it is
read: no byte of it can change unnoticed, not even a space. (A file that somebody else's format determines cannot carry
one: the record that is written after it holds its sha256.)
"""

import hashlib
import json
import re
from typing import Any

import google_crc32c

from storage.backends.place import Place
from storage.errors import StorageError

Record = dict[str, Any]

_SEAL = re.compile(rb'"checksum": "([0-9a-f]{8})"')
"""Inside a JSON string the quotes would be escaped, and the seal is the last key of the file: the last match is it."""
_UNSEALED = "00000000"


def digest(value: Any) -> str:
    """The sha256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode(record: Record) -> bytes:
    """A record as the bytes of its file, sealed by the key `checksum`."""
    assert "checksum" not in record
    return _sealed({**record, "checksum": _UNSEALED})


def encode_zarr(metadata: Record) -> bytes:
    """The metadata of a Zarr group or array as the bytes of its zarr.json; the seal is in attributes.granary."""
    attributes = dict(metadata["attributes"])
    ours = {**attributes.pop("granary", {}), "checksum": _UNSEALED}
    others = {name: value for name, value in metadata.items() if name != "attributes"}
    return _sealed({**others, "attributes": {**attributes, "granary": ours}})


def decode(content: bytes) -> Record:
    """Check a file's seal and return its record without it. Raises ValueError that says what is wrong."""
    seals = list(_SEAL.finditer(content))
    if not seals:
        other = json.loads(content)
        raise ValueError("it has no checksum" if isinstance(other, dict) else "it is not a JSON object")
    found, expected = seals[-1][1].decode(), _crc(content, *seals[-1].span(1))
    if found != expected:
        raise ValueError(f"its bytes have the crc32c {expected}, and its checksum says {found}")
    value: Record = json.loads(content)
    if "zarr_format" not in value:
        del value["checksum"]
        return value
    del value["attributes"]["granary"]["checksum"]
    if not value["attributes"]["granary"]:
        del value["attributes"]["granary"]
    return value


def read_record(path: Place) -> Record:
    """Read a JSON record. Raises StorageError when it is there but is not what was written."""
    try:
        return decode(path.read())
    except ValueError as error:
        raise StorageError(f"the record {path} is damaged: {error}") from None


def _sealed(record: Record) -> bytes:
    content = (json.dumps(record, indent=2) + "\n").encode()
    start, stop = list(_SEAL.finditer(content))[-1].span(1)
    return content[:start] + _crc(content, start, stop).encode() + content[stop:]


def _crc(content: bytes, start: int, stop: int) -> str:
    """The crc32c of a file, in hex, with zeros in place of the digits of its seal at [start, stop)."""
    return f"{google_crc32c.value(content[:start] + _UNSEALED.encode() + content[stop:]):08x}"


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
