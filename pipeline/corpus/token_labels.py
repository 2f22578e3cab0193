"""Labels of tokens: for each label a number of each token, an index into the label's names, or NONE.

They come from spans (`pipeline.corpus.spans`), go with the tokens through the layout of the table, and end as row
columns of the store. A corpus without such labels has `TokenLabels()`, on which everything here does nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

Int32 = npt.NDArray[np.int32]
LabelValues = Mapping[str, Sequence[str]]
"""Label -> its values; a value's place is its number."""

NONE = -1
"""The number of a token that has no value."""
MOST_VALUES = 4096
"""Values that a label of spans or tokens may have: the moments of each are kept for every site and unit."""


@dataclass(frozen=True)
class TokenLabels:
    """The labels of some tokens."""

    codes: dict[str, Int32] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __getitem__(self, which: slice | npt.NDArray[np.bool_]) -> "TokenLabels":
        """The labels of some of the tokens."""
        return self.map(lambda codes: codes[which])

    def map(self, change: Callable[[Int32], Int32]) -> "TokenLabels":
        return TokenLabels({name: change(codes) for name, codes in self.codes.items()}, self.names)

    def with_none_at(self, places: Any) -> "TokenLabels":
        """The labels when tokens without a value are inserted, as by `np.insert`: BOS is in no span."""
        return self.map(lambda codes: np.insert(codes, places, NONE))

    def numbered(self, names: LabelValues) -> "TokenLabels":
        """The same labels, with numbers that are places in other names; a value that is not among them is lost."""
        codes = {}
        for label, old in self.codes.items():
            places = {value: number for number, value in enumerate(names[label])}
            # one more, so that NONE, which is -1, is found at the end
            new = np.array([*(places.get(value, NONE) for value in self.names[label]), NONE], dtype=np.int32)
            codes[label] = new[old]
        return TokenLabels(codes, {label: tuple(names[label]) for label in codes})

    def used(self, which: npt.NDArray[np.bool_]) -> dict[str, list[str]]:
        """The values that some of the tokens have, in order: label -> values."""
        return {
            label: sorted(self.names[label][code] for code in np.unique(codes[which]).tolist() if code != NONE)
            for label, codes in self.codes.items()
        }


def joined_labels(parts: Sequence[TokenLabels], lengths: Sequence[int]) -> TokenLabels:
    """Put labels of tokens one after the other. `lengths`: tokens of each part; those that have none say nothing.
    Raises InputError where some parts have a label and others do not."""
    names = all_names([part.names for part in parts])
    kept = [part.numbered(names) for part, length in zip(parts, lengths, strict=True) if length]
    labels = dict.fromkeys(label for part in kept for label in part.codes)
    for label in labels:
        if not all(label in part.codes for part in kept):
            raise disagreement(label)
    return TokenLabels(
        {label: np.concatenate([part.codes[label] for part in kept]) for label in labels},
        {label: tuple(names[label]) for label in labels},
    )


def all_names(parts: Sequence[LabelValues], before: LabelValues | None = None) -> dict[str, list[str]]:
    """The values of all parts: those that have numbers already (`before`) first, then the others in order. Raises
    InputError for a label with more values than MOST_VALUES."""
    found: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for part in (before or {}, *parts) for label in part):
        first = list((before or {}).get(label, ()))
        rest = {value for part in parts for value in part.get(label, ())}.difference(first)
        found[label] = [*first, *sorted(rest)]
        if len(found[label]) > MOST_VALUES:
            raise InputError(
                f"corpus.labels: the spans of {label!r} have more than {MOST_VALUES:,} different values (the last are "
                f"{', '.join(map(repr, sorted(rest)[-3:]))}), and the moments of each are kept for every site: give "
                "classes, not texts or identifiers, or leave the label out"
            )
    return found


def disagreement(label: str) -> InputError:
    return InputError(
        f"corpus.labels: {label!r} is a list of spans or tokens in some files and a single value in others; give it "
        "one form in all of them"
    )
