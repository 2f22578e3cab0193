"""`granary status`: what a store holds and how far its harvests are, from the store alone."""

from collections.abc import Sequence
from dataclasses import asdict

from jobs.plan.price_tables import storage_costs
from jobs.progress import counted, duration, extreme_norms, left_out, loss_recovered, size
from jobs.token_rows import chat_words, token_rows_of, token_words
from storage.errors import StorageError
from storage.format.records import Record
from storage.format.site_refs import SiteRef
from storage.harvest.harvest import Harvest
from storage.harvest.history import read_history
from storage.harvest.log import log_of
from storage.harvest.progress import harvest_progress
from storage.read.extreme_rows import extreme_rows
from storage.results.anchors import anchor_names, read_anchors
from storage.results.runs import list_runs
from storage.store import Store
from storage.table.token_pieces import TokenStrings


def status_record(store: Store) -> Record:
    """Rows, harvests with their units, anchors, and runs. Takes some seconds more where drivers seem to be at work."""
    info, strings = store.info, TokenStrings(store)
    harvests = [_harvest_record(store, harvest) for harvest in store.harvests]
    runs = []
    for run in list_runs(store):
        curve, evaluation, training = run.curve(), run.evaluation(), run.record()["identity"]["training"]
        keys = ("fvu", "l0", "dead_share", "loss")
        runs.append(
            {
                "run": run.name,
                "finished": run.is_finished,
                "step": curve[-1]["step"] + 1 if curve else 0,
                "steps": training["steps"],
                "products": training.get("products"),
                "evaluation": None if evaluation is None else {k: evaluation[k] for k in keys},
            }
        )
    return {
        "store": store.url,
        "rows": info.num_rows,
        "contexts": info.num_contexts,
        "documents": info.num_documents,
        "labels": info.labels,
        "columns": info.plan.get("columns", []),
        "row_labels": {label: len(values) for label, values in info.values_of_rows.items()},
        "token_rows": token_rows_of(store, strings),
        "left_out": info.skipped,
        "units": info.num_units,
        "held_out_rows": info.num_rows - info.held_out_start,
        "segments": info.segments,
        "grown_from": [table["num_rows"] for table in info.grown_from],
        "harvests": harvests,
        "extreme_norms": found_extreme(store, store.sites, strings),
        "anchors": {name: len(read_anchors(store, name).values) for name in anchor_names(store)},
        "runs": runs,
    }


def found_extreme(store: Store, sites: Sequence[str], strings: TokenStrings | None = None) -> list[Record]:
    """Rows of extreme norm at some sites. Damage there is said, and keeps nothing else from being shown."""
    try:
        return [asdict(found) for found in extreme_rows(store, sites, strings)]
    except StorageError as error:
        return [{"unread": str(error)}]


def _harvest_record(store: Store, harvest: Harvest) -> Record:
    """One harvest: its units, who is at work on it, and what its commits tell."""
    info = store.info
    log = log_of(store, harvest)
    progress = harvest_progress(log)
    history = read_history(log, progress.committed)
    rows_left = sum(b - a for a, b in map(info.unit_rows, progress.committed.complement()))
    rate = progress.rows_per_second or history.rows_per_second
    layouts = harvest.sites
    return {
        "harvest": harvest.digest,
        "model": harvest.model,
        "sites": list(layouts),
        "dtype": ", ".join(dict.fromkeys(layout.dtype for layout in layouts.values())),
        "d_model": store.array(str(SiteRef(next(iter(layouts)), harvest.model))).shape[1],  # raises if it is damaged
        "computed": harvest.identity.computed,
        "bytes": info.num_rows * sum(layout.row_bytes for layout in layouts.values()),
        "units": info.num_units,
        "units_committed": len(progress.committed),
        "units_in_progress": sorted(progress.in_flight),
        "units_failed": [{"unit": f.unit, "errors": list(f.errors)} for f in progress.failed],
        "drivers": [driver.id for driver in progress.drivers],
        "drivers_silent": progress.silent,
        "drivers_unreadable": progress.unreadable,
        "rows_per_second": rate,
        "seconds_left": rows_left / rate if rate and rows_left else None,
        "commits_read": history.commits,
        "padding_share": history.padding_share,
        "idle_share": history.idle_share,
        "rounding": {
            site: {
                "dtype": layout.dtype,
                "relative_error": history.relative_errors.get(site),
                "reference_fvu_change": storage_costs().types[layout.dtype].fvu_change,
            }
            for site, layout in layouts.items()
        },
    }


def _label_words(record: Record) -> list[str]:
    return [
        *record["labels"],
        *(f"{label} (of rows, {counted(number, 'value')})" for label, number in record["row_labels"].items()),
    ]


