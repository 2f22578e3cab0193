"""What each storage type costs in precision: python -m benchmarks.storage_types

The demo's text through the demo's model, computed in float32 and stored as every type in one forward pass. For each
type: the relative error of the stored rows, E||x - stored(x)||^2 / E||x||^2, at three sites; and for the residual
stream what it does to a sparse autoencoder (TopK, k = 32, 1,024 latents): the FVU on held-out rows of one that was
trained on the exact rows and now reads the rounded ones, and of one that was trained on the rounded rows. `--write`
puts the figures into jobs/plan/storage_types.yaml, which `granary plan` and `status` show.
"""

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from jobs.demo.corpus import write_corpus
from jobs.demo.demo import HERE
from pipeline.model.describe import describe_model
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.files import load_dictionary
from pipeline.sdl.measure.metrics import measure_code
from pipeline.sites import STORED_TYPES
from storage.harvest.log import log_of
from storage.store import Store
from workers.harvest.harvester import Harvester
from workers.harvest.stage import declare, prepare_harvests
from workers.machine import machine
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.dictionaries import ActivationSettings, DictionarySettings
from workers.settings.experiment import HarvestSettings, ModelSettings, TrainSettings
from workers.tensors import to_torch
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

PLACES = ("resid_post.2", "mlp_in.2", "mlp_out.2")
PLACE = PLACES[0]
READ_ROWS = 8192
TABLE = Path(__file__).parents[1] / "jobs" / "plan" / "storage_types.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the store")
    parser.add_argument("--train-rows", type=int, default=2_000_000, help="rows each autoencoder is trained on")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {TABLE.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        store = harvest(Path(folder), arguments.rows)
        figures = measure(store, arguments.train_rows)
    print(table(figures))
    if arguments.write:
        TABLE.write_text(
            HEADER + yaml.safe_dump(record(figures, arguments.rows, arguments.train_rows), sort_keys=False)
        )
    print(json.dumps({"machine": machine(), "figures": figures}))


def harvest(folder: Path, rows: int) -> Store:
    """Every place as every type, from the same forward passes."""
    write_corpus(folder / "corpus.parquet")
    model = ModelSettings(id=str(HERE / "model"), dtype="float32")
    corpus = CorpusSettings(
        path=(str(folder / "corpus.parquet"),), context=256, rows=rows, rows_per_unit=16384, holdout=0.1
    )
    sites = tuple(f"{place}@{stored}" for place in PLACES for stored in STORED_TYPES)
    info = describe_model(model.id)
    store, _ = ensure_store(folder / "store", corpus, model, info, lambda done, total: None)
    (job,) = prepare_harvests(store, model, info, HarvestSettings(sites=sites, compile=False))
    declare(store, job)
    harvester = Harvester(job.setup)
    for unit in job.units:
        harvester.harvest_unit(unit)
    return store


def measure(store: Store, train_rows: int) -> dict[str, Any]:
    """Type -> relative error by place, and the two FVUs and what they are more than those of exact rows."""
    (found,) = store.harvests
    commits = log_of(store, found).read_some(range(store.info.num_units))
    costs = [commit.figures.rounding for commit in commits if commit.figures is not None]
    train(store, train_rows)
    exact = f"{PLACE}@float32"
    of_exact = dictionary_of(store, "float32")
    fvu = measure_code(of_exact, pairs(store, exact), keep_codes=[])[0].fvu
    figures = {}
    for stored in STORED_TYPES:
        errors = {}
        for place in PLACES:
            parts = [cost[f"{place}@{stored}"] for cost in costs]
            errors[place] = sum(p.square_error for p in parts) / sum(p.square_norm for p in parts)
        read = measure_code(of_exact, pairs(store, f"{PLACE}@{stored}"), keep_codes=[])[0].fvu
        trained = measure_code(dictionary_of(store, stored), pairs(store, exact), keep_codes=[])[0].fvu
        figures[stored] = {
            "relative_error": errors,
            "fvu_read": read,
            "fvu_change_read": read - fvu,
            "fvu_trained": trained,
            "fvu_change_trained": trained - fvu,
        }
    return figures


def train(store: Store, rows: int) -> None:
    """One autoencoder for each type, all in one pass over the stream: the same rows, order and first weights."""
    dictionaries = tuple(
        DictionarySettings(
            name=stored, input=(f"{PLACE}@{stored}",), latents=1024, activation=ActivationSettings(kind="topk", k=32)
        )
        for stored in STORED_TYPES
    )
    settings = TrainSettings(rows=rows, dictionaries=dictionaries, checkpoint_every=10**9)
    Trainer(plan_training(store, settings)).train()


def dictionary_of(store: Store, stored: str) -> Dictionary:
    return load_dictionary(str(store.root / "runs" / stored))


def pairs(store: Store, site: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out rows of a site, as input and as what is to be reconstructed."""
    for first in range(store.info.held_out_start, store.num_rows, READ_ROWS):
        x = to_torch(store.read(site, slice(first, first + READ_ROWS))).float()
        yield x, x


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"| stored as | {' | '.join(f'relative error, {place}' for place in PLACES)} | FVU, exact SAE | change | "
        "FVU, trained on it | change |",
        "|---|" + "---|" * (len(PLACES) + 4),
    ]
    for stored, f in figures.items():
        errors = " | ".join(f"{f['relative_error'][place]:.1e}" for place in PLACES)
        lines.append(
            f"| {stored} | {errors} | {f['fvu_read']:.5f} | {f['fvu_change_read']:+.1e} | {f['fvu_trained']:.5f} | "
            f"{f['fvu_change_trained']:+.1e} |"
        )
    return "\n".join(lines)


HEADER = """# What each storage type costs, measured. Written by `python -m benchmarks.storage_types --write`.
# relative_error: E||x - stored(x)||^2 / E||x||^2. fvu_change: what an autoencoder's FVU on held-out rows grows by when
# it reads rows stored so instead of exact ones; fvu_change_trained: when it was trained on them, and reads exact ones.
"""


def record(figures: dict[str, Any], rows: int, train_rows: int) -> dict[str, Any]:
    return {
        "measured": f"{datetime.datetime.now(datetime.UTC).date()}, the demo's model and text, {rows:,} rows of "
        f"{PLACE} computed in float32; TopK autoencoder, k = 32, 1,024 latents, {train_rows:,} rows",
        "types": {
            stored: {
                "relative_error": float(f"{f['relative_error'][PLACE]:.3g}"),
                "fvu_change": float(f"{f['fvu_change_read']:.3g}"),
                "fvu_change_trained": float(f"{f['fvu_change_trained']:.3g}"),
            }
            for stored, f in figures.items()
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
