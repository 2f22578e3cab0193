"""Rows of chosen roles hold what they hold among all rows, and training leaves out rows of extreme norm."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import harvest

from pipeline.sdl.dictionary.files import load_dictionary
from storage.errors import StoreMismatch
from storage.store import Store, open_store
from workers.settings.experiment import TrainSettings
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"


def test_rows_of_a_role_are_harvested_as_they_are_among_all_rows(tmp_path: Path, llama: Path, texts: list[str]) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    chats = [
        [{"role": ("user", "assistant")[turn % 2], "content": texts[(n + turn) % 48]} for turn in range(4)]
        for n in range(20)
    ]
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options: dict[str, Any] = {"messages": "messages", "labels": (), "dtype": "float32"}
    every = harvest(tmp_path / "every", folder, corpus, ["resid_post.1"], **options)
    some = harvest(tmp_path / "some", folder, corpus, ["resid_post.1"], roles=("assistant",), **options)
    kept = np.flatnonzero(every.columns(0, every.num_rows, ["role"])["role"] == 0)
    assert 1000 < len(kept) == some.num_rows < every.num_rows
    np.testing.assert_allclose(some.read("resid_post.1"), every.read("resid_post.1", kept), rtol=0, atol=1e-4)


def train(store: Store, name: str, max_norm: float | None) -> Store:
    dictionary = {"name": name, "input": ["resid_post.1"], "latents": 64, "activation": {"kind": "topk", "k": 4}}
    settings = TrainSettings(rows=2048, batch_rows=512, threads=1, dictionaries=[dictionary], max_norm=max_norm)
    plan = plan_training(store, settings)
    Trainer(plan).train()
    return store


def test_training_leaves_out_rows_of_extreme_norm(tmp_path: Path, harvested: Store) -> None:
    shutil.copytree(harvested.root.path, tmp_path / "store")
    store = open_store(tmp_path / "store")
    for name, max_norm in (("all", None), ("within", 1.2), ("far", 1e9)):
        train(store, name, max_norm)
    weights = {
        n: (tmp_path / "store" / "runs" / n / "dictionary.safetensors").read_bytes() for n in ("all", "within", "far")
    }
    assert weights["all"] != weights["within"]
    assert weights["all"] == weights["far"]  # nothing is that far out
    with pytest.raises(StoreMismatch, match="max_norm"):
        train(store, "within", 1.3)


def test_what_is_left_out_counts_neither_for_the_normalisation_nor_for_the_threshold(
    tmp_path: Path, harvested: Store
) -> None:
    shutil.copytree(harvested.root.path, tmp_path / "store")
    store = open_store(tmp_path / "store")
    activation = {"kind": "batch_topk", "k": 4}
    dictionary = {"name": "within", "input": ["resid_post.1"], "latents": 64, "activation": activation}
    settings = TrainSettings(rows=4096, batch_rows=512, threads=1, dictionaries=[dictionary], max_norm=1.02)
    Trainer(plan_training(store, settings)).train()
    x, norms = store.read("resid_post.1").astype(np.float32), store.norms("resid_post.1", np.arange(store.num_rows))
    train_rows = np.arange(store.num_rows) < store.info.held_out_start
    kept = norms <= 1.02 * np.median(norms[train_rows])
    assert 0.3 < kept.mean() < 0.9
    about = json.loads((tmp_path / "store" / "runs" / "within" / "dictionary.json").read_text())
    rows = x[kept & train_rows].astype(np.float64)
    scale = (rows.shape[1] / np.square(rows - rows.mean(0)).sum(1).mean()) ** 0.5
    assert about["normalisation"]["input_scale"]["resid_post.1"] == pytest.approx(scale, rel=0.02)
    of_all = x[train_rows].astype(np.float64)
    assert scale > 1.03 * (of_all.shape[1] / np.square(of_all - of_all.mean(0)).sum(1).mean()) ** 0.5
    code = load_dictionary(str(tmp_path / "store" / "runs" / "within")).encode(torch.from_numpy(x[kept & ~train_rows]))
    assert int((code > 0).sum()) == 4 * int((kept & ~train_rows).sum())
