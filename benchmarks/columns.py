"""What columns beside documents cost: a million documents, with unique urls and without: python -m benchmarks.columns

The same corpus of short documents through `granary harvest`, `anchors` and `train` (the demo's model, one site), once
with `corpus.columns: [url]` and once without, in turn. Per stage: seconds, and the largest resident memory
of any process of the run, from /proc every 50 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from workers.machine import machine

MODEL = Path(__file__).parents[1] / "jobs" / "demo" / "model"
STAGES = ("harvest", "anchors", "train")
WORDS = ("def", "class", "return", "import", "the", "value", "of", "list", "string", "if", "none", "self")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[tuple[float, int]]]] = {"without": {}, "with": {}}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus.parquet", arguments.documents)
        for number in range(arguments.rounds):
            for which, columns in (("without", []), ("with", ["url"])):
                spec = write_spec(folder, f"{which}-{number}", columns)
                for stage in STAGES:
                    found[which].setdefault(stage, []).append(run(stage, spec))
                    seconds, most = found[which][stage][-1]
                    print(f"{stage}, {which} urls: {seconds:.1f} s, {most / 2**20:,.0f} MiB", flush=True)
    print("| stage | seconds without | with | MiB of the largest process without | with |\n|---|---|---|---|---|")
    for stage in STAGES:
        (s0, m0), (s1, m1) = min(found["without"][stage]), min(found["with"][stage])
        print(f"| {stage} | {s0:.1f} | {s1:.1f} | {m0 / 2**20:,.0f} | {m1 / 2**20:,.0f} |")
    print(json.dumps({"machine": machine(), "documents": arguments.documents, "found": found}))


def write_corpus(path: Path, documents: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array(WORDS)[rng.integers(0, len(WORDS), (documents, 4))]
    texts = [" ".join(line) for line in words.tolist()]
    urls = [
        f"https://example.org/{i:08d}/{i * 2654435761 % 2**32:08x}/a-page-with-a-long-name.html"
        for i in range(documents)
    ]
    kinds = np.array(["code", "docs"])[rng.integers(0, 2, documents)]
    pq.write_table(pa.table({"text": texts, "url": urls, "kind": kinds}), path, row_group_size=50_000)


def write_spec(folder: Path, name: str, columns: list[str]) -> Path:
    spec: dict[str, Any] = {
        "store": f"store-{name}",
        "model": {"id": str(MODEL), "dtype": "float32"},
        "corpus": {"path": "corpus.parquet", "labels": ["kind"], "columns": columns, "context": 128},
        "harvest": {"sites": ["resid_post.2"], "workers": 1},
        "anchors": {"name": "kinds", "by": "kind"},
        "train": {"dictionaries": [{"name": "sae", "input": "resid_post.2", "latents": 1024, "anchors": "kinds"}]},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def run(stage: str, spec: Path) -> tuple[float, int]:
    """Seconds of a stage, and the bytes of the largest of its processes."""
    started, largest = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "jobs.cli", stage, str(spec)], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        largest = max(largest, *map(resident, Path("/proc").glob("[0-9]*")))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"granary {stage} {spec} ended with {process.returncode}")
    return time.perf_counter() - started, largest


def resident(process: Path) -> int:
    """Bytes that a process of the run has in memory; 0 of any other."""
    try:
        command = (process / "cmdline").read_bytes()
        pages = int((process / "statm").read_text().split()[1])
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") if b"jobs.cli" in command or command.startswith(b"ray::") else 0


if __name__ == "__main__":
    main()
