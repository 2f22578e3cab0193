"""What was left out of a corpus, counted by reason: nothing is dropped in silence."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES_KEPT = 5


@dataclass
class Skipped:
    """How many source records gave no rows, by reason, and the keys of the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """The record numbers and names of the first few, in the order of the corpus."""

    @classmethod
    def of(cls, left_out: pa.Table) -> "Skipped":
        """From a table of `pipeline.layout.LEFT_OUT`."""
        found = cls()
        grouped = left_out.sort_by("record")
        for reason in grouped.column("reason").unique().to_pylist():
            lines = grouped.filter(pc.equal(grouped.column("reason"), reason))
            head = lines.slice(0, EXAMPLES_KEPT)
            found.counts[reason] = lines.num_rows
            found.first[reason] = list(
                zip(head.column("record").to_pylist(), head.column("source").to_pylist(), strict=True)
            )
        return found

    @classmethod
    def sum(cls, parts: Iterable["Skipped"]) -> "Skipped":
        total = cls()
        for part in parts:
            for reason, count in part.counts.items():
                total.counts[reason] = total.counts.get(reason, 0) + count
                total.first[reason] = sorted([*total.first.get(reason, []), *part.first[reason]])[:EXAMPLES_KEPT]
        return total

    def to_record(self) -> dict[str, Any]:
        return {
            reason: {"count": count, "first": [name for _, name in self.first[reason]]}
            for reason, count in sorted(self.counts.items())
        }
