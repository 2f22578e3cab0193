"""`granary status`: what a store holds, from the store alone."""

from jobs.progress import counted, size
from storage.anchors import anchor_names, read_anchors
from storage.harvests import committed_units
from storage.records import Record
from storage.runs import list_runs
from storage.store import Store


def status_record(store: Store) -> Record:
    """Rows, harvests with their committed units, anchors, and runs."""
    info = store.info
    harvests = []
    for harvest in store.harvests:
        first = store.array(f"{harvest.model}/{next(iter(harvest.sites))}")
        harvests.append(
            {
                "harvest": harvest.digest,
                "model": harvest.model,
                "sites": list(harvest.sites),
                "dtype": first.dtype,
                "d_model": first.shape[1],
                "bytes": info.num_rows * (first.row_bytes + 4) * len(harvest.sites),
                "units_committed": len(committed_units(store.path, harvest.digest)),
                "units": info.num_units,
            }
        )
    runs = []
    for run in list_runs(store):
        curve, evaluation = run.curve(), run.evaluation()
        keys = ("fvu", "l0", "dead_share", "loss")
        runs.append(
            {
                "run": run.name,
                "finished": run.is_finished,
                "step": curve[-1]["step"] + 1 if curve else 0,
                "steps": run.record()["identity"]["training"]["steps"],
                "evaluation": None if evaluation is None else {k: evaluation[k] for k in keys},
            }
        )
    return {
        "store": str(store.path),
        "rows": info.num_rows,
        "contexts": info.num_contexts,
        "documents": info.num_documents,
        "labels": info.labels,
        "left_out": info.skipped,
        "units": info.num_units,
        "held_out_rows": info.num_rows - info.held_out_start,
        "harvests": harvests,
        "anchors": {name: len(read_anchors(store, name).values) for name in anchor_names(store)},
        "runs": runs,
    }


def status_text(record: Record) -> str:
    lines = [
        f"store     {record['store']}",
        f"rows      {record['rows']:,} of {record['documents']:,} documents in {record['contexts']:,} contexts; "
        f"{record['units']} units; {record['held_out_rows']:,} rows held out",
        f"labels    {', '.join(record['labels']) or 'none'}",
    ]
    lines += [f"left out  {counted(e['count'], 'document')}: {reason}" for reason, e in record["left_out"].items()]
    for h in record["harvests"]:
        done = "complete" if h["units_committed"] == h["units"] else f"{h['units_committed']} of {h['units']} units"
        what = f"{', '.join(h['sites'])} of {h['model']}, {h['dtype']} x {h['d_model']}"
        lines.append(f"harvest   {what}, {size(h['bytes'])}: {done}")
    lines += [f"anchors   {name}: {count} directions" for name, count in record["anchors"].items()]
    for run in record["runs"]:
        state = "trained" if run["finished"] else f"step {run['step']:,} of {run['steps']:,}"
        if run["evaluation"]:
            e = run["evaluation"]
            recovered = 100 * e["loss"]["recovered_against_zero"]
            state += f"; FVU {e['fvu']:.3f}, L0 {e['l0']:.1f}, {recovered:.1f} % of the loss recovered"
        lines.append(f"run       {run['run']}: {state}")
    return "\n".join(lines)
