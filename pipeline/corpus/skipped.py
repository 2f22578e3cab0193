"""What was left out of a corpus, counted by reason: nothing is dropped in silence.

A reason may come with words about one record, as those in which a chat template refuses a chat. There may be as many of
these as records: they are not counted apart, and those about the first record are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES_KEPT = 5
MOST_LETTERS = 160
"""Words about a record are cut after this many letters."""
_SAYING = "\n"
"""Stands between a reason, which is one line, and words."""


def with_words(reason: str, words: str) -> str:
    """A reason for leaving a record out, with words about it: made one line that any terminal can show, and
    shortened."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(words.split()))
    return f"{reason}{_SAYING}{line if len(line) <= MOST_LETTERS else f'{line[:MOST_LETTERS]} ...'}" if line else reason


@dataclass
class Skipped:
    """How many source records gave no rows, by reason, and the keys of the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """The record numbers and names of the first few, in the order of the corpus."""
    said: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> the number of the first record that came with words, and the words."""

    @classmethod
    def of(cls, left_out: pa.Table) -> "Skipped":
        """From a table of `pipeline.corpus.documents.LEFT_OUT`."""
        found = cls()
        grouped = left_out.sort_by("record").combine_chunks()
        reasons = pc.list_element(pc.split_pattern(grouped.column("reason"), _SAYING, max_splits=1), 0)
        for reason in pc.unique(reasons).to_pylist():
            lines = grouped.filter(pc.equal(reasons, reason))
            head = lines.slice(0, EXAMPLES_KEPT)
            found.counts[reason] = lines.num_rows
            found.first[reason] = list(
                zip(head.column("record").to_pylist(), head.column("source").to_pylist(), strict=True)
            )
            told = lines.filter(pc.match_substring(lines.column("reason"), _SAYING)).slice(0, 1).to_pylist()
            if told:
                found.said[reason] = told[0]["record"], told[0]["reason"].partition(_SAYING)[2]
        return found

    @classmethod
    def sum(cls, parts: Iterable["Skipped"]) -> "Skipped":
        total = cls()
        for part in parts:
            for reason, count in part.counts.items():
                total.counts[reason] = total.counts.get(reason, 0) + count
                total.first[reason] = sorted([*total.first.get(reason, []), *part.first[reason]])[:EXAMPLES_KEPT]
            for reason, words in part.said.items():
                total.said[reason] = min(total.said.get(reason, words), words)
        return total

    def to_record(self) -> dict[str, Any]:
        return {
            reason: {
                "count": count,
                "first": [name for _, name in self.first[reason]],
                **({"said": self.said[reason][1]} if reason in self.said else {}),
            }
            for reason, count in sorted(self.counts.items())
        }
