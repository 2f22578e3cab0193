"""A folder with a spec to run the real commands on, for tests of what they refuse; a plugin of tests/conftest.py.

Files and folders are compared whole, before and after a refusal: the store, the spec, and what could stand beside them.
"""

import copy
import gzip
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers
import yaml
from conftest import write_corpus
from safetensors.torch import load_file, save_file

from jobs.cli.main import main
from storage.store import Store

SITES = ["resid_post.1", "mlp_in.0", "mlp_out.0"]
SITE = SITES[0]
GONE = object()
"""As a change of a spec: the key is left out."""
DICTIONARY = {"name": "sae", "input": ["resid_post.1"], "latents": 64, "activation": {"kind": "topk", "k": 4}}
TRAIN = {"rows": 2048, "batch_rows": 512, "threads": 1, "dictionaries": [DICTIONARY]}


class RayStarted(BaseException):
    """Not an Exception, so that nothing takes it for a failure of the cluster."""


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test: a refusal comes first."""

    def start(*args: Any, **options: Any) -> None:
        raise RayStarted

    monkeypatch.setattr(ray, "init", start)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def changed(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A spec with some keys, written like corpus.path, set to other values."""
    spec = copy.deepcopy(spec)
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = spec
        for section in sections:
            inner = inner.setdefault(section, {})
        if value is GONE:
            inner.pop(last, None)
        else:
            inner[last] = copy.deepcopy(value)  # a later change writes into what an earlier one set
    return spec


@dataclass(frozen=True)
class Lab:
    """A folder with a spec and perhaps a store, and the commands to run there."""

    folder: Path
    base: dict[str, Any]
    capsys: pytest.CaptureFixture[str]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def spec(self, changes: dict[str, Any] | None = None) -> Path:
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(changed(self.base, changes or {}), sort_keys=False))
        return path

    def run(self, *command: str | Path) -> str:
        """A command that succeeds; return what it printed."""
        self.capsys.readouterr()
        assert main([str(word) for word in command]) == 0, self.capsys.readouterr().err
        return self.capsys.readouterr().out

    def refused(self, *command: str | Path, lines: int | None = 1) -> str:
        """A command that is refused; return the message, which has been checked for form."""
        before = snapshot(self.folder)
        self.capsys.readouterr()
        assert main([str(word) for word in command]) == 1
        out, err = self.capsys.readouterr()
        assert out == ""
        check_message(err, lines)
        assert snapshot(self.folder) == before
        return err


def check_message(err: str, lines: int | None = 1) -> None:
    """One message of the given number of lines (None: the words of another library), and nothing of our insides."""
    assert err.startswith("granary: ")
    assert err.endswith("\n")
    assert err.count("granary: ") == 1
    assert lines is None or err.count("\n") == lines, err
    for inside in ("Traceback", "\x1b", "object at 0x", "Error('", "errors.", "<class"):
        assert inside not in err
    assert "  \n" not in err
    assert not err.endswith((":\n", ": \n", "''\n"))


@pytest.fixture
def lab(tmp_path: Path, llama: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> Lab:
    """A spec that is sound, and no store yet."""
    base = {
        "store": "store",
        "model": {"id": str(llama), "dtype": "float32"},
        "corpus": {
            "path": str(corpus),
            "labels": ["language", "year"],
            "context": 64,
            "rows_per_unit": 1024,
            "holdout": 0.0,
        },
        "harvest": {"sites": SITES, "workers": 1, "threads_per_worker": 1},
    }
    return Lab(tmp_path, base, capsys)


@pytest.fixture
def stored(lab: Lab, harvested: Store) -> Lab:
    """The same spec, with its store: four units, all committed."""
    shutil.copytree(harvested.path, lab.store)
    return lab


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, llama: Path, texts: list[str]) -> Path:
    """A folder of bad things, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "not.parquet").write_text("text,language,year\na file of another kind,en,1980\n")
    labels = {"language": ["de", None, "en", None], "year": [1980] * 4}
    pq.write_table(pa.table({"text": ["a", "b", "c", "d"], **labels}), folder / "unlabelled.parquet")
    pq.write_table(pa.table({"body": ["a b c"], "language": ["de"], "year": [1980]}), folder / "untitled.parquet")
    nothing = {"text": pa.string(), "language": pa.string(), "year": pa.int64()}
    pq.write_table(pa.schema(nothing.items()).empty_table(), folder / "empty.parquet")
    sound = write_corpus(folder / "cut.parquet", texts).read_bytes()
    (folder / "cut.parquet").write_bytes(sound[:-100])
    (folder / "damaged.parquet").write_bytes(sound[:50] + bytes(500) + sound[550:])
    (folder / "lines.csv").write_text("text\na\n")
    (folder / "mixed").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "mixed" / "a.parquet")
    (folder / "mixed" / "b.jsonl").write_text('{"text": "b"}\n')
    (folder / "broken.jsonl").write_text('{"text": \n' * 3)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b c"}\n' * 100)[:-20])
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    pq.write_table(pa.table({"ids": [[5, 6], [7, 5000]]}), folder / "foreign.parquet")
    (folder / "folder").mkdir()
    (folder / "file").write_text("mine")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("mine")
    transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=320).save_pretrained(folder / "gpt2")

    def model(name: str) -> Path:
        shutil.copytree(llama, folder / name)
        return folder / name

    (model("no-config") / "config.json").unlink()
    (model("cut-config") / "config.json").write_text('{"model_type": "lla')
    (model("unheard-of") / "config.json").write_text('{"model_type": "quokka"}')
    (model("no-weights") / "model.safetensors").unlink()
    (model("no-tokenizer") / "tokenizer.json").unlink()
    (model("cut-tokenizer") / "tokenizer.json").write_text("{}")
    wide = transformers.AutoTokenizer.from_pretrained(llama)
    wide.add_tokens([f"<word {i}>" for i in range(50)])
    wide.save_pretrained(model("wide-tokenizer"))
    weights = model("cut-weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    weights = model("weights-of-two-layers") / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    weights = model("weights-of-another-shape") / "model.safetensors"
    doubled = {name: torch.cat([tensor, tensor]) for name, tensor in load_file(weights).items()}
    save_file(doubled, weights, metadata={"format": "pt"})
    weights = model("one-of-two-files") / "model.safetensors"
    files = {name: f"model-0000{1 + ('.layers.1.' in name)}-of-00002.safetensors" for name in load_file(weights)}
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    index = {"metadata": {}, "weight_map": files}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return folder
