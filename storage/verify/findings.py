"""What is wrong with a store, as values: faults, how each can be put right, and notes.

A fault names one object, what it should be and what it is. Nothing here reads more than one object or writes any.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from storage.backends.place import Place
from storage.format.records import Record, decode


@dataclass(frozen=True)
class Rewrite:
    """The object's bytes follow from records that are sound."""

    content: bytes
    what = "rewrite"


@dataclass(frozen=True)
class Remove:
    """Nothing is lost with the object: whoever needs it writes it anew."""

    what = "remove"


@dataclass(frozen=True)
class Remake:
    """The object is made again with its whole unit."""

    harvest: str
    unit: int
    from_rows: bool
    """True if the unit's stored activations are enough to make it; otherwise the model runs again."""
    instead_of_commit: bool = False
    """True if the commit itself says the wrong bytes, and is replaced too."""
    what = "remake the unit"


@dataclass(frozen=True)
class ByHand:
    """Nothing in the store says what the object was."""

    advice: str
    what = "by hand"


Remedy = Rewrite | Remove | Remake | ByHand


@dataclass(frozen=True)
class Fault:
    """One object that is not what was written."""

    place: Place
    expected: str
    found: str
    remedy: Remedy

    def to_record(self, root: Place) -> Record:
        """For people and scripts; `object` is the key below the store."""
        record: Record = {
            "object": self.place.below(root),
            "expected": self.expected,
            "found": self.found,
            "repair": self.remedy.what,
        }
        if isinstance(self.remedy, Remake):
            record |= {"harvest": self.remedy.harvest, "unit": self.remedy.unit}
        if isinstance(self.remedy, ByHand):
            record["advice"] = self.remedy.advice
        return record


@dataclass(frozen=True)
class Note:
    """Something to know that is not damage."""

    text: str


Finding = Fault | Note


@dataclass(frozen=True)
class Checked:
    """What one check found, and the bytes that it read."""

    faults: tuple[Fault, ...] = ()
    num_bytes: int = 0


Check = Callable[[], Checked]
"""A check of one object; run in a thread. Does not raise for damage, but does for a store that does not answer."""


def reason(error: Exception, place: Place) -> str:
    """What an error says is wrong with a place, without the place's name: the fault has it."""
    return re.sub(rf"^(the \w+ )?{re.escape(str(place))} is ", "it is ", str(error))


def read_whole(place: Place, expected: str, remedy: Remedy) -> bytes | Fault:
    """The content of an object, or the fault that it cannot be read."""
    try:
        return place.read()
    except (FileNotFoundError, NotADirectoryError):
        return Fault(place, expected, "nothing", remedy)
    except OSError as error:
        return Fault(place, expected, f"it cannot be read: {error.strerror or error}", remedy)


def read_sound(place: Place, expected: str, remedy: Remedy) -> Record | Fault:
    """A record, or the fault that it is missing or damaged."""
    content = read_whole(place, expected, remedy)
    if isinstance(content, Fault):
        return content
    try:
        return decode(content)
    except ValueError as error:
        return Fault(place, expected, f"it is damaged: {error}", remedy)


def check_record(place: Place, content: bytes, what: str, *, but: str | None = None) -> Checked:
    """Check a record whose content is known; `but` names a field of attributes.granary that may differ."""
    found = read_sound(place, what, Rewrite(content))
    if isinstance(found, Fault):
        return Checked((found,))
    expected = decode(content)
    if but is not None:
        for record in (found, expected):
            record["attributes"].get("granary", {}).pop(but, None)
    if found == expected:
        return Checked(num_bytes=len(content))
    return Checked((Fault(place, what, "a record that is sound in itself, of something else", Rewrite(content)),))
