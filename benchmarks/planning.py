"""Planning on Ray against the tokenizer alone, and its memory on larger corpora: python -m benchmarks.planning

Text of Python's standard library, over and over, as JSON lines of 0.5 and 2 GB (less with --scale). Each size is
planned and written in a run of its own, with Ray's object store held to 512 MiB (what does not fit is spilled to disk,
as it is on any machine that is small against the corpus). Peak memory: of all processes of the run together, the sum of
their proportional shares (Pss), sampled twice a second. The limit: the tokenizer's own encode_batch with as many
threads on the same text, in memory, ids thrown away.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.corpus import standard_library_documents
from jobs.demo.demo import HERE
from workers.machine import machine

SIZES = (0.5e9, 2e9)
OBJECT_STORE_BYTES = 512 * 2**20
ENCODED_BYTES = 20e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the sizes above to take")
    parser.add_argument("--tokens", action="store_true", help="token ids instead of text: memory without long waiting")
    parser.add_argument("--folder", default=None, help="where to put the corpora (default: the system's)")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(plan(Path(arguments.plan))))
        return
    lines = [json.dumps({"text": d.text, "kind": d.kind}) + "\n" for d in standard_library_documents()]
    results = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as folder:
            corpus = Path(folder) / ("corpus.parquet" if arguments.tokens else "corpus.jsonl")
            (write_tokens if arguments.tokens else write)(corpus, lines, size * arguments.scale)
            command = [sys.executable, "-m", "benchmarks.planning", "--plan", folder]
            results.append(watched(command) | {"corpus_bytes": corpus.stat().st_size})
            print(json.dumps(results[-1]), flush=True)
    rate = encode_rate()
    small, large = results
    print(
        json.dumps(
            {
                "machine": machine(),
                "memory_large_to_small": large["peak_bytes"] / small["peak_bytes"],
                "encode_batch_tokens_per_s": rate,
                "planning_to_encode_batch": large["tokens"] / large["seconds"] / rate,
            }
        )
    )


def write(path: Path, lines: list[str], num_bytes: float) -> None:
    text = "".join(lines).encode()
    with path.open("wb") as handle:
        while handle.tell() < num_bytes:
            handle.write(text)


def write_tokens(path: Path, lines: list[str], num_bytes: float) -> None:
    """The token ids of as much text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    records = [json.loads(line) for line in lines]
    encoded = tokenizer.encode_batch_fast([r["text"] for r in records], add_special_tokens=False)
    ids = pa.array([e.ids for e in encoded], pa.list_(pa.int32()))
    table = pa.table({"ids": ids, "kind": [r["kind"] for r in records]})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(round(num_bytes / sum(map(len, lines)))):
            writer.write_table(table)


def plan(folder: Path) -> dict[str, Any]:
    """In a process of its own: plan and write, and say how long it took once Ray was up."""
    import ray

    from pipeline.model.describe import describe_model
    from workers.plan import source
    from workers.plan.stage import ensure_store
    from workers.settings.corpus import CorpusSettings
    from workers.settings.experiment import ModelSettings

    shutil.copytree(HERE / "model", folder / "model")
    source.SMALL_BYTES = 0  # on Ray, however small
    (path,) = folder.glob("corpus.*")
    tokens = "ids" if path.suffix == ".parquet" else None
    settings = CorpusSettings(path=(str(path),), tokens=tokens, labels=("kind",), context=256)
    with ray.init(
        address="local",
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    ):
        started = time.monotonic()
        model = ModelSettings(id=str(folder / "model"))
        info = describe_model(model.id)
        store, _ = ensure_store(folder / "store", settings, model, info, lambda done, total: None, connect=lambda: None)
        seconds = time.monotonic() - started
    return {"seconds": seconds, "tokens": store.num_rows, "documents": store.info.num_documents}


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; return what it printed and the peak memory of it and all its children."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss, family(process.pid))))
        time.sleep(0.5)
    assert process.stdout is not None
    result: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 0
    return result | {"peak_bytes": peak}


def family(pid: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:  # grows while it is gone through
        found += parents.get(member, [])
    return found


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def encode_rate() -> float:
    """Tokens per second of the tokenizer alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    texts, size = [], 0
    for document in standard_library_documents():
        texts.append(document.text)
        size += len(document.text)
        if size > ENCODED_BYTES:
            break
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    started = time.monotonic()
    tokens = sum(len(e) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return tokens / (time.monotonic() - started)


if __name__ == "__main__":
    main()
