"""A small store with everything in it that a store can have, for tests of `granary verify`; a plugin of conftest.py."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import sentence, start_harvest, write_corpus

from storage.harvest.driver_records import Driver
from storage.harvest.failures import Failure
from storage.harvest.log import HarvestLog, log_of
from storage.results.runs import open_run
from storage.store import Store
from workers.anchors.stage import make_anchors
from workers.evaluate.evaluator import EvaluationPlan, evaluate
from workers.settings.anchors import AnchorSettings
from workers.settings.dictionaries import DictionarySettings
from workers.settings.experiment import EvaluateSettings, TrainSettings
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

SITES, MORE_SITES = ("resid_post.1", "mlp_out.0"), ("attn_out.0",)


def make_whole(path: Path, llama: Path, other: Path, corpus: Path) -> Store:
    """Three harvests (two models, two stored types), the last unit partial, anchors, a dictionary that is trained and
    measured, another that is being trained, and the small records of drivers and failures."""
    options = {"rows_per_unit": 1024, "holdout": 0.2}
    harvestings = [
        start_harvest(path, llama, corpus, SITES, **options),
        start_harvest(path, llama, corpus, MORE_SITES, dtype="int8", **options),
        start_harvest(path, other, corpus, SITES[:1], dtype="float16", **options),
    ]
    for harvesting in harvestings:
        harvesting.run()
    digest = harvestings[0].jobs[0].harvest.digest
    store = harvestings[0].store.for_model(harvestings[0].jobs[0].harvest.model)
    units = store.info.units
    HarvestLog(store.root, digest, units).compact(HarvestLog(store.root, digest, units).committed())
    log_of(store, digest).write_driver(Driver("host-1-abcd", counter=3, in_flight=[2]))
    HarvestLog(store.root, digest, units).record_failure(
        Failure(1, ["ValueError: no"], ["host-1-abcd"], {"torch": "2"})
    )
    make_anchors(store, AnchorSettings(name="languages", by=("language",), min_rows=10), SITES)
    dictionary = DictionarySettings(name="sae", input=SITES[:1], latents=16, anchors="languages")
    dictionary = dictionary.model_copy(update={"activation": dictionary.activation.model_copy(update={"k": 4})})
    settings = TrainSettings(rows=2048, batch_rows=512, threads=1, dictionaries=(dictionary,))
    Trainer(plan_training(store, settings)).train()
    torch.set_num_threads(1)
    plan = EvaluationPlan(
        store=store.url,
        run="sae",
        anchors=("languages",),
        model=harvestings[0].info,
        model_dtype="float32",
        attention="sdpa",
        batch_tokens=512,
        settings=EvaluateSettings(rows=512, contexts=2),
        threads=1,
    )
    evaluate(plan)
    begun = open_run(store, "begun")
    begun.begin({"training": {"steps": 8}}, {"anchors": None, "made_with": {}})
    begun.save_checkpoint([{"step": 0, "fvu": 1.0}], b"a checkpoint")
    begun.save_checkpoint([{"step": 0, "fvu": 1.0}, {"step": 4, "fvu": 0.5}], b"a later checkpoint")
    return store


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, make_model: Callable[..., Path]) -> Store:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    texts: Sequence[str] = [sentence(random.Random(n), 30) for n in range(50)]
    corpus = write_corpus(folder / "corpus.parquet", texts)
    return make_whole(folder / "store", llama, make_model("llama", seed=1), corpus)
