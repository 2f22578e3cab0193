"""The plan as a person reads it."""

import math

from jobs.progress import counted, duration, left_out, size
from jobs.token_rows import chat_words, token_words
from storage.format.records import Record

DAYS_PER_MONTH = 365.25 / 12


def plan_text(record: Record) -> str:
    lines = [
        f"store      {record['store']}{_there(record)}",
        f"model      {record['model']}, layers 0 to {record['layers_run'] - 1} of {record['layers_of_model']}",
        f"corpus     {record['documents']:,} documents from {len(record['files'])} file(s)",
        *(f"           {left_out(reason, entry)}" for reason, entry in record["left_out"].items()),
        f"rows       {record['rows']:,} in {record['contexts']:,} contexts, {record['units']:,} units",
        *_appended(record["rows_to_append"]),
        f"tokens     {token_words(record['token_rows'])}",
        *([f"chats      {chats}"] if (chats := chat_words(record["token_rows"])) else []),
        *([f"note       {record['notice']}"] if record["notice"] else []),
        *_site_lines(record),
        *_to_harvest_first(record["sites_to_harvest_first"]),
        f"in all     {size(record['bytes'])} in {record['objects']:,} {'files' if record['is_local'] else 'objects'}",
        *_request_lines(record),
        *_time_lines(record),
        *_money_lines(record),
        *_precision_lines(record),
    ]
    return "\n".join(lines)


def _there(record: Record) -> str:
    if not record["exists"]:
        return ""
    done = f"exists; {record['units_done']:,} of {counted(record['units'], 'unit')} have all that the spec asks for"
    left = f"; {counted(record['units_left'], 'unit')} of {record['rows_left']:,} rows left to run"
    return f" ({done}{left if record['units_left'] else ''})"


def _appended(rows: int) -> list[str]:
    return [f"           {rows:,} of them would be appended by `granary harvest --grow`"] if rows else []


def _site_lines(record: Record) -> list[str]:
    lines: list[str] = []
    for site, about in record["sites"].items():
        lead = "sites" if not lines else ""
        lines.append(f"{lead:<10} {site}: {about['dtype']} x {record['d_model']}, {size(about['bytes'])}")
    return lines


def _to_harvest_first(sites: list[str]) -> list[str]:
    """What training needs besides, which another model's spec has to harvest first."""
    if not sites:
        return []
    there = "is not in the store: harvest it" if len(sites) == 1 else "are not in the store: harvest them"
    return [f"           training also reads {', '.join(sites)}, which {there} first with the other model's spec"]


def _request_lines(record: Record) -> list[str]:
    if record["is_local"]:
        return []
    harvest, read = record["requests"], record["requests_per_pass"]
    return [
        f"requests   {harvest['put']:,} PUT, {harvest['get']:,} GET and {harvest['list']:,} LIST to harvest; "
        f"{read['get']:,} GET for a pass of training"
    ]


def _time_lines(record: Record) -> list[str]:
    if record["worker_hours"] is None:
        return ["time       unknown: give --measure to run the model here for some seconds, or --rows-per-second"]
    rate = f"{record['rows_per_second_per_worker']:,.0f} rows/s a worker ({record['rate_from']})"
    if record["worker_hours"] == 0:
        return [f"time       nothing is left to run; {rate}"]
    took = duration(record["worker_hours"] * 3600)
    if record["hours"] is None:
        return [f"time       {took} for one worker at {rate}; so much less for several"]
    return [f"time       {duration(record['hours'] * 3600)} for {counted(record['workers'], 'worker')} at {rate}"]


def _money_lines(record: Record) -> list[str]:
    cost, prices = record["cost"], record["prices"]

    def money(value: float) -> str:
        return (
            f"{value:,.2f} {prices['currency']}"
            if value >= 0.005 or value == 0
            else f"{value:.1g} {prices['currency']}"
        )

    compute = "an unknown sum" if cost["compute"] is None else money(cost["compute"])
    requests = "" if record["is_local"] else f" and {money(cost['requests'])} for requests"
    reading = "" if record["is_local"] else f", {money(cost['read'])} to read for a pass of training"
    lines = [f"money      {compute} to run the model{requests}; {money(cost['month'])} a month to keep{reading}"]
    if cost["rerun"] is not None:
        lines += [f"           {line}" for line in _break_even(record, money(cost["rerun"]))]
    lines.append(f"           at prices of {prices['as_of']} ({record['prices_from']}); yours with --prices FILE")
    return lines


def _break_even(record: Record, rerun: str) -> list[str]:
    """When storing is cheaper than the forward pass in every pass of training."""
    passes, months = record["break_even_passes"], record["break_even_months"]
    lines = [f"instead of storing, each pass of training could run the model: {rerun} a pass"]
    if passes is None:
        return [*lines, "which is never dearer than reading what was stored"]
    lines.append(f"kept for a month, storing is cheaper from {math.floor(passes) + 1:,} passes on")
    spec = f"the spec's {record['passes']:.3g} pass{'' if record['passes'] == 1 else 'es'}"
    if months == 0:
        lines.append(f"for {spec} alone it is not")
    elif months is None:  # as keeping costs nothing
        lines.append(f"for {spec} it is, however long it is kept")
    else:
        lines.append(f"for {spec} it is, if kept for less than {_span(months)}")
    return lines


def _span(months: float) -> str:
    days = months * DAYS_PER_MONTH
    if days < 2:
        return duration(max(1, days * 86400))
    return f"{days:.0f} days" if months < 2 else f"{months:,.1f} months"


def _precision_lines(record: Record) -> list[str]:
    """What storing costs: measured on the spec's own rows where they were run, else on the reference model."""
    lines: list[str] = []
    for site, about in record["sites"].items():
        lead = "precision" if not lines else ""
        if about["relative_error"] is None:
            continue
        errors = ", ".join(f"{stored} {error:.1e}" for stored, error in about["relative_error"].items())
        lines.append(f"{lead:<10} {site} stored would be off, in parts of ||x||^2, by: {errors}")
    types = {about["dtype"]: about for about in record["sites"].values()}
    for stored, about in types.items():
        lead = "precision" if not lines else ""
        lines.append(
            f"{lead:<10} {stored} on the reference model: off by {about['reference_relative_error']:.1e} of ||x||^2, "
            f"an autoencoder's FVU by {about['reference_fvu_change']:+.0e}"
        )
    return [*lines, f"           reference: {record['reference']}"]
