"""`granary demo`: make the corpus, lay the spec and the model beside it, run every stage, write the report."""

import shutil
import time
from pathlib import Path

from jobs.demo.corpus import write_split
from jobs.progress import duration
from jobs.spec.spec import load_spec

HERE = Path(__file__).parent


def run_demo(folder: Path) -> int:
    """Run the demo in `folder`, which is made if need be; started again, it goes on where it was."""
    from jobs.report import write_report
    from jobs.run import STAGES, run_stages
    from storage.store import open_store

    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    spec_file = folder / "demo.yaml"
    corpus, held_out = folder / "corpus.parquet", folder / "held-out.parquet"
    if not corpus.exists() or not (held_out.exists() or spec_file.exists()):  # an older demo has one file
        parts = folder / ".corpus.parquet", folder / ".held-out.parquet"
        documents = write_split(*parts)
        parts[1].replace(held_out)
        parts[0].replace(corpus)
        print(
            f"wrote {corpus} and {held_out}: {documents[0]:,} and {documents[1]:,} texts of this Python's standard "
            "library, labelled kind and package"
        )
    if not (folder / "model").exists():
        shutil.copytree(HERE / "model", folder / "model")
    if not spec_file.exists():
        shutil.copyfile(HERE / "demo.yaml", spec_file)
    spec = load_spec(spec_file)
    did = run_stages(spec, STAGES)
    store = open_store(spec.store)
    page = folder / "report.html"
    write_report(store, page)
    if not did:
        print("nothing to do: every stage of the demo is finished")
    print(
        f"\ndone in {duration(time.monotonic() - started)}. Next:\n"
        f"  open {page}\n"
        f"  granary status {store.url}\n"
        f'  granary query {store.url} "select kind, count(*) from documents group by 1"\n'
        f"  the spec, to copy and change: {spec_file}"
    )
    return 0
