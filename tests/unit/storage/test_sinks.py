"""Rows of extreme norm are seen: how many, where, and what leaves them out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import harvest

from jobs.progress import extreme_norms
from jobs.status import status_record, status_text
from storage.read.extreme_rows import extreme_rows
from storage.store import Store

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def with_sinks(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], corpus: Path) -> Store:
    """A model in which one token writes a vector a hundred times as long as others into the residual stream."""
    folder = tmp_path_factory.mktemp("sinks")
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model("llama"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_model("llama"))
    token = tokenizer.backend_tokenizer.token_to_id("ver")
    with torch.no_grad():
        model.model.embed_tokens.weight[token] *= 300
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return harvest(folder / "store", folder / "model", corpus, [SITE])


def test_where_they_are(with_sinks: Store) -> None:
    (found,) = extreme_rows(with_sinks, [SITE])
    norms = with_sinks.norms(SITE)
    tokens = with_sinks.columns(0, with_sinks.num_rows, ("token",))["token"]
    extreme = norms > 10 * np.median(norms)
    assert len(set(tokens[extreme].tolist())) == 1
    assert found.looked_at == len(norms)
    assert found.share == pytest.approx(extreme.mean())
    assert found.tokens == (("ver", 1.0),)
    assert found.largest == pytest.approx(norms.max() / np.median(norms))


def test_status_says_it_and_what_to_do(with_sinks: Store) -> None:
    text = status_text(status_record(with_sinks))
    assert "more than 10 times the median norm" in text
    assert "on token 'ver' (100 %)" in text
    for key in ("train.max_norm: 10", "corpus.skip_first", "corpus.exclude_tokens"):
        assert key in text


def test_nothing_is_said_where_there_are_none(harvested: Store) -> None:
    assert extreme_rows(harvested, [SITE]) == []
    assert status_record(harvested)["extreme_norms"] == []
    assert "norms  " not in status_text(status_record(harvested))


def test_positions_are_named(tmp_path: Path, llama: Path, corpus: Path) -> None:
    """Rows at position 0 are BOS itself, whose norm is made large by its embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 300
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    store = harvest(tmp_path / "store", tmp_path / "model", corpus, [SITE], skip_first=0)
    (found,) = extreme_rows(store, [SITE])
    assert found.positions[0] == (0, 1.0)
    assert "at position 0 (100 %)" in extreme_norms(vars(found))


def test_damage_keeps_nothing_else_from_being_shown(tmp_path: Path, llama: Path, corpus: Path) -> None:
    store = harvest(tmp_path / "store", llama, corpus, [SITE])
    (norms,) = (tmp_path / "store" / "norms").glob("*/*/c/0")
    norms.write_bytes(b"x" * 40)
    text = status_text(status_record(store))
    assert "norms     cannot be looked at: " in text
    assert "complete" in text
