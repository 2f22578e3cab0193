"""The evaluate stage: what a finished dictionary does on held-out rows, in an actor of its own.

Everything is measured on documents that begin after the training rows end, so that no document is on both sides.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import ray
import torch
from torch import Tensor

from pipeline.model.describe import ModelInfo
from pipeline.model.load import DTYPES, ON_CPU, load_causal_model
from pipeline.model.placement import Placement, check_dtype
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.files import load_dictionary
from pipeline.sdl.measure.diagnostics import antipodal_pairs, optimality
from pipeline.sdl.measure.loss_recovered import loss_recovered
from pipeline.sdl.measure.metrics import measure_code
from pipeline.sites import parse_site
from storage.errors import StorageError, StoreMismatch
from storage.format.records import Record, digest
from storage.harvest.moments import MomentKey
from storage.read.moments import merged_moments, training_units
from storage.results.anchors import read_anchors
from storage.results.runs import Run, open_run
from storage.store import Store, open_store
from workers.evaluate.examples import TopContexts, telling_latents
from workers.evaluate.subpopulations import score_set
from workers.harvest.harvester import read_contexts
from workers.harvest.stage import name_in_store
from workers.settings.experiment import EvaluateSettings
from workers.tensors import to_torch
from workers.train.rows import READ_ROWS, pair

MAX_CODE_ENTRIES = 2**28
"""Codes kept for AUROC and examples: at most 1 GiB of float32. Wide dictionaries are scored on fewer rows."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What the evaluator needs to begin."""

    store: str
    run: str
    anchors: tuple[str, ...]
    """The anchor sets whose subpopulations are scored; the dictionary need not be anchored to one."""
    model: ModelInfo
    model_dtype: str
    attention: str
    batch_tokens: int
    settings: EvaluateSettings
    threads: int
    gpus: int = 0
    placement: Placement = ON_CPU

    @property
    def device(self) -> str:
        """Where the dictionary is, and the model's input."""
        return self.placement.input_device


def evaluation_identity(store: Store, plan: EvaluationPlan) -> Record:
    """What an evaluation depends on; one that exists under the same identity is not made again."""
    run = open_run(store, plan.run)
    sites = run.record()["identity"]["dictionary"]["output"]
    return {
        "run": digest(run.record()["identity"]),
        "corpus_digest": store.info.corpus_digest,
        "anchors": {name: digest(read_anchors(store, name).identity_at(sites)) for name in plan.anchors},
        "settings": plan.settings.model_dump(),
        "model": {"dtype": plan.model_dtype, "attention": plan.attention},
    }


def check_model(store: Store, run: Run) -> None:
    """Raise StoreMismatch if the dictionary is of other activations than the store's model has at its sites."""
    for site, digest_then in run.record()["identity"]["harvests"].items():
        harvest, _ = store.find(site)
        if harvest.digest != digest_then:
            of = next((h.model for h in store.harvests if h.digest == digest_then), "a model that is not in the store")
            raise StoreMismatch(
                f"the dictionary {run.name!r} reads {site} of {of}, and the spec's model is {harvest.model}: give the "
                "spec the dictionary's model, or train one of this model under another name"
            )


def is_evaluated(store: Store, plan: EvaluationPlan) -> bool:
    found = open_run(store, plan.run).evaluation()
    return found is not None and found["identity"] == evaluation_identity(store, plan)


@ray.remote
def evaluate_remotely(plan: EvaluationPlan) -> Record:
    return evaluate(plan)


