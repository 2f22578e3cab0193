"""The tables of docs/lrb.md: python -m benchmarks.lrb [SECTION ...]

Each section is a list of cells of the Linear Representation Bench (`granary bench lrb`). Cells that were run are lines
of benchmarks/lrb_results.jsonl, under the digest of everything that determines them; those that are missing are run,
and the section's table in docs/lrb.md is written anew after each. So it goes on where it was, on another day too.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from jobs.bench.lrb_page import ABSORPTION, SPURIOUS, defined, differences, shown, told_apart, verdict
from pipeline.lrb.methods import ARMS, SIZES, TRUTH, Cell, described, full, methods, resolve
from storage.format.records import Record, digest
from workers.bench.cells import identity_of, run_cells
from workers.cluster.connect import connected

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "lrb_results.jsonl", HERE.parent / "docs" / "lrb.md"
TABLE = ("relu", "jumprelu", "topk", "batch_topk", "matryoshka", "transcoder", "crosscoder")
FAMILIES = ("hierarchy", {"parents": 20, "children": 4, "child_share": 0.2})
Changes = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Row:
    """Lines of a section's table: one a method and arm."""

    size: str
    methods: Sequence[str]
    arms: Sequence[str] = ARMS
    seeds: int = 3
    changes: Changes = ()

    def cells(self) -> list[Cell]:
        size = SIZES[self.size]()
        return [
            Cell(size, method, arm, seed, self.changes)
            for seed in range(self.seeds)
            for method in self.methods
            for arm in self.arms
        ]


def sweep(size: str, method: str, name: str, values: Sequence[object], rest: Changes = (), **how: object) -> list[Row]:
    return [Row(size, (method,), changes=((name, value), *rest), **how) for value in values]  # type: ignore[arg-type]


