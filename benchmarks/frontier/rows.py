"""The rows that benchmarks.frontier trains on: activations of the demo's model on Python text, as two NumPy files.

The text is the standard library of the running Python (as the demo's, which the model was trained on) and then the
installed packages' Python files, until there is enough. Rows of a real store's harvest of resid_post.2 in float32, in
an order shuffled once, normalised with the moments of the training rows: mean zero, E||x||^2 = d.
"""

import json
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.demo.corpus import DemoDocument, split_source, standard_library_documents
from jobs.demo.demo import HERE
from pipeline.model.describe import describe_model
from storage.store import Store
from workers.harvest.harvester import Harvester
from workers.harvest.stage import declare, prepare_harvests
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import HarvestSettings, ModelSettings

SITE = "resid_post.2"
HELD_OUT = 0.05
NOT_MEASURED = 5
"""The first fifth of the held-out rows is for thresholds and for choosing settings; results are of the others."""
CHARACTERS_PER_ROW = 8
"""Characters of text that are gathered for each row: about twice what a token of the demo's tokenizer has."""
SKIPPED = {"test", "tests", "__pycache__", "_vendor"}
READ_ROWS = 65536


@dataclass(frozen=True)
class RowFiles:
    """float32 [rows, d] each, normalised and shuffled."""

    train: Path
    held_out: Path
    about: dict[str, Any]
    """What they are: rows, d, text."""


def prepare_rows(folder: Path, rows: int) -> RowFiles:
    """The files in `folder`, which are made if they are not there."""
    files, about = (folder / "train.npy", folder / "held_out.npy"), folder / "rows.json"
    if not about.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = write_text(folder / "corpus.parquet", rows * CHARACTERS_PER_ROW)
        store = harvest(folder, rows)
        split = store.info.held_out_start
        order = np.random.default_rng(0)
        train = read_rows(store, 0, split)[order.permutation(split)]
        held_out = read_rows(store, split, store.num_rows)[order.permutation(store.num_rows - split)]
        mean = train.mean(0, dtype=np.float64)
        scale = (train.shape[1] / (train.var(0, dtype=np.float64)).sum()) ** 0.5
        for path, part in zip(files, (train, held_out), strict=True):
            np.save(path, ((part - mean) * scale).astype(np.float32))
        record = {"site": SITE, "train": len(train), "held_out": len(held_out), "d": train.shape[1], "text": text}
        about.write_text(json.dumps(record, indent=2) + "\n")
    return RowFiles(*files, json.loads(about.read_text()))


def batches(rows: Any, batch_rows: int, steps: int) -> Iterator[Tensor]:
    """float32 [batch_rows, d] for each step: whole batches, one after another, again from the first."""
    whole = len(rows) // batch_rows
    for step in range(steps):
        first = step % whole * batch_rows
        yield torch.from_numpy(np.array(rows[first : first + batch_rows]))


def write_text(path: Path, characters: int) -> dict[str, int]:
    """Write the corpus; return the characters from each source."""
    found, sizes = [], {"standard library": 0, "installed packages": 0}
    for source, documents in (
        ("standard library", standard_library_documents()),
        ("installed packages", package_documents()),
    ):
        for document in documents:
            if sum(sizes.values()) >= characters:
                break
            found.append(document.text)
            sizes[source] += len(document.text)
    pq.write_table(pa.table({"text": sorted(set(found))}), path)
    return sizes


def package_documents() -> Iterator[DemoDocument]:
    """Code, docstrings and comments of the packages installed beside us, file by file."""
    root = Path(sysconfig.get_paths()["purelib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED.intersection(relative.parts):
            continue
        try:
            parts = split_source(file.read_bytes().decode("utf-8"))
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError, ValueError):
            continue  # templates and other people's tests of broken files
        for kind, text in parts:
            if len(text.strip()) >= 200:
                yield DemoDocument(text, kind, relative.parts[0], relative.as_posix())


def harvest(folder: Path, rows: int) -> Store:
    model = ModelSettings(id=str(HERE / "model"), dtype="float32")
    corpus = CorpusSettings(
        path=(str(folder / "corpus.parquet"),), context=256, rows=rows, rows_per_unit=16384, holdout=HELD_OUT
    )
    info = describe_model(model.id)
    store, _ = ensure_store(folder / "store", corpus, model, info, lambda done, total: None)
    settings = HarvestSettings(sites=(f"{SITE}@float32",), compile=False)
    for job in prepare_harvests(store, model, info, settings):
        declare(store, job)
        harvester = Harvester(job.setup)
        for unit in job.units:
            harvester.harvest_unit(unit)
    return store


def read_rows(store: Store, first: int, last: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    parts = [
        store.read(f"{SITE}@float32", slice(start, min(start + READ_ROWS, last)))
        for start in range(first, last, READ_ROWS)
    ]
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