def evaluate(plan: EvaluationPlan) -> Record:
    """Measure a finished run and write its evaluation.json. Raises StorageError when nothing is held out and
    InputError for a GPU that is not there."""
    torch.set_num_threads(plan.threads)
    check_dtype(DTYPES[plan.model_dtype], plan.device)
    store = open_store(plan.store)
    store = store.for_model(name_in_store(store, plan.model))
    run = open_run(store, plan.run)
    run.dictionary_record()
    check_model(store, run)
    dictionary = load_dictionary(str(run.folder)).to(plan.device)
    start = first_held_out_row(store)
    stop = min(store.num_rows, start + plan.settings.rows)
    stop_codes = min(stop, start + max(1, MAX_CODE_ENTRIES // dictionary.config.total_latents))
    metrics, codes = measure_code(dictionary, _pairs(store, dictionary, start, stop_codes))
    if stop_codes < stop:  # a wide dictionary: the codes of all rows do not fit, the metrics need no codes
        metrics, _ = measure_code(dictionary, _pairs(store, dictionary, start, stop), keep_codes=[])
    anchored_to = run.record()["anchors"]
    groups = [
        group
        for name in plan.anchors
        for group in score_set(store, name, codes, start, dictionary if name == anchored_to else None)
    ]
    latents = telling_latents(groups, codes)
    shown = TopContexts(store, start, stop_codes)
    record: Record = {
        "identity": evaluation_identity(store, plan),
        "row_start": start,
        "row_stop": stop,
        **asdict(metrics),
        "loss": _loss(store, dictionary, plan, start, stop),
        "auroc_rows": stop_codes - start,
        "optimality": _optimality(store, dictionary, start, stop_codes),
        "subpopulations": groups,
        "latents": [
            {
                "latent": latent,
                "why": why,
                "density": metrics.density[latent],
                "contexts": shown.of(codes[:, latent]),
            }
            for latent, why in latents.items()
        ],
    }
    run.write_evaluation(record)
    return record


def first_held_out_row(store: Store) -> int:
    """The first row of the first document that begins in the held-out units. Raises StorageError if there is none."""
    boundary = store.info.held_out_start
    if boundary >= store.num_rows:
        raise StorageError(
            "the store holds no rows out to evaluate on: corpus.holdout was 0, or all rows are in one unit "
            f"({store.num_rows:,} rows); make another store with a holdout, from more text or with smaller units"
        )
    starts = store.documents_between(0, store.info.num_documents - 1, ("row_start",)).column("row_start").to_numpy()
    number = int(np.searchsorted(starts, boundary))
    if number == len(starts):
        raise StorageError("no document begins in the held-out rows; hold out more with corpus.holdout")
    return int(starts[number])


def _pairs(store: Store, dictionary: Dictionary, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(start, stop, READ_ROWS):
        rows = slice(first, min(first + READ_ROWS, stop))
        yield pair(dictionary.config, partial(_rows_of, store, rows))


def _optimality(store: Store, dictionary: Dictionary, start: int, stop: int) -> Record | None:
    """How far the dictionary is from what optima satisfy (arXiv 2606.02385), on some rows; None of several blocks."""
    if len(dictionary.each_block()) > 1:
        return None
    x, y = next(_pairs(store, dictionary, start, min(stop, start + READ_ROWS)))
    found = optimality(dictionary, x.to(dictionary.b_dec.device), y.to(dictionary.b_dec.device))
    fires = found.density > 0
    if not bool(fires.any()):
        return None
    return {
        "rows": len(x),
        "median_tilt": found.tilt[fires].median().item(),
        "median_pull": found.pull[fires].median().item(),
        "antipodal_pairs": len(antipodal_pairs(dictionary, found.density)),
    }


def _rows_of(store: Store, rows: slice, site: str) -> Tensor:
    return to_torch(store.read(site, rows)).float()


def _loss(store: Store, dictionary: Dictionary, plan: EvaluationPlan, start: int, stop: int) -> Record | None:
    """What the reconstruction costs the model; None for a dictionary over several models, which no one of them runs."""
    config = dictionary.config
    found = {site: store.find(site) for site in (*config.input, *config.output)}
    if len({harvest.model for harvest, _ in found.values()}) > 1:
        return None
    contexts, _ = read_contexts(store, start, stop)
    names = {site: parse_site(name) for site, (_, name) in found.items()}
    means = {}
    for site in config.output:
        moments = merged_moments(store, site, training_units(store))[MomentKey(found[site][1])]
        means[names[site]] = torch.from_numpy(moments.mean)
    model = load_causal_model(plan.model, dtype=plan.model_dtype, attention=plan.attention, placement=plan.placement)
    recovered = loss_recovered(
        model,
        lambda x: dictionary(x.to(plan.device)),  # a site of a large model may be on another GPU
        [names[site] for site in config.input],
        means,
        contexts[: plan.settings.contexts],
        plan.batch_tokens,
    )
    return {
        **asdict(recovered),
        "recovered_against_zero": recovered.against_zero,
        "recovered_against_mean": recovered.against_mean,
        "contexts": min(len(contexts), plan.settings.contexts),
    }
