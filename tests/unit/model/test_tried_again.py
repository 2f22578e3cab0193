"""Members of the kinds of notes/inputs.md that no other test has: caches, tokens without embeddings, streams that fail,
long texts, variables of the environment."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from conftest import VOCABULARY as LEARNT
from corpora import VOCABULARY, plan, read_corpus, with_tokenizer, write
from hub import FakeHub
from web import Spoil, Web

from jobs.cli.main import main
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.records import Columns
from pipeline.corpus.sources import retry as patience
from pipeline.corpus.sources.retry import Unread
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import check_weights, load_base_model
from workers.cluster.environment import values_of

# ---- a cache with several repositories


def test_a_branch_with_a_slash_and_one_that_is_no_name_of_a_file(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    commits = {ref: hub.add("a/tiny", make_model(seed=n), ref=ref) for n, ref in enumerate(["feature/x", "step-1.5"])}
    assert [describe_model("a/tiny", ref).revision for ref in commits] == list(commits.values())


def test_a_snapshot_whose_files_were_cleaned_away(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    """Links that lead nowhere are files that are not there."""
    hub.add("a/tiny", make_model())
    info = describe_model("a/tiny")
    home = hub.cache / "models--a--tiny"
    weights = home / "snapshots" / info.revision / "model.safetensors"
    (home / "blobs" / weights.readlink().name).unlink()
    with pytest.raises(InputError, match=r"the weights of a/tiny at the commit .* are not in this machine's cache"):
        check_weights(info, 1, loaded_here=True)
    config = weights.with_name("config.json")
    (home / "blobs" / config.readlink().name).unlink()
    with pytest.raises(InputError, match=r"has the revision main of a/tiny without config\.json, and HF_HUB_OFFLINE"):
        describe_model("a/tiny")


def test_a_branch_whose_commit_is_gone(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    there = hub.add("a/tiny", make_model())
    hub.point("a/tiny", "v2", "f" * 40)
    with pytest.raises(InputError, match=rf"has no revision v2 of a/tiny, but main \({there[:12]}\), and HF_HUB_O"):
        describe_model("a/tiny", "v2")


def test_shards_of_which_one_was_not_downloaded(hub: FakeHub, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    last = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1].name
    hub.add("a/tiny", tmp_path / "sharded", leaving_out=(last,))
    info = describe_model("a/tiny")
    with pytest.raises(InputError, match=r"are not in this machine's cache"):
        check_weights(info, 1, loaded_here=True)
    with pytest.raises(InputError, match=rf"files that model\.safetensors\.index\.json names are missing, .*{last}"):
        load_base_model(info, layers=1, dtype="float32")


def test_snapshots_given_as_folders_are_models_of_their_own(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    folders = []
    for seed, owner in enumerate("ab"):
        commit = hub.add(f"{owner}/tiny", make_model(seed=seed))
        folders.append(hub.cache / f"models--{owner}--tiny" / "snapshots" / commit)
    infos = [describe_model(str(folder)) for folder in folders]
    assert len({info.fingerprint for info in infos}) == len({info.name for info in infos}) == 2


@pytest.mark.parametrize("name", ["tiny-Q4_K_M.gguf", "consolidated.00.pth", "tf_model.h5", "ggml-model-q4.bin"])
def test_weights_of_other_formats(make_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    shutil.copy(make_model() / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=rf"no weights .* in {tmp_path}; {name} is of a format that is not read: down"):
        describe_model(str(tmp_path))


# ---- tokens without an embedding


def widened(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY)])


def test_an_excluded_token_without_an_embedding(tmp_path: Path, llama: Path) -> None:
    """No document that has it gives rows in any case."""
    model = with_tokenizer(tmp_path / "model", llama, widened)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}, {"text": f"<extra{VOCABULARY - 1}> town"}])
    found = plan(corpus, model, exclude_tokens=(f"<extra{VOCABULARY - 1}>",))
    assert found.sizes.documents == 1
    assert sum(found.skipped.counts.values()) == 1


def test_chats_whose_template_writes_a_token_without_an_embedding(tmp_path: Path, llama: Path) -> None:
    """As of a chat tokenizer beside a base model: every chat is left out, and the message says why."""

    def change(tokenizer: Any) -> None:
        widened(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"

    model = with_tokenizer(tmp_path / "model", llama, change)
    chats = [{"messages": [{"role": "user", "content": "count"}]}] * 3
    with pytest.raises(InputError, match=r"gives no rows: its records are left out, 3 for .*embedding"):
        plan(write(tmp_path / "a.jsonl", chats), model, messages="messages")


def test_a_bos_without_an_embedding_and_contexts_without_bos(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        widened(tokenizer)
        tokenizer.bos_token = f"<extra{VOCABULARY - 1}>"

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"the tokenizer's BOS is token \d+ and the model has an embedding of 400"):
        plan(corpus, model, bos=True)
    assert plan(corpus, model, bos=False).sizes.documents == 1


def test_token_ids_that_only_the_embedding_has(tmp_path: Path, llama: Path) -> None:
    """A model padded beyond its tokenizer: its ids are rows, whatever they mean."""
    corpus = write(tmp_path / "a.jsonl", [{"ids": [5, LEARNT + 5, 7]}, {"ids": [5, VOCABULARY, 7]}, {"ids": [-1, 5]}])
    with pytest.raises(InputError):
        plan(corpus, llama, tokens="ids", labels=())
    corpus = write(tmp_path / "b.jsonl", [{"ids": [5, LEARNT + 5, 7]}])
    assert plan(corpus, llama, tokens="ids").sizes.documents == 1


# ---- streams that fail


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.2")


LINES = "".join(json.dumps({"text": f"field {n}"}) + "\n" for n in range(700)).encode()


def streamed(web: Web, folder: Path, files: int = 2) -> NamedDataset:
    listed = "".join(f"  - {web.url}/part-{n}.jsonl\n" for n in range(files))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n")
    web.files |= {f"part-{n}.jsonl": LINES for n in range(files)}
    return NamedDataset(str(folder), None, "train", Columns("text", "text", ()))


def texts(dataset: NamedDataset) -> Iterator[Any]:
    for chunk in dataset.chunks():
        yield from chunk.contents


def test_credentials_that_run_out_in_the_middle(web: Web, tmp_path: Path, short: None) -> None:
    """A signed URL, a token: nothing that waiting mends."""
    stream = texts(streamed(web, tmp_path))
    begun = [next(stream) for _ in range(300)]
    web.down = Spoil(status=403)
    with pytest.raises(Unread, match=r"HTTP 403 \(Forbidden\): who asks may not read it.*; it gave [1-9]\d+ records"):
        begun += stream


def test_a_page_in_place_of_a_later_file(web: Web, tmp_path: Path, short: None) -> None:
    """As a captive portal gives it, with status 200."""
    dataset = streamed(web, tmp_path)
    stream = texts(dataset)
    next(stream)
    web.files["part-1.jsonl"] = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
    with pytest.raises(Unread, match=r"cannot be read: .*; it gave \d+ records"):
        list(stream)


@pytest.mark.parametrize("status", [500, 502, 504, 520, 529])
def test_statuses_of_proxies_pass(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)
    web.files["c.jsonl"] = LINES
    web.spoils = [Spoil(status=status), Spoil(status=status)]
    assert len(read_corpus(f"{web.url}/c.jsonl").contents) == 700
    assert not web.spoils


# ---- one long text


def test_one_message_of_a_megabyte(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"

    model = with_tokenizer(tmp_path / "model", llama, change)
    content = "the grain was carried over the river " * 27_000
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": content}]
    found = plan(write(tmp_path / "a.jsonl", [{"messages": chat}]), model, messages="messages", roles="assistant")
    assert found.sizes.rows > 100_000


@pytest.mark.parametrize("text", [" ", "\n", "a", "\u00a0", "\U0001f33e", "=", "\u0301", "\0"])
def test_a_long_run_of_one_character(tmp_path: Path, llama: Path, text: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": f"begin {text * 300_000} end"}, {"text": "short and sound"}])
    found = plan(corpus, llama)
    assert found.sizes.documents == 2, found.skipped.counts
    assert found.sizes.rows > 1_000


def test_a_million_token_ids_in_one_record(tmp_path: Path, llama: Path) -> None:
    ids = np.random.default_rng(0).integers(5, LEARNT, 1_000_000).tolist()
    found = plan(write(tmp_path / "a.jsonl", [{"ids": ids}, {"ids": [5, 6, 7]}]), llama, tokens="ids")
    assert found.sizes.documents == 2
    assert found.sizes.context_tokens >= 1_000_003


def test_a_long_text_in_a_compressed_text_file(tmp_path: Path, llama: Path) -> None:
    import gzip

    with gzip.open(tmp_path / "long.txt.gz", "wb") as file:
        file.write(b"the grain was carried over the river\n" * 20_000)
    assert plan(tmp_path / "long.txt.gz", llama).sizes.documents == 1


# ---- variables of the environment


def test_names_that_people_write(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"http_proxy": "http://p:1", "HF_HUB_OFFLINE": "1", "AWS_PROFILE": "a b", "X": "line\nline"}
    assert values_of(["http_proxy", "HF_HUB_OFFLINE", "AWS_PROFILE", "X"], environment) == environment
    for wrong in ("HF_*", "$HF_TOKEN", "${HF_TOKEN}", "hf-token", "", "HF_TOKEN, HF_HOME"):
        with pytest.raises(InputError, match="expected names of environment variables"):
            values_of([wrong], {**os.environ, "HF_TOKEN": "x"})


def test_a_token_with_a_line_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """As `export HF_TOKEN=$(cat file)` in some shells gives it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\r\n")
    spec = {"store": "s", "model": {"id": "m"}, "corpus": {"path": "c"}, "harvest": {"sites": ["resid_post.0"]}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**spec, "cluster": {"env": ["HF_TOKEN"]}}))
    assert main(["plan", str(tmp_path / "spec.yaml")]) == 1
    assert "hf_secret" not in "".join(capsys.readouterr())
