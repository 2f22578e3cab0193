"""Fixtures: tiny random models with a tokenizer, a labelled corpus, and stores made in this process, without Ray."""

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait give up their core: other tests run beside them

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipeline.model.describe import ModelInfo, describe_model
from storage.format.arrays import DTYPES
from storage.harvest.harvest import Harvest, SiteLayout, declare_harvest
from storage.harvest.identity import HarvestIdentity
from storage.harvest.moments import MomentKey, Moments
from storage.harvest.write_unit import UnitBlock, write_unit
from storage.make.create import Table, create_store
from storage.store import Store
from storage.table.root import CorpusInfo
from workers.harvest.harvester import Harvester, UnitResult
from workers.harvest.stage import HarvestJob, declare, prepare_harvests
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import HarvestSettings, ModelSettings

pytest_plugins = ("harvests", "hub", "lab", "whole", "s3", "tokens", "web")

torch.set_num_threads(1)
settings.register_profile("granary", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("granary")

VOCABULARY = 320
KINDS = ("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out", "attn_out")
WORDS = [
    "the",
    "grain",
    "was",
    "carried",
    "over",
    "river",
    "and",
    "road",
    "to",
    "a",
    "wide",
    "granary",
    "where",
    "people",
    "of",
    "three",
    "towns",
    "count",
    "weigh",
    "and",
    "store",
    "what",
    "every",
    "field",
    "gave",
    "in",
    "summer",
    "Wörter",
    "über",
    "Körner",
    "naïve",
    "café",
    "雨",
    "12",
    "1984",
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens whose BOS is token 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(random.Random(seed), 50) for seed in range(20)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """`make_model(family, **config)` gives the folder of a tiny random model. Every weight is random and of a size
    that makes activations of order 1, so that a tolerance of 1e-4 means something."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
        key = f"{family} {seed} {sorted(overrides.items())}"
        if key in made:
            return made[key]
        shape = {
            "vocab_size": VOCABULARY + 8,  # transformers' tokenizer of qwen2 adds a token of its own
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **{**shape, **overrides})
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0, 0.3, generator=generator)
                if "norm" in name:
                    parameter += 1
        made[key] = tmp_path_factory.mktemp("model") / family
        model.save_pretrained(made[key])
        tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """48 texts of 1 to 120 words; together 2,500 to 4,000 tokens, some longer than a context of 64."""
    rng = random.Random(1)
    return [sentence(rng, rng.choice([1, 3, 10, 20, 40, 120])) for _ in range(48)]


def write_corpus(path: Path, texts: Sequence[str], **columns: Sequence[Any]) -> Path:
    labels = {
        "language": [("de", "en", "fr")[i % 3] for i in range(len(texts))],
        "year": [1980 + i % 2 for i in range(len(texts))],
    }
    pq.write_table(pa.table({"text": list(texts), **labels, **columns}), path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The texts as one Parquet file, labelled by `language` (string) and `year` (integer)."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.parquet", texts)


@dataclass(frozen=True)
class Harvesting:
    """A planned store and the harvesters of the spec's sites, to be run unit by unit."""

    store: Store
    info: ModelInfo
    jobs: list[HarvestJob]
    harvesters: list[Harvester]

    def run(self, units: Iterable[int] | None = None) -> list[UnitResult]:
        """Harvest units (those not committed yet, if not given) in this process."""
        return [
            harvester.harvest_unit(unit)
            for job, harvester in zip(self.jobs, self.harvesters, strict=True)
            for unit in (job.units if units is None else units)
        ]


def start_harvest(
    path: Path, model: Path, corpus: Path | Sequence[Path], sites: Sequence[str], *, grow: bool = False, **options: Any
) -> Harvesting:
    """Plan and declare as the command line does, and load the model, without Ray. `options` of the sections mix freely;
    `dtype` is what is stored, `model_dtype` what the model computes in."""
    options = {"labels": ("language", "year"), "context": 64, "rows_per_unit": 1024, "holdout": 0.0, **options}
    corpus_options = {k: v for k, v in options.items() if k in CorpusSettings.model_fields}
    harvest_options = {k: v for k, v in options.items() if k in HarvestSettings.model_fields}
    assert options.keys() <= {*corpus_options, *harvest_options, "model_dtype"}
    paths = tuple(map(str, [corpus] if isinstance(corpus, Path) else corpus))
    corpus_settings = CorpusSettings(path=paths, **corpus_options)
    model_settings = ModelSettings(id=str(model), dtype=options.get("model_dtype", "float32"))
    harvest_settings = HarvestSettings(sites=tuple(sites), threads_per_worker=1, workers=1, **harvest_options)
    info = describe_model(model_settings.id)
    store, _ = ensure_store(path, corpus_settings, model_settings, info, lambda done, total: None, grow=grow)
    jobs = prepare_harvests(store, model_settings, info, harvest_settings)
    for job in jobs:
        declare(store, job)
    return Harvesting(store, info, jobs, [Harvester(job.setup) for job in jobs])


def harvest(path: Path, model: Path, corpus: Path | Sequence[Path], sites: Sequence[str], **options: Any) -> Store:
    """Harvest every unit and return the store."""
    harvesting = start_harvest(path, model, corpus, sites, **options)
    harvesting.run()
    return harvesting.store


@pytest.fixture(scope="session")
def harvested(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> Store:
    """A store of the whole corpus, several units, the last one partial; bfloat16. Not to be written to."""
    sites = ["resid_post.1", "mlp_in.0", "mlp_out.0"]
    return harvest(tmp_path_factory.mktemp("harvested") / "store", llama, corpus, sites)


def plan_table(num_rows: int, num_documents: int, seed: int = 0) -> Table:
    """A table of rows with made-up tokens: documents of random lengths, one context each, labelled by `language`."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, num_rows), num_documents - 1, replace=False))
    starts, stops = np.concatenate([[0], cuts]), np.concatenate([cuts, [num_rows]])
    document = np.repeat(np.arange(num_documents), stops - starts).astype(np.int64)
    token = rng.integers(3, VOCABULARY, num_rows).astype(np.int32)
    return Table(
        columns={
            "token": token,
            "position": (1 + np.arange(num_rows) - starts[document]).astype(np.int32),
            "document": document,
            "context": document,
        },
        context_token=np.insert(token, starts, 0),
        context_start=np.concatenate([starts, [num_rows]]) + np.arange(num_documents + 1),
        documents=pa.table(
            {
                "document": np.arange(num_documents),
                "row_start": starts,
                "row_stop": stops,
                "source": [f"made up:{i}" for i in range(num_documents)],
                "language": [("de", "en", "fr")[i % 3] for i in range(num_documents)],
            }
        ),
    )


def corpus_info(table: Table, rows_per_unit: int, held_out_start: int | None = None) -> Callable[[str], CorpusInfo]:
    def info(digest: str) -> CorpusInfo:
        return CorpusInfo(
            num_rows=table.sizes.num_rows,
            num_contexts=table.sizes.num_contexts,
            num_context_tokens=table.sizes.num_context_tokens,
            num_documents=table.documents.num_rows,
            rows_per_unit=rows_per_unit,
            context=64,
            skip_first=1,
            held_out_start=table.sizes.num_rows if held_out_start is None else held_out_start,
            labels=["language"],
            roles=[],
            corpus_digest=digest,
            tokenizer_digest="none",
            plan={},
            skipped={},
            made_with={},
        )

    return info


def save_no_tokenizer(folder: Path) -> None:
    """For stores of made-up tokens."""
    (folder / "tokenizer.json").write_text("{}")


def write_store(
    path: Path | str,
    *,
    num_rows: int = 203,
    rows_per_unit: int = 32,
    chunk_rows: int | Mapping[str, int] = 8,
    width: int = 5,
    dtype: str = "bfloat16",
    sites: Sequence[str] = ("resid_post.0", "mlp_out.0"),
    units: Iterable[int] | None = None,
    held_out_start: int | None = None,
) -> Store:
    """A store of random activations, written by `storage` alone: small chunks and units that no model would give.

    `chunk_rows`: of all sites, or of each."""
    table = plan_table(num_rows, num_documents=max(2, num_rows // 20))
    info = corpus_info(table, rows_per_unit, held_out_start)
    store = create_store(path, table, info, save_no_tokenizer)
    chunks = chunk_rows if isinstance(chunk_rows, Mapping) else dict.fromkeys(sites, chunk_rows)
    layouts = {site: SiteLayout(width, dtype, chunks[site]) for site in sites}
    identity = HarvestIdentity.made_up(rows_per_unit, sites=sorted(sites), model={"fingerprint": "made-up"})
    made = Harvest.of(identity, "made-up", layouts, {})
    declare_harvest(store.root, num_rows, made)
    for unit in range(store.info.num_units) if units is None else units:
        start, stop = store.info.unit_rows(unit)
        rng = np.random.default_rng(unit)
        acts = {site: rng.standard_normal((stop - start, width)).astype(DTYPES[dtype]) for site in sites}
        wide = {site: values.astype(np.float64) for site, values in acts.items()}
        block = UnitBlock(
            activations=acts,
            norms={site: np.linalg.norm(values, axis=1).astype(np.float32) for site, values in wide.items()},
            moments={MomentKey(s): Moments(len(v), v.sum(0), (v**2).sum(0)) for s, v in wide.items()},
        )
        write_unit(store, made, unit, block, writer="test", figures=None)
    return store


def stored_rows(store: Store, site: str) -> np.ndarray:
    """All rows of a site, taken from the chunk files by hand."""
    array = store.array(site)
    chunks = [array.object_place(chunk).path.read_bytes()[:-4] for chunk in range(array.num_chunks)]
    return np.frombuffer(b"".join(chunks), dtype=DTYPES[array.dtype]).reshape(-1, *array.shape[1:])[: array.shape[0]]
