"""Progress with rate and time left: one line that changes on a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

MIN_INTERVAL_S = 0.2
LOG_INTERVAL_S = 60
"""Where the output is no terminal: often enough to show that a submitted job lives."""


class ProgressLine:
    """Shows `done` of `total` units of something. Use as a context manager; the line is cleared at the end."""

    def __init__(self, what: str, unit: str, total: int = 0, stream: TextIO | None = None):
        """`total` 0 means unknown: then there is no time left to show."""
        self.what, self.unit, self.total = what, unit, total
        self.stream = stream or sys.stderr
        self.started = self.shown = time.monotonic()
        self.first_done: int | None = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say how much is done. Work that was done before this process began does not count into the rate."""
        now = time.monotonic()
        self.total = self.total if total is None else total
        if self.first_done is None:
            self.first_done, self.started = done, now
        is_terminal = self.stream.isatty()
        is_early = now - self.shown < (MIN_INTERVAL_S if is_terminal else LOG_INTERVAL_S)
        if is_early and not (is_terminal and done == self.total):
            return
        self.shown = now
        rate = (done - self.first_done) / max(now - self.started, 1e-9)
        parts = [f"{self.what}  {done:,}" + (f" of {self.total:,} {self.unit}" if self.total else f" {self.unit}")]
        if rate > 0:
            parts.append(f"{rate:,.0f} {self.unit}/s")
            if self.total:
                parts.append(f"{duration((self.total - done) / rate)} left")
        text = "  ".join([*parts, note] if note else parts)
        self.stream.write(f"\r\x1b[K{text}" if is_terminal else f"{text}\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """'1 h 05 min', '2 min 10 s', '8 s', 'under a second'."""
    if seconds < 1:
        return "under a second"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def counted(number: int, noun: str) -> str:
    """'1 document', '2,000 documents'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def left_out(reason: str, entry: Mapping[str, Any]) -> str:
    """'2 documents left out: empty (first: a.jsonl:3, a.jsonl:9)'. Words about the first stand behind the reason."""
    said = f": {entry['said']}" if "said" in entry else ""
    return f"{counted(entry['count'], 'document')} left out: {reason}{said} (first: {', '.join(entry['first'])})"


def loss_recovered(loss: Mapping[str, Any] | None) -> str:
    """'98.1 % of the loss recovered (97.0 % against the mean)'. A dictionary over two models has no such loss, as no
    one model runs it."""
    if loss is None:
        return "no loss to recover (it is over several models)"
    zero, mean = loss["recovered_against_zero"], loss["recovered_against_mean"]
    return f"{100 * zero:.1f} % of the loss recovered ({100 * mean:.1f} % against the mean)"


def no_held_out_rows(lacking: Mapping[str, Sequence[str]], most: int = 5) -> str:
    """ "no held-out rows of kind docs; of package re, html": labels and their values that no held-out row has. Of more
    values than `most` the first ones."""
    parts = []
    for label, values in lacking.items():
        more = f" and {len(values) - most:,} more" if len(values) > most else ""
        parts.append(f"of {label} {', '.join(values[:most])}{more}")
    return f"no held-out rows {'; '.join(parts)}"


def extreme_norms(found: Mapping[str, Any]) -> str:
    """What `storage.read.extreme_rows.ExtremeRows` found, and the keys that leave such rows out."""

    def most(parts: Sequence[tuple[Any, float]]) -> str:
        return ", ".join(f"{value!r} ({100 * share:.0f} %)" for value, share in parts)

    if "unread" in found:
        return f"cannot be looked at: {found['unread']}"
    return (
        f"{100 * found['share']:.2g} % of {found['looked_at']:,} rows looked at at {found['site']} have more than 10 "
        f"times the median norm, up to {found['largest']:,.0f} times: at position {most(found['positions'])}, on token "
        f"{most(found['tokens'])}. train.max_norm: 10 leaves them out of training; corpus.skip_first and "
        "corpus.exclude_tokens leave such positions and tokens out of a new store"
    )


def size(num_bytes: float) -> str:
    """'1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
