"""What can be wrong with a store, as one family.

`StorageError` is the world's failure (a damaged chunk, rows nobody harvested yet); `StoreMismatch` is the caller's
(a spec that contradicts what the store holds) and so is a ValueError too.
"""


class StorageError(Exception):
    """A store cannot give or take what was asked of it."""


class NotAStore(StorageError):
    """There is no store at this place, or none that this version can read."""


class StoreGrown(StorageError):
    """The store has grown since it was opened, and what was asked for cannot be had from the table it had then."""


class CorruptChunk(StorageError):
    """A chunk is missing, cut, or its bytes do not match their checksum. Names the array and the chunk."""


class UncommittedRows(StorageError):
    """Rows were asked for whose unit has no commit. Names the missing units."""


class StoreMismatch(StorageError, ValueError):
    """What the caller brings contradicts what the store holds. The message shows both values."""


class CannotWrite(StorageError):
    """The place of the store is full, read-only or broken: whoever writes next will meet the same."""


class Unreachable(StorageError):
    """The store did not answer, or did not let us in, for longer than we wait."""


class UnitConflict(StorageError):
    """Two writers computed different bytes for one unit. Names both."""