def status_text(record: Record) -> str:
    lines = [
        f"store     {record['store']}",
        f"rows      {record['rows']:,} of {record['documents']:,} documents in {record['contexts']:,} contexts; "
        f"{record['units']} units; {record['held_out_rows']:,} rows held out",
        f"labels    {', '.join(_label_words(record)) or 'none'}",
        *([f"columns   {', '.join(record['columns'])}"] if record["columns"] else []),
        f"tokens    {token_words(record['token_rows'])}",
        *([f"chats     {chats}"] if (chats := chat_words(record["token_rows"])) else []),
    ]
    if len(record["segments"]) > 1:
        lines += [
            f"segment   {s['rows']:,} rows of {s['documents']:,} documents: {s['of']}" for s in record["segments"]
        ]
    if record["grown_from"]:
        lines.append(f"grown     from {', then '.join(f'{rows:,}' for rows in record['grown_from'])} rows")
    lines += [f"documents {left_out(reason, entry)}" for reason, entry in record["left_out"].items()]
    for h in record["harvests"]:
        lines += _harvest_lines(h)
    lines += [f"norms     {extreme_norms(found)}" for found in record["extreme_norms"]]
    lines += [f"anchors   {name}: {count} directions" for name, count in record["anchors"].items()]
    for run in record["runs"]:
        state = "trained" if run["finished"] else f"step {run['step']:,} of {run['steps']:,}"
        if run["evaluation"]:
            e = run["evaluation"]
            state += f"; FVU {e['fvu']:.3f}, L0 {e['l0']:.1f}, {loss_recovered(e['loss'])}"
        lines.append(f"run       {run['run']}: {state}{_products(run['products'])}")
    return "\n".join(lines)


def _products(products: Record | None) -> str:
    """What a dictionary's products are computed in, as far as its run says."""
    if products is None:
        return ""
    if not products["sparse"]:
        return "; exact"
    dense = "" if products["dense"] == "float32" else f", dense products in {products['dense']}"
    return f"; latents selected in {products['selection']}{dense}"


def _computed(how: Record) -> str:
    """How the model ran, as far as the harvest says."""
    if "device" not in how:
        return ""
    threads = "" if how["threads_per_worker"] is None else f", {counted(how['threads_per_worker'], 'thread')}"
    blocks = "" if how.get("attention_in_blocks", True) else ", attention not in blocks"
    compiled = f", compiled{blocks}" if how["compile"] else ""
    return f"computed in {how['dtype']} on {how['device']}{threads}{compiled}"


def _harvest_lines(h: Record) -> list[str]:
    complete = h["units_committed"] == h["units"]
    done = "complete" if complete else f"{h['units_committed']:,} of {h['units']:,} units"
    wasted = "" if h["padding_share"] is None else f"; {100 * h['padding_share']:.1f} % padding"
    wasted += "" if h["idle_share"] is None else f"; GPUs idle {100 * h['idle_share']:.1f} % of the time"
    what = f"{', '.join(h['sites'])} of {h['model']}, {h['dtype']} x {h['d_model']}"
    lines = [f"harvest   {what}, {size(h['bytes'])}: {done}{wasted}"]
    if computed := _computed(h["computed"]):
        lines.append(_indented(computed))
    if not complete:
        lines.append(_indented(_work(h)))
    lines += [
        _indented(f"unit {failed['unit']} failed {len(failed['errors'])} times: {failed['errors'][-1]}")
        for failed in h["units_failed"]
    ]
    lines += [_indented(f"note: {unreadable}") for unreadable in h["drivers_unreadable"]]
    errors: dict[str, list[str]] = {}
    for site, rounding in h["rounding"].items():
        if rounding["relative_error"] is not None:
            errors.setdefault(_cost(rounding), []).append(site)
    for cost, sites in errors.items():
        lines.append(_indented(cost + (f" ({', '.join(sites)})" if len(errors) > 1 else "")))
    return lines


def _cost(rounding: Record) -> str:
    """What storing a site as it is stored has cost."""
    error = rounding["relative_error"]
    if error == 0:
        return f"{rounding['dtype']} holds exactly what the model computed"
    change = rounding["reference_fvu_change"]
    return f"{rounding['dtype']} is off by {error:.1e} of ||x||^2; the FVU of a reference autoencoder by {change:+.0e}"


def _work(h: Record) -> str:
    """Who is at work on the rest, and when it will be done."""
    rate = f"{h['rows_per_second']:,.0f} rows/s" if h["rows_per_second"] else "it has no rate yet"
    left = "" if h["seconds_left"] is None else f", {duration(h['seconds_left'])} left"
    if h["drivers"]:
        return f"{len(h['units_in_progress'])} in progress by {counted(len(h['drivers']), 'driver')}; {rate}{left}"
    gone = f"; {len(h['drivers_silent'])} was killed or stands still" if h["drivers_silent"] else ""
    past = f"it went at {rate}{left} when it goes on" if h["rows_per_second"] else rate
    return f"no driver at work{gone}; {past}: `granary harvest SPEC`"


def _indented(text: str) -> str:
    return f"          {text}"
