"""Every bad input is refused by one message that says what is wrong, and leaves what is there as it was.

The real commands, in this process where no Ray is needed.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import start_harvest
from lab import DICTIONARY, GONE, SITE, TRAIN, Lab, changed

from pipeline.errors import InputError

pytestmark = pytest.mark.usefixtures("no_ray")


# ---- the spec file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stor": "x"}, "unknown key stor: did you mean store?"),
        ({"corpus.contxt": 5}, "unknown key corpus.contxt: did you mean context?"),
        (
            {"train": changed(TRAIN, {"dictionaries": [{**DICTIONARY, "latent": 8}]})},
            "unknown key train.dictionaries[0].latent: did you mean latents?",
        ),
        (
            {"train": changed(TRAIN, {"dictionaries": [{**DICTIONARY, "activation": {"kk": 8}}]})},
            "unknown key train.dictionaries[0].activation.kk: did you mean k?",
        ),
        ({"corpus.qqq": 1}, "unknown key corpus.qqq: known keys here: path, format, subset, split, text, "),
        ({"store": GONE}, "store is missing"),
        ({"harvest.sites": ["resid_pots.1"]}, "unknown site 'resid_pots.1': did you mean resid_post.1?"),
        ({"harvest.sites": ["quux.1"]}, "unknown site 'quux.1': sites are resid_pre, resid_mid, resid_post, mlp_in, "),
        ({"harvest.sites": []}, "harvest.sites takes at least 1, not 0"),
        (
            {"harvest.workers": "many"},
            "harvest.workers must be a whole number or 'auto' or a range like 2-16, not 'many'",
        ),
        ({"harvest": "resid_post.1"}, "harvest must be a section with keys like sites, dtype, "),
        ({"corpus.holdout": 1.5}, "corpus.holdout must be less than 1, not 1.5"),
        ({"corpus.rows_per_unit": 1500}, "rows_per_unit must be a power of two, not 1500"),
        ({"anchors": {"name": "a", "by": "lang"}}, "anchors.by: 'lang' is not one of corpus.labels (language, year)"),
        (
            {"train": changed(TRAIN, {"dictionaries": [{**DICTIONARY, "input": ["resid_post.2"]}]})},
            "train.dictionaries[0]: resid_post.2 is not one of harvest.sites (resid_post.1, mlp_in.0, mlp_out.0)",
        ),
        (
            {"train": changed(TRAIN, {"dictionaries": [{**DICTIONARY, "latents": 2}]})},
            "train.dictionaries[0]: activation.k must be a whole number between 1 and latents = 2, not 4",
        ),
        (
            {"train": changed(TRAIN, {"dictionaries": [{**DICTIONARY, "anchors": "a"}]})},
            "train.dictionaries[0].anchors: no anchor set 'a' (there is none)",
        ),
        (
            {"train": changed(TRAIN, {"dictionaries": [DICTIONARY, DICTIONARY]})},
            "dictionaries need different names; sae is used twice",
        ),
    ],
)
def test_a_mistake_in_the_spec(lab: Lab, changes: dict[str, Any], expected: str) -> None:
    spec = lab.spec(changes)
    for verb in ("plan", "harvest", "run", "status"):
        err = lab.refused(verb, spec)
        assert err.startswith(f"granary: {spec}: ")
        assert expected in err


def test_several_mistakes_are_told_at_once(lab: Lab) -> None:
    changes = {
        "store": GONE,
        "model.dtyp": "float32",
        "corpus.context": 1,
        "corpus.seed": "a",
        "harvest.sites": ["resid_pots.1"],
        "train": {"dictionaries": [{"name": "a b", "input": [], "latent": 8}]},
    }
    err = lab.refused("harvest", lab.spec(changes), lines=10)
    told = err.splitlines()[1:]
    assert all(line.startswith("  ") for line in told)
    for expected in (
        "store is missing",
        "unknown key model.dtyp: did you mean dtype?",
        "corpus.context must be greater than 1, not 1",
        "corpus.seed must be a whole number, not 'a'",
        "harvest.sites: unknown site 'resid_pots.1': did you mean resid_post.1?",
        "train.dictionaries[0].input takes at least 1, not 0",
        "train.dictionaries[0].latents is missing",
        "unknown key train.dictionaries[0].latent: did you mean latents?",
    ):
        assert f"  {expected}" in told
    assert any("train.dictionaries[0].name" in line and "'a b'" in line for line in told)


def test_several_contradictions_between_sections_are_told_at_once(lab: Lab) -> None:
    dictionary = {**DICTIONARY, "input": ["resid_post.2"], "latents": 2}
    changes = {"anchors": {"name": "a", "by": ["lang"]}, "train": {"dictionaries": [dictionary]}}
    err = lab.refused("harvest", lab.spec(changes), lines=4)
    for expected in ("anchors.by: 'lang'", "train.dictionaries[0]: resid_post.2", "train.dictionaries[0]: activation"):
        assert f"\n  {expected}" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("store: [", "is not valid YAML: line 1, column 9: "),
        ("store: x\nmodel: {id: y", "is not valid YAML: line 2, column 14: expected ',' or '}'"),
        ("store: x\n\tmodel: y", "is not valid YAML: line 2, column 1: found character '\\t'"),
        ("store: x\nmodel: y\nstore: z", "is not valid YAML: line 3, column 1: 'store' is given twice"),
        ("corpus: {seed: 1, seed: 2}", "line 1, column 19: 'seed' is given twice"),
        ("", "is not a spec: expected sections like store, model, corpus and harvest"),
        ("- store\n- model", "is not a spec: expected sections"),
        (b"\xff\xfe\x00", "cannot be read: "),
    ],
)
def test_a_file_that_is_not_a_spec(lab: Lab, text: str | bytes, expected: str) -> None:
    spec = lab.folder / "spec.yaml"
    spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    for verb in ("plan", "harvest"):
        err = lab.refused(verb, spec)
        assert str(spec) in err
        assert expected in err


def test_a_missing_spec(lab: Lab) -> None:
    for verb in ("plan", "harvest", "anchors", "train", "evaluate", "run", "submit", "status", "report"):
        assert lab.refused(verb, lab.folder / "no.yaml") == f"granary: no spec file at {lab.folder / 'no.yaml'}\n"
    assert "cannot be read" in lab.refused("harvest", lab.folder)


# ---- the corpus

CHAT = {"corpus.labels": [], "corpus.text": GONE, "corpus.messages": "messages"}
TOKENS = {"corpus.labels": [], "corpus.text": GONE, "corpus.tokens": "ids"}


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("no.parquet", {}, ["corpus.path: no file matches ", "no.parquet", "give a file, a folder of files"]),
        ("folder", {}, ["corpus.path: no file matches "]),
        ("not.parquet", {}, ["not.parquet cannot be read as Parquet: Parquet magic bytes not found"]),
        ("cut.parquet", {}, ["cut.parquet cannot be read as Parquet"]),
        ("damaged.parquet", {}, ["damaged.parquet", "cannot be read"]),
        (
            "empty.parquet",
            {},
            ["the corpus gives no rows: it has no records (1 file(s), the first is ", "empty.parquet"],
        ),
        (
            "untitled.parquet",
            {},
            ["corpus.text: no column 'text' in ", "untitled.parquet; it has body, language, year"],
        ),
        (
            "unlabelled.parquet",
            {},
            ["corpus.labels: 'language' has no value in ", "unlabelled.parquet:1; fill or drop"],
        ),
        (None, {"corpus.text": "year"}, ["corpus.text: column 'year' of ", "holds whole numbers (int64), not text"]),
        (None, {"corpus.labels": ["lang"]}, ["corpus.labels: no column 'lang' in ", "it has text, language, year"]),
        (
            "lines.csv",
            {},
            ["lines.csv cannot be read, a table without types", "Parquet first, as with `duckdb -c"],
        ),
        ("mixed", {}, ["mixed has files of several formats (", "a.parquet, ", "b.jsonl); give a pattern"]),
        (
            "broken.jsonl",
            {"corpus.labels": []},
            ["broken.jsonl is no JSON, it cannot be read beyond record 0 (counted from 0): it ends in the middle"],
        ),
        ("cut.jsonl.gz", {"corpus.labels": []}, ["cut.jsonl.gz is damaged, it cannot be read to its end"]),
        ("chats.jsonl", CHAT, ["corpus.messages: the tokenizer has no chat template"]),
        (
            "foreign.parquet",
            TOKENS,
            ["record foreign.parquet:1 of ", "token id 5000 is outside the model's vocabulary of 328"],
        ),
        (None, {"corpus.path": "nosuch://bucket/*"}, ["corpus.path: nosuch://bucket/* cannot be read: "]),
        (
            None,
            {"corpus.path": "no/such", "corpus.format": "datasets", "corpus.rows": 10},
            ["the dataset no/such cannot be"],
        ),
        (None, {"corpus.rows": 10**6}, ["corpus.rows asks for 1,000,000 rows and the corpus has 3,733: ask for at"]),
        (None, {"corpus.context": 4, "corpus.skip_first": 4}, ["corpus.context 4 leaves no rows after skip_first 4"]),
    ],
)
def test_a_corpus_that_cannot_be_used(
    lab: Lab, inputs: Path, file: str | None, changes: dict[str, Any], expected: list[str]
) -> None:
    spec = lab.spec(changes if file is None else {**changes, "corpus.path": str(inputs / file)})
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, spec)
        for words in expected:
            assert words in err


# ---- the model and its tokenizer


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ("nowhere", {}, ["model.id: there is no folder ", "nowhere"]),
        ("no-config", {}, ["model.id: the folder ", "no-config has no config.json: it is not a Hugging Face model"]),
        ("cut-config", {}, ["model.id: ", "cut-config cannot be loaded: ", "not a valid JSON file"]),
        ("unheard-of", {}, ["model.id: ", "unheard-of cannot be loaded: ", "quokka"]),
        ("no-weights", {}, ["model.id: no weights (*.safetensors) in ", "no-weights"]),
        ("gpt2", {}, ["gpt2 is a 'gpt2' model; supported are the Llama-shaped families llama, mistral, "]),
        (
            None,
            {"model.id": "no/such-model"},
            ["model.id: no/such-model cannot be loaded: ", "has nothing of no/such"],
        ),
        (
            "weights-of-two-layers",
            {},
            ["9 tensors that its config.json asks for are not there, the first is layers.1."],
        ),
        (
            "weights-of-another-shape",
            {},
            [" in model.safetensors has the shape [", "], and config.json asks for [", " tensors do not fit, this is"],
        ),
        ("cut-weights", {}, ["model.safetensors is damaged: its header describes ", "download it again"]),
        (
            "one-of-two-files",
            {},
            ["1 of the 2 files that model.safetensors.index.json names are missing, the first is"],
        ),
        (None, {"model.id": "./modle"}, ["model.id: there is no folder ", "/modle"]),
        (None, {"model.id": "models/llama/8b"}, ["model.id: there is no folder models/llama/8b"]),
        (None, {"harvest.compile": True, "harvest.gpus_per_worker": 2}, ["harvest: compile: true needs the model on "]),
        ("no-tokenizer", {}, ["no tokenizer at ", "the folder has no tokenizer.json; give model.tokenizer a folder"]),
        ("cut-tokenizer", {}, ["no tokenizer at ", "it cannot be loaded ("]),
        (None, {"model.tokenizer": "/nowhere"}, ["no tokenizer at /nowhere: there is no such folder; give model.tok"]),
        (None, {"harvest.sites": ["resid_post.7"]}, ["harvest.sites: resid_post.7 is not in ", "3 layers (0 to 2)"]),
        (None, {"harvest.sites": ["mlp_in.0-9"]}, ["harvest.sites: mlp_in.3 is not in ", "3 layers (0 to 2)"]),
    ],
)
def test_a_model_that_cannot_be_used(
    lab: Lab, inputs: Path, model: str | None, changes: dict[str, Any], expected: list[str]
) -> None:
    spec = lab.spec(changes if model is None else {**changes, "model.id": str(inputs / model)})
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, spec)
        for words in expected:
            assert words in err


def test_a_tensor_that_is_missing_is_refused_and_never_made_up(lab: Lab, inputs: Path, corpus: Path) -> None:
    """transformers fills what a checkpoint lacks with random numbers and a warning that no one sees."""
    with pytest.raises(InputError, match=r"weights of .* cannot be loaded: 9 tensors that its config\.json asks"):
        start_harvest(lab.store, inputs / "weights-of-two-layers", corpus, [SITE])