SECTIONS: dict[str, list[Row]] = {
    "half": [Row("half", TABLE)],
    "full": [Row("full", ("topk", "batch_topk", "relu"), ("plain", "anchored"))],
    "loose k": sweep("quarter", "topk", "k", (6, 10, 16, 32, 64, 128), (("anchors", 100),)),
    "anchors": sweep("quarter", "topk", "anchors", (10, 25, 50, 100, 150), (("k", 64),)),
    "weight": sweep("quarter", "topk", "anchoring", (0.001, 0.01, 0.1, 1.0), (("k", 64), ("anchors", 100))),
    "sides": sweep("quarter", "topk", "sides", ("both", "encoder", "decoder"), (("k", 64), ("anchors", 100))),
    "relu": [
        *sweep("quarter", "relu", "l1", (0.1, 0.5, 1.0, 2.0, 5.0), arms=("plain",)),
        *sweep("quarter", "relu", "encoder_scale", (1.0,), arms=("plain",)),
        *sweep("quarter", "relu", "l1", (0.1, 2.0), rest=(("clip", None),), arms=("plain",)),
        *sweep("quarter", "relu", "encoder_scale", (1.0,), rest=(("clip", None),), arms=("plain",)),
    ],
    "jumprelu": [
        *(
            Row("quarter", ("jumprelu",), ("plain",), changes=(("threshold", threshold), ("l0", l0)))
            for threshold in (0.1, 1.0, 2.5)
            for l0 in (1e-3, 1e-2)
        ),
        *sweep("quarter", "jumprelu", "threshold", (0.1, 1.0), rest=(("clip", None),), arms=("plain",)),
    ],
    "encoder": [
        *sweep("quarter", "topk", "tied", (False, True), arms=("plain",)),
        *sweep("quarter", "topk", "noise", (0.05, 0.2), arms=("plain",)),
    ],
    "absorption": [
        Row("quarter", TABLE, changes=(FAMILIES, ("k", 6), ("anchors", 10))),
    ],
    "minima": [
        Row("quarter", TABLE, ("plain", TRUTH)),
        *sweep("quarter", "topk", "k", (64,), arms=("plain", TRUTH)),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a cell")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="first take over the cells that are done there")
    parser.add_argument("--tables", action="store_true", help="run nothing: write the tables of what is there")
    arguments = parser.parse_args()
    results = read_results()
    for path in sorted((arguments.take / "cells").glob("*.json")) if arguments.take else ():
        keep(results, json.loads(path.read_text()))
    names = arguments.section or list(SECTIONS)
    if not arguments.tables:
        with connected("local", cpus=arguments.threads):
            for name in names:
                run_section(name, results, arguments.threads)
    for name in names:
        write_section(name, content_of(name, results))
    write_section("recipes", recipes())


def run_section(name: str, results: dict[str, Record], threads: int) -> None:
    """Run a section's missing cells; its table is written anew after each."""
    cells = [cell for row in SECTIONS[name] for cell in row.cells() if key_of(identity_of(cell)) not in results]
    print(f"{name}: {len(cells)} cells to run", flush=True)
    for cell, record in run_cells(cells, HERE.parent / ".bench-venv" / "lrb", threads):
        keep(results, record)
        write_section(name, content_of(name, results))
        print(f"  {cell.method} {cell.arm} {cell.seed} {dict(cell.changes)}: {record['decoder']}", flush=True)


def content_of(name: str, results: dict[str, Record]) -> str:
    return (minima if name == "minima" else table)(SECTIONS[name], results)


def key_of(identity: Record) -> str:
    return digest(identity)[:16]


def read_results() -> dict[str, Record]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def keep(results: dict[str, Record], record: Record) -> None:
    """Append a cell's record, without the identity that its key stands for."""
    key = key_of(record["identity"])
    if key not in results:
        results[key] = {"key": key, **{k: v for k, v in record.items() if k != "identity"}}
        with RESULTS.open("a") as file:
            file.write(json.dumps(results[key]) + "\n")


def write_section(name: str, content: str) -> None:
    """Put a section's content between its marks in docs/lrb.md."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = PAGE.read_text()
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not after and end not in rest:
        raise SystemExit(f"{PAGE} has no marks {begin} and {end} for the table")
    PAGE.write_text(f"{before}{begin}\n{content}{end}{after}")


def recipes() -> str:
    """What each method is, at each size, beside the library's defaults."""
    lines = [f"| {' | '.join(['method', *SIZES])} |", f"|{'---|' * (1 + len(SIZES))}"]
    for method in methods(full()):
        of = [described(resolve(Cell(size(), method, "plain", 0))[1]) for size in SIZES.values()]
        lines.append(f"| {' | '.join([method, *of])} |")
    return "\n".join(lines) + "\n"


def minima(rows: Sequence[Row], results: dict[str, Record]) -> str:
    """Minima from random weights beside those from the truth: what is missed, and whether the loss says so."""
    lines = [
        "| method | seeds | loss | from the truth | difference | spurious | L0 | from the truth | decoder M_GT % | "
        "from the truth | polysemantic % | unserved % | dead % | FVU | of the configuration itself |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for method in row.methods:
            records = [r for r in found_of(row, results) if r["method"] == method]
            of = {arm: [r for r in records if r["arm"] == arm] for arm in row.arms}
            if all(of.values()):
                plain = of["plain"]
                more = differences(records, method, "plain", TRUTH, None, "loss")
                cells = [
                    named(row, method),
                    str(len(plain)),
                    *(f"{mean(r['loss'] for r in part):.4f}" for part in of.values()),
                ]
                cells += [shown(more, "loss", sign="+"), SPURIOUS[told_apart(more)]]
                cells += [f"{mean(r['l0'] for r in part):.1f}" for part in of.values()]
                cells += [f"{100 * mean(r['decoder']['m_gt'] for r in part):.1f}" for part in of.values()]
                cells += [f"{100 * mean(r[name] for r in plain):.1f}" for name in ("polysemantic", "unserved", "dead")]
                cells += [f"{mean(r['fvu'] for r in plain):.4f}", f"{mean(r['fvu_at_truth'] for r in of[TRUTH]):.4f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", about(rows, results)]) + "\n"


def found_of(row: Row, results: dict[str, Record]) -> list[Record]:
    """The records of a row's cells, as far as they were run."""
    return [found for cell in row.cells() if (found := results.get(key_of(identity_of(cell)))) is not None]


def table(rows: Sequence[Row], results: dict[str, Record]) -> str:
    absorbing = any(FAMILIES in row.changes for row in rows)
    head = ["method", "arm", "seeds", "decoder M_GT %", "decoder M_IP"]
    head += ["absorbed, others %", "absorbed, anchored %"] if absorbing else ["encoder M_GT %", "encoder M_IP"]
    head += ["FVU", "L0"]
    compared = any("anchored" in row.arms for row in rows)
    head += ["minus plain, M_GT %", "minus plain, M_IP", "better than plain", "than random"] if compared else []
    lines = [
        f"| {' | '.join(head)} |",
        "|---|---|" + "--:|" * (len(head) - 4) + ("---|---|" if compared else "--:|--:|"),
    ]
    for row in rows:
        records = found_of(row, results)
        for method in row.methods:
            for arm in row.arms:
                of = [r for r in records if r["method"] == method and r["arm"] == arm]
                if of:
                    compare = _compared(method, arm, records) if compared else []
                    lines.append(f"| {' | '.join([*_figures(row, method, arm, of, absorbing), *compare])} |")
    return "\n".join([*lines, "", about(rows, results)]) + "\n"


def about(rows: Sequence[Row], results: dict[str, Record]) -> str:
    """The size's constants, how far MCC is from M_IP, and where and how long the cells ran."""
    size, records = SIZES[rows[0].size](), [record for row in rows for record in found_of(row, results)]
    machines = {f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in records}
    apart = (f"{max(abs(r[side]['m_ip'] - r[side]['mcc']) for r in records):.0e}" for side in ("decoder", "encoder"))
    return (
        f"n = {size.bench.features}, n_p = {size.bench.width}, F = {size.latents}, N = {size.bench.samples:,}, "
        f"S = {size.bench.sparsity}, M = {size.bench.interference}; {size.steps} steps of {size.batch_rows} rows at "
        f"{size.learning_rate:g} (jumprelu: twice as many), k = {size.k}, {size.anchors} anchors where no row says "
        f"otherwise. MCC is M_IP within {' (decoder) and '.join(apart)} (encoder). {'; '.join(sorted(machines))}: "
        f"{sum(r['cpu_minutes'] for r in records):.0f} minutes of CPU, cells of one thread."
    )


def named(row: Row, method: str) -> str:
    return ", ".join([method, *(f"{name} = {value}" for name, value in row.changes if name != "hierarchy")])


def _figures(row: Row, method: str, arm: str, of: list[Record], absorbing: bool) -> list[str]:
    cells = [named(row, method), arm, str(len(of))]
    for side in ("decoder",) if absorbing else ("decoder", "encoder"):
        cells += [shown([r[side][figure] for r in of], figure) for figure in ("m_gt", "m_ip")]
    if absorbing:
        rates = [defined(of, group, "rate") for group in ABSORPTION]
        cells += [shown(values, "m_gt") if values else "" for values in rates]
    return [*cells, f"{mean(r['fvu'] for r in of):.4f}", f"{mean(r['l0'] for r in of):.1f}"]


def _compared(method: str, arm: str, records: list[Record]) -> list[str]:
    """An arm against plain, and the anchored one against random anchors."""
    gains = {
        base: [differences(records, method, arm, base, "decoder", figure) for figure in ("m_gt", "m_ip")]
        for base in ("plain", "random")
    }
    by_arm = {"plain": (), "anchored": ("plain", "random"), "random": ("plain",)}[arm]
    verdicts = [verdict(*gains[base]) if base in by_arm and gains[base][0] else "" for base in ("plain", "random")]
    if arm == "plain" or not gains["plain"][0]:
        return ["", "", *verdicts]
    m_gt, m_ip = gains["plain"]
    return [shown(m_gt, "m_gt", sign="+"), shown(m_ip, "m_ip", sign="+"), *verdicts]


if __name__ == "__main__":
    main()
