"""What the commits of a harvest tell of it: how fast it went, how much was padding, what rounding cost.

Read from at most `COMMITS_READ` commits, however many units there are: half of them the last ones, which tell the rate,
half from all over the rows. Times are those of the writers' clocks and used for rates alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np

from storage.format.units import UnitSet
from storage.harvest.commits import Commit, UnitFigures
from storage.harvest.log import HarvestLog

COMMITS_READ = 512
LONG_PAUSE = 20
"""So many times the median time between commits: then nobody was at work."""


@dataclass(frozen=True)
class History:
    """What was read of a harvest's past."""

    commits: int
    """How many commits this rests on."""
    rows_per_second: float | None
    """The rate of all workers together, when units were last committed; None from fewer than two commits."""
    rows_per_second_per_worker: float | None
    """The median over workers; None unless one committed two units."""
    padding_share: float | None
    """Share of the positions run that belong to no context."""
    idle_share: float | None
    """Mean share of the time of a unit that its GPU spent outside forward passes; None where all ran on CPU."""
    relative_errors: dict[str, float]
    """Site -> E||x - stored(x)||^2 / E||stored(x)||^2, with x as the model computed it."""


def read_history(log: HarvestLog, committed: UnitSet) -> History:
    """Read the commits of some of the units. Raises StorageError for a damaged one."""
    units = np.flatnonzero(committed.mask)
    if len(units) > COMMITS_READ:
        last, before = units[-COMMITS_READ // 2 :], units[: -COMMITS_READ // 2]
        spread = before[np.linspace(0, len(before) - 1, COMMITS_READ // 2).astype(np.int64)]
        units = np.concatenate([spread, last])
    return history_of(log.read_some(units.tolist()), last=COMMITS_READ // 2)


def history_of(commits: Sequence[Commit], last: int = COMMITS_READ) -> History:
    """`commits` by ascending unit; the last `last` of them are of units that follow one another."""
    recent = sorted(commits[-last:], key=_time_of)
    by_writer: dict[str, list[Commit]] = {}
    for commit in recent:
        by_writer.setdefault(commit.writer, []).append(commit)
    per_worker = [rate for of_writer in by_writer.values() if (rate := _rate(of_writer)) is not None]
    figures = [commit.figures for commit in commits if commit.figures is not None]
    positions, padding = sum(f.positions_run for f in figures), sum(f.padding for f in figures)
    idle = [f.idle_share for f in figures if f.idle_share is not None]
    return History(
        commits=len(commits),
        rows_per_second=_rate(_since_last_pause(recent)),
        rows_per_second_per_worker=median(per_worker) if per_worker else None,
        padding_share=padding / positions if positions else None,
        idle_share=fmean(idle) if idle else None,
        relative_errors=_relative_errors(figures),
    )


def _time_of(commit: Commit) -> float:
    return commit.committed_at or 0.0


def _rate(commits: Sequence[Commit]) -> float | None:
    """Rows per second from the first commit to the last."""
    if len(commits) < 2:
        return None
    seconds = _time_of(commits[-1]) - _time_of(commits[0])
    return sum(c.num_rows for c in commits[1:]) / seconds if seconds > 0 else None


def _since_last_pause(commits: Sequence[Commit]) -> Sequence[Commit]:
    """The last of the commits, all made without a long pause; at least two of them, if there are."""
    gaps = [_time_of(b) - _time_of(a) for a, b in pairwise(commits)]
    if not gaps:
        return commits
    pauses = [i for i, gap in enumerate(gaps[:-1]) if gap > LONG_PAUSE * median(gaps)]
    return commits[pauses[-1] + 1 :] if pauses else commits


def _relative_errors(figures: Sequence[UnitFigures]) -> dict[str, float]:
    errors: dict[str, list[float]] = {}
    for of_unit in figures:
        for site, cost in of_unit.rounding.items():
            sums = errors.setdefault(site, [0.0, 0.0])
            sums[0] += cost.square_error
            sums[1] += cost.square_norm
    return {site: error / norm if norm else 0.0 for site, (error, norm) in errors.items()}
