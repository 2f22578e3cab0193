"""What a run writes: gpu.json with everything, gpu.md with tables.

Both are written anew after each measurement, so that a run that is killed leaves what it had.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Case, CopyCase, HarvestCase, StepCase
from benchmarks.gpu.worker import Outcome

TESTS = "tests/gpu"


@dataclass
class Results:
    folder: Path
    about: dict[str, Any]
    """Date, machine, and how the run was asked for."""
    outcomes: dict[str, tuple[Case | None, Outcome]] = field(default_factory=dict)
    """By name, in the order in which they were asked for; the tests have no case."""

    def add(self, name: str, case: Case | None, outcome: Outcome) -> None:
        """Take in an outcome, and write both files."""
        self.outcomes[name] = (case, outcome)
        self.write()

    def write(self) -> None:
        measurements = {
            name: {
                "case": None if case is None else {"kind": type(case).__name__, **asdict(case)},
                **{key: value for key, value in asdict(outcome).items() if value},
            }
            for name, (case, outcome) in self.outcomes.items()
        }
        _write_whole(self.folder / "gpu.json", json.dumps({**self.about, "measurements": measurements}, indent=1))
        _write_whole(self.folder / "gpu.md", self.tables())

    def tables(self) -> str:
        """Return all of it as Markdown."""
        parts = [
            self._heading(),
            self._tests(),
            _table(HARVEST_COLUMNS, self._rows(HarvestCase, _harvest_row)),
            _table(STEP_COLUMNS, self._rows(StepCase, _step_row)),
            _table(COPY_COLUMNS, self._rows(CopyCase, _copy_row)),
            self._left_out(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _heading(self) -> str:
        machine = self.about.get("machine", {})
        versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if machine.get(name))
        where = machine.get("card") or f"no card ({machine.get('processor', 'unknown')})"
        return f"{where}, {self.about['date'][:10]}: {versions}"

    def _tests(self) -> str:
        if TESTS not in self.outcomes:
            return ""
        _, outcome = self.outcomes[TESTS]
        counts = [f"{outcome.figures[name]} {name}" for name in TEST_COUNTS if outcome.figures.get(name)]
        return f"{TESTS}: {', '.join(counts) or 'none ran'}" + (f" ({outcome.reason})" if outcome.reason else "")

    def _rows(self, kind: type[Case], row: Any) -> Iterable[Sequence[str]]:
        for case, outcome in self.outcomes.values():
            if isinstance(case, kind) and outcome.status == "measured":
                yield [case.name, *row(outcome.figures)]

    def _left_out(self) -> str:
        lines = [
            f"- {name}: {outcome.status}: {outcome.reason}"
            for name, (case, outcome) in self.outcomes.items()
            if case is not None and outcome.status != "measured"
        ]
        return "\n".join(["Without figures:", "", *lines]) if lines else ""


VERSIONS = ("driver", "cuda", "torch", "transformers", "python")
TEST_COUNTS = ("passed", "failed", "error", "skipped")
HARVEST_COLUMNS = (
    "harvest", "tokens/s", "of the forward pass", "forward pass, tokens/s", "of its products", "idle",
    "norms and moments", "peak GiB (forward pass)",
)  # fmt: skip
STEP_COLUMNS = ("step", "ms", "of the encoder's product", "rows on the card", "product, TFLOP/s", "parts, ms")
COPY_COLUMNS = ("copy", "GB/s")


def _harvest_row(figures: dict[str, Any]) -> list[str]:
    rates, peak = figures["positions_per_s"], figures["peak_gib"]
    return [
        f"{rates['harvest']:,.0f}",
        f"{figures['harvest_of_forward']:.2f}",
        f"{rates['forward']:,.0f}",
        f"{figures['forward_of_products']:.2f}",
        _share(figures["idle_share"]),
        # How much of a unit's time their thread works: near 100 % they are what the harvest waits for.
        _share(figures["summarise_s"] / figures["unit_s"]),
        "" if peak["harvest"] is None else f"{peak['harvest']:.1f} ({peak['forward']:.1f})",
    ]


def _step_row(figures: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in figures["pieces"].items())
    return [
        f"{1000 * figures['seconds']['ours']:.1f}",
        f"{figures['step_of_product']:.2f}",
        f"{figures['step_on_card_of_product']:.2f}",
        f"{figures['product_tflops']:.1f}",
        parts,
    ]


def _copy_row(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['gb_per_s']:.1f}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines])


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader finds the old file or the new one, never a part."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text)
    new.replace(path)
