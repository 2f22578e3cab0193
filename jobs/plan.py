"""`granary plan`: what a spec would store, before anything is written."""

from pathlib import Path

from jobs.progress import ProgressLine, counted, size
from jobs.spec import Spec
from pipeline.models import describe_model
from storage.arrays import DTYPES
from storage.harvests import chunk_rows_for
from storage.records import Record
from storage.store import local_path
from workers.harvesting import prepare_harvests
from workers.planning import ensure_store, open_source, plan_rows


def plan_record(spec: Spec) -> Record:
    """Tokenise the corpus, count, and write nothing. Raises the errors that harvesting would."""
    info = describe_model(spec.model.id, spec.model.revision)
    info.check_sites(spec.harvest.parsed_sites())
    info.check_context(spec.corpus.context)
    exists = (local_path(spec.store) / "zarr.json").exists()
    if exists:  # then these only compare, and raise what contradicts it
        store, _ = ensure_store(local_path(spec.store), spec.corpus, spec.model, lambda done, total: None)
        prepare_harvests(store, spec.model, info, spec.harvest)
    source = open_source(spec.corpus, spec.model)
    with ProgressLine("planning", "rows") as line:
        rows = plan_rows(source, info.vocabulary, line.update)
    itemsize = DTYPES[spec.harvest.dtype].itemsize
    per_unit = spec.corpus.unit_size(rows.num_rows)
    units = -(-rows.num_rows // per_unit)
    chunk_rows = chunk_rows_for(per_unit, info.d_model, itemsize)
    chunks = -(-rows.num_rows // chunk_rows)
    sites = len(spec.harvest.sites)
    return {
        "store": str(local_path(spec.store)),
        "exists": exists,
        "model": info.id,
        "layers_run": 1 + max(site.layer for site in spec.harvest.parsed_sites()),
        "layers_of_model": info.num_layers,
        "files": [Path(f).name for f in source.files],
        "documents": rows.documents.num_rows,
        "left_out": rows.skipped.to_record(),
        "contexts": len(rows.prefix),
        "rows": rows.num_rows,
        "units": units,
        "sites": list(spec.harvest.sites),
        "d_model": info.d_model,
        "stored_dtype": spec.harvest.dtype,
        "bytes_per_site": rows.num_rows * info.d_model * itemsize,
        "bytes": sites * chunks * chunk_rows * (info.d_model * itemsize + 4),
        "files_to_write": 2 * sites * chunks + 2 * units,
    }


def plan_text(record: Record) -> str:
    lines = [
        f"store      {record['store']}{' (exists)' if record['exists'] else ''}",
        f"model      {record['model']}, layers 0 to {record['layers_run'] - 1} of {record['layers_of_model']}",
        f"corpus     {record['documents']:,} documents from {len(record['files'])} file(s)",
        *(
            f"           {counted(e['count'], 'document')} left out: {reason}"
            for reason, e in record["left_out"].items()
        ),
        f"rows       {record['rows']:,} in {record['contexts']:,} contexts, {record['units']:,} units",
        f"sites      {', '.join(record['sites'])}",
        f"stored as  {record['stored_dtype']}, {record['d_model']} wide: {size(record['bytes_per_site'])} a site, "
        f"{size(record['bytes'])} in all, {record['files_to_write']:,} files",
    ]
    return "\n".join(lines)
