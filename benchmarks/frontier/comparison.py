"""Frontiers of FVU against L0: which points are on them, and where ours stands at a peer's."""

import math
from itertools import groupby
from typing import Any

import numpy as np

from benchmarks.frontier.cells import KINDS, OURS

Result = dict[str, Any]


def frontier(results: list[Result], library: str, kind: str) -> list[Result]:
    """A library's points of a kind that no other of them beats in FVU with no more latents a row, by L0."""
    points = sorted(
        (r for r in results if (r["library"], r["kind"]) == (library, kind)), key=lambda r: (r["l0"], r["fvu"])
    )
    best: list[Result] = []
    for point in points:
        if not best or point["fvu"] < best[-1]["fvu"]:
            best.append(point)
    return best


def best_at(l0: float, results: list[Result], library: str, kind: str) -> float | None:
    """A library's FVU of a kind at an L0, with the best learning rate; None if no rate's points reach so far."""
    found = sorted(
        (r["settings"].get("lr") or 0, r["l0"], r["fvu"])
        for r in results
        if (r["library"], r["kind"]) == (library, kind)
    )
    rates = [[(l0, fvu) for _, l0, fvu in group] for _, group in groupby(found, key=lambda point: point[0])]
    return min((at for points in rates if (at := fvu_at(l0, points)) is not None), default=None)


def fvu_at(l0: float, points: list[tuple[float, float]]) -> float | None:
    """Between (L0, FVU) points, in a line over log L0; None beyond them by more than 2 %: a k is met that well."""
    points = [point for point in points if point[0] > 0]
    if not points or not points[0][0] * 0.98 <= l0 <= points[-1][0] * 1.02:
        return None
    logs, fvus = np.log([p[0] for p in points]), [p[1] for p in points]
    return float(np.interp(math.log(l0), logs, fvus))


def compare(results: list[Result]) -> dict[str, tuple[float | None, float | None]]:
    """For each point of the peers' frontiers, by its name, its FVU less ours at its L0: of the same kind, and of our
    best kind. None: ours does not reach this L0. Above zero, ours is better."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for library in dict.fromkeys(r["library"] for r in results if r["library"] != OURS):
        for point in (r for kind in KINDS for r in frontier(results, library, kind)):
            of_kinds = {kind: at for kind in KINDS if (at := best_at(point["l0"], results, OURS, kind)) is not None}
            same = of_kinds.get(point["kind"])
            found[point["name"]] = (
                None if same is None else point["fvu"] - same,
                point["fvu"] - min(of_kinds.values()) if of_kinds else None,
            )
    return found


def table(results: list[Result]) -> str:
    """The frontiers; beside a peer's points, how much higher its FVU is than ours there."""
    lines = [
        "| kind | library | setting | L0 | FVU | dead | s | less ours of the kind | less our best |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    verdicts = compare(results)
    for kind in KINDS:
        for library in dict.fromkeys(r["library"] for r in results):
            for r in frontier(results, library, kind):
                settings = ", ".join(
                    f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in r["settings"].items()
                )
                shown = ["" if v is None else f"{v:+.4f}" for v in verdicts.get(r["name"], (None, None))]
                lines.append(
                    f"| {kind} | {library} | {settings} | {r['l0']:.1f} | {r['fvu']:.4f} | {r['dead_share']:.1%} | "
                    f"{r['seconds']:.0f} | {shown[0]} | {shown[1]} |"
                )
    return "\n".join(lines)


def beside(results: list[Result]) -> str:
    """For each kind the peers' frontiers as "L0: theirs, ours of the kind"; those where ours is above in bold."""
    libraries = [library for library in dict.fromkeys(r["library"] for r in results) if library != OURS]
    lines = [
        f"| kind | {' | '.join(f'L0: {library}, ours' for library in libraries)} |",
        "|---|" + "---|" * len(libraries),
    ]
    for kind in KINDS:
        cells = ["; ".join(_point(r, results) for r in frontier(results, library, kind)) for library in libraries]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _point(peer: Result, results: list[Result]) -> str:
    ours = best_at(peer["l0"], results, OURS, peer["kind"])
    text = f"{peer['l0']:.1f}: {peer['fvu']:.4f}, {'-' if ours is None else f'{ours:.4f}'}"
    return f"**{text}**" if ours is not None and ours > peer["fvu"] else text


def summary(results: list[Result]) -> str:
    """How often ours is at or below, and where it is not."""
    lines, verdicts = [], compare(results)
    for place, what in enumerate(("of the same kind", "of our best kind")):
        known = {name: v[place] for name, v in verdicts.items() if v[place] is not None}
        worse = [f"{name} ({v:+.4f})" for name, v in known.items() if v is not None and v < 0]
        lines.append(
            f"Ours {what} is at or below the peer's FVU at {len(known) - len(worse)} of {len(known)} points "
            f"({len(verdicts) - len(known)} beyond our L0)" + (f"; not at: {'; '.join(worse)}" if worse else "") + "."
        )
    return "\n".join(lines)
