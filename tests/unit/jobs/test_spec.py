"""The spec file: the shortest one and its defaults, paths, ranges of sites, and all mistakes at once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from jobs.spec.spec import Spec, SpecError, load_spec, parse_spec
from jobs.spec.variables import escaped, expanded
from pipeline.sdl.dictionary.activations import TopK
from workers.plan.stage import held_out_start
from workers.settings.corpus import CorpusSettings

SHORTEST = {
    "store": "acts",
    "model": {"id": "meta-llama/Llama-3.1-8B"},
    "corpus": {"path": "data/*.parquet"},
    "harvest": {"sites": ["resid_post.8"]},
}
DICTIONARY = {"name": "sae", "input": "resid_post.8", "latents": 256}


def parse(folder: Path = Path("/specs"), **sections: Any) -> Spec:
    """The shortest spec with keys of sections added, or set."""
    raw: dict[str, Any] = copy.deepcopy(SHORTEST)
    for section, keys in sections.items():
        raw[section] = {**raw.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return parse_spec(raw, folder)


def mistakes(**sections: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse(**sections)
    first, *rest = str(caught.value).splitlines()
    return [line.strip() for line in rest] if rest else [first.removeprefix("spec: ")]


def test_the_shortest_useful_spec() -> None:
    spec = parse()
    assert spec.store == "/specs/acts"
    assert (spec.model.id, spec.model.revision, spec.model.dtype) == ("meta-llama/Llama-3.1-8B", "main", "bfloat16")
    assert spec.model.tokenizer is None
    assert spec.corpus.path == ("/specs/data/*.parquet",)
    assert (spec.corpus.content, spec.corpus.labels, spec.corpus.rows) == (("text", "text"), (), None)
    assert (spec.corpus.context, spec.corpus.skip_first, spec.corpus.seed) == (1024, 1, 0)
    assert (spec.corpus.rows_per_unit, spec.corpus.holdout) == ("auto", 0.05)
    assert spec.harvest.sites == ("resid_post.8",)
    assert (spec.harvest.dtype, spec.harvest.workers, spec.harvest.gpus_per_worker) == ("bfloat16", "auto", 0)
    assert spec.anchors == ()
    assert spec.train is None
    assert spec.cluster.address == "local"


def test_a_dictionary_needs_name_input_and_latents() -> None:
    spec = parse(train={"dictionaries": [DICTIONARY]})
    assert spec.train is not None
    (dictionary,) = spec.train.dictionaries
    assert dictionary.input == dictionary.outputs == ("resid_post.8",)
    assert (dictionary.activation.activation(), dictionary.anchors) == (TopK(32), None)
    assert (spec.train.rows, spec.train.batch_rows) == (None, 4096)


def test_a_spec_cannot_be_changed() -> None:
    spec = parse()
    with pytest.raises(ValueError, match="frozen"):
        spec.corpus.context = 5  # type: ignore[misc]


# ---- sites


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mlp_in.4", ("mlp_in.4",)),
        (["resid_post.{4,8,12}"], ("resid_post.4", "resid_post.8", "resid_post.12")),
        ("mlp_in.4-6", ("mlp_in.4", "mlp_in.5", "mlp_in.6")),
        (["mlp_in.0-1", "mlp_out.{0-1,3}"], ("mlp_in.0", "mlp_in.1", "mlp_out.0", "mlp_out.1", "mlp_out.3")),
        (["mlp_in.0-1", "mlp_in.1"], ("mlp_in.0", "mlp_in.1")),
    ],
)
def test_ranges_of_sites(written: Any, meant: tuple[str, ...]) -> None:
    assert parse(harvest={"sites": written}).harvest.sites == meant


def test_a_dictionary_s_sites_may_be_in_a_range_of_the_harvest() -> None:
    transcoder = {**DICTIONARY, "input": "mlp_in.5", "output": ["mlp_out.5"]}
    spec = parse(harvest={"sites": ["mlp_in.4-8", "mlp_out.4-8"]}, train={"dictionaries": [transcoder]})
    assert spec.train is not None
    assert spec.train.dictionaries[0].outputs == ("mlp_out.5",)
    outside = {**transcoder, "output": "mlp_out.9"}
    told = mistakes(harvest={"sites": ["mlp_in.4-8", "mlp_out.4-8"]}, train={"dictionaries": [outside]})
    assert told == [
        "train.dictionaries[0]: mlp_out.9 is not one of harvest.sites (mlp_in.4, mlp_in.5, mlp_in.6, mlp_in.7, "
        "mlp_in.8, mlp_out.4, mlp_out.5, mlp_out.6, mlp_out.7, mlp_out.8)"
    ]


@pytest.mark.parametrize(
    ("sites", "told"),
    [
        (["resid_pots.8"], "harvest.sites: unknown site 'resid_pots.8': did you mean resid_post.8?"),
        ("mlp_in.8-4", "harvest.sites: site 'mlp_in.8-4': a range of layers goes upward, not from 8 to 4"),
        ([], "harvest.sites takes at least 1, not 0"),
        ([8], "harvest.sites[0] must be text, not 8"),
        (None, "harvest.sites must be a list, not None"),
    ],
)
def test_bad_sites(sites: Any, told: str) -> None:
    assert mistakes(harvest={"sites": sites}) == [told]


# ---- paths


def test_relative_paths_are_taken_from_the_spec_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs" / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "specs" / "spec.yaml").write_text(
        yaml.safe_dump({**SHORTEST, "store": "../acts", "model": {"id": "models/tiny", "tokenizer": "./tokens"}})
    )
    monkeypatch.chdir(tmp_path)
    for path in ("specs/spec.yaml", tmp_path / "specs" / "spec.yaml"):
        spec = load_spec(path)
        assert spec.store == str(tmp_path / "specs" / ".." / "acts")
        assert spec.corpus.path == (str(tmp_path / "specs" / "data" / "*.parquet"),)
        assert spec.model.id == str(tmp_path / "specs" / "models" / "tiny")
        assert spec.model.tokenizer == str(tmp_path / "specs" / "tokens")


def test_absolute_paths_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    spec = parse(store="/data/acts", model={"id": "~/models/tiny"}, corpus={"path": "/data/*.parquet"})
    assert (spec.store, spec.corpus.path) == ("/data/acts", ("/data/*.parquet",))
    assert spec.model.id == "/home/someone/models/tiny"
    several = parse(tmp_path, corpus={"path": ["a", "/b/*.parquet", "s3://bucket/c"]})
    assert several.corpus.path == (str(tmp_path / "a"), "/b/*.parquet", "s3://bucket/c")
    assert parse(store="s3://bucket/acts").store == "s3://bucket/acts"


def test_hub_ids_are_left_alone_unless_a_folder_has_the_name(tmp_path: Path) -> None:
    model = {"id": "org/name", "tokenizer": "org/name"}
    spec = parse(tmp_path, model=model)
    assert (spec.model.id, spec.model.tokenizer) == ("org/name", "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    spec = parse(tmp_path, model=model)
    assert (spec.model.id, spec.model.tokenizer) == (str(tmp_path / "org" / "name"),) * 2


# ---- mistakes


def test_all_mistakes_at_once() -> None:
    dictionaries = [
        {"name": "a b", "input": "resid_post.8", "latents": 0},
        {"name": "b", "input": [], "latent": 5, "activation": {"kind": "jump", "kk": 1}},
        {"name": "c", "input": "resid_pots.8", "latents": 9, "loss": {"l_1": 5, "prefixes": 3}, "skip": "perhaps"},
        {"name": "d", "input": "a/resid_post.8", "latents": 9, "anchors": {"wieght": 1, "distance": "cosin"}},
        {"name": "e", "input": "mlp_in.8", "latents": 9, "resampling": {"att": [0.5], "rows": 0}, "decay": 2},
        {"name": "f", "input": "mlp_in.8", "latents": 9, "activation": {"kind": "relu", "k": 3}, "clip": 0},
    ]
    told = mistakes(
        stor="x",
        model={"dtype": "int8"},
        corpus={"context": 1, "rows_per_unit": 1000, "seed": "a", "rows": 2.5},
        harvest={"sites": "resid_pots.1", "workers": "many", "compile": "maybe"},
        train={"batch_rows": 0, "dictionaries": dictionaries},
        cluster="auto",
    )
    for line in (
        "unknown key stor: did you mean store?",
        "model.dtype must be 'float32', 'bfloat16' or 'float16', not 'int8'",
        "corpus.context must be greater than 1, not 1",
        "corpus.rows_per_unit must be at least 1024 or 'auto', not 1000",
        "corpus.seed must be a whole number, not 'a'",
        "corpus.rows must be a whole number, not 2.5",
        "harvest.sites: unknown site 'resid_pots.1': did you mean resid_post.1?",
        "harvest.workers must be a whole number or 'auto' or a range like 2-16, not 'many'",
        "harvest.compile must be true or false or 'auto', not 'maybe'",
        "train.batch_rows must be greater than 0, not 0",
        "train.dictionaries[0].name must be letters, digits and _ . - after a first letter or digit, not 'a b'",
        "train.dictionaries[0].latents must be greater than 0, not 0",
        "train.dictionaries[1].input takes at least 1, not 0",
        "train.dictionaries[1].latents is missing",
        "unknown key train.dictionaries[1].latent: did you mean latents?",
        "train.dictionaries[1].activation.kind must be 'topk', 'batch_topk', 'relu', 'jumprelu' or 'gated', not 'jump'",
        "unknown key train.dictionaries[1].activation.kk: did you mean k?",
        "train.dictionaries[2].input: unknown site 'resid_pots.8': did you mean resid_post.8?",
        "unknown key train.dictionaries[2].loss.l_1: did you mean l1?",
        "train.dictionaries[2].loss.prefixes must be a list, not 3",
        "train.dictionaries[2].skip must be true or false, not 'perhaps'",
        "train.dictionaries[3].anchors.name is missing",
        "unknown key train.dictionaries[3].anchors.wieght: did you mean weight?",
        "train.dictionaries[3].anchors.distance must be 'squared' or 'cosine', not 'cosin'",
        "unknown key train.dictionaries[4].resampling.att: did you mean at?",
        "train.dictionaries[4].resampling.rows must be greater than 0, not 0",
        "train.dictionaries[4].decay must be at most 1, not 2",
        "train.dictionaries[5].activation: relu has no k",
        "train.dictionaries[5].clip must be greater than 0, not 0",
        "cluster must be a section with keys like address, hang_s, load_s, grace_s",
    ):
        assert line in told, line
        told.remove(line)
    assert told == []


def test_an_empty_spec_misses_the_four_that_are_needed() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({}, Path("/specs"), "my.yaml")
    assert str(caught.value).splitlines() == [
        "my.yaml:",
        "  store is missing",
        "  model is missing",
        "  corpus is missing",
        "  harvest is missing",
    ]


def test_a_section_that_is_not_one() -> None:
    assert mistakes(corpus=None) == ["corpus must be a section with keys like path, format, subset, split"]
    assert mistakes(train={"dictionaries": "sae"}) == ["train.dictionaries must be a list, not 'sae'"]
    assert mistakes(train={"dictionaries": []}) == ["train.dictionaries takes at least 1, not 0"]
    assert mistakes(train={"dictionaries": ["sae"]}) == [
        "train.dictionaries[0] must be a section with keys like name, input, output, latents"
    ]


def every_key(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The sections of a spec that take keys, as paths; () is the spec itself."""
    found = [prefix]
    for name, field in model.model_fields.items():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += every_key(inner, (*prefix, name))
    return found


@pytest.mark.parametrize("section", every_key(Spec))
def test_unknown_keys_are_refused_in_every_section(section: tuple[str, ...]) -> None:
    raw: Any = copy.deepcopy(SHORTEST)
    raw |= {"anchors": {"name": "a", "by": []}, "train": {"dictionaries": [DICTIONARY | {"activation": {}}]}}
    inner, where = raw, []
    for name in section:
        inner = inner.setdefault(name, {})
        where.append(name)
        if isinstance(inner, list):
            inner, where[-1] = inner[0], f"{name}[0]"
    inner["zzz"] = 1
    with pytest.raises(SpecError) as caught:
        parse_spec(raw, Path("/specs"))
    assert f"unknown key {'.'.join([*where, 'zzz'])}: known keys here: " in str(caught.value)


def test_what_spans_sections() -> None:
    anchored = {**DICTIONARY, "anchors": "languages"}
    assert mistakes(train={"dictionaries": [anchored]}) == [
        "train.dictionaries[0].anchors: no anchor set 'languages' (there is none)"
    ]
    anchors = {"name": "kinds", "by": ["language", "kind"]}
    assert mistakes(corpus={"labels": "kind"}, anchors=anchors, train={"dictionaries": [anchored]}) == [
        "anchors.by: 'language' is not one of corpus.labels (kind)",
        "train.dictionaries[0].anchors: no anchor set 'languages' ('kinds')",
    ]
    few = {**DICTIONARY, "latents": 16}
    assert mistakes(train={"dictionaries": [DICTIONARY | {"name": "a"}, few]}) == [
        "train.dictionaries[1]: activation.k must be a whole number between 1 and latents = 16, not 32"
    ]
    assert mistakes(train={"dictionaries": [DICTIONARY, DICTIONARY]}) == [
        "train: dictionaries need different names; sae is used twice"
    ]


def test_what_spans_sections_and_is_right() -> None:
    spec = parse(
        corpus={"labels": ["language"]},
        anchors={"name": "languages", "by": "language"},
        train={"dictionaries": [{**DICTIONARY, "anchors": "languages", "activation": {"k": 256}}]},
    )
    assert [anchors.by for anchors in spec.anchors] == [("language",)]


# ---- the file


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2024-13-01", r"'2024-13-01' is no timestamp \(month must be in 1..12\); put it in quotes if it is text"),
        ("2024-01-01 25:00:00", "is no timestamp"),
        ("!!int x", "'x' is no int"),
        ("!!float y", "'y' is no float"),
        ("!!timestamp x", "'x' is no timestamp"),
        ("-0x_", "'-0x_' is no int"),
        ("[" * 3000, "it is nested too deeply"),
    ],
)
def test_values_that_python_cannot_make(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "spec.yaml").write_text(f"store: acts\ncorpus: {{chat_date: {value}}}\n")
    with pytest.raises(SpecError, match=rf"spec\.yaml is not valid YAML: (line 2, column \d+: )?.*{said}"):
        load_spec(tmp_path / "spec.yaml")


def test_yaml_s_own_merging_of_keys_is_no_key_given_twice(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump(SHORTEST)
        + "train:\n  dictionaries:\n"
        + "  - &first {name: a, input: resid_post.8, latents: 64}\n  - {<<: *first, name: b}\n"
    )
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.train is not None
    assert [(d.name, d.latents) for d in spec.train.dictionaries] == [("a", 64), ("b", 64)]


def test_a_key_given_twice_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SHORTEST) + "corpus: {path: other.parquet}\n")
    with pytest.raises(SpecError, match=r"spec\.yaml is not valid YAML: line \d+, column 1: 'corpus' is given twice"):
        load_spec(tmp_path / "spec.yaml")


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(SHORTEST).replace("path: data/*.parquet", "path: d.parquet\n  rows: 100_000_000")
    (tmp_path / "spec.yaml").write_text(text)
    assert load_spec(tmp_path / "spec.yaml").corpus.rows == 100_000_000


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, 1024), (16_384, 1024), (40_000, 2048), (800_000, 32768), (10**9, 65536)]
)
def test_units_of_a_small_corpus_are_small(num_rows: int, expected: int) -> None:
    assert CorpusSettings(path="x").unit_size(num_rows) == expected
    assert CorpusSettings(path="x", rows_per_unit=4096).unit_size(num_rows) == 4096


@given(st.integers(1, 10**6), st.sampled_from([1024, 4096, 65536]), st.floats(0.01, 0.6))
def test_at_least_the_share_is_held_out_in_whole_units(num_rows: int, rows_per_unit: int, share: float) -> None:
    start = held_out_start(num_rows, rows_per_unit, share)
    assert start % rows_per_unit == 0 or start == num_rows
    assert start >= min(num_rows, rows_per_unit)
    if num_rows > 2 * rows_per_unit:
        assert num_rows - start >= share * num_rows - 1
        assert num_rows - start <= share * num_rows + 2 * rows_per_unit
    assert held_out_start(num_rows, rows_per_unit, 0.0) == num_rows


# ---- environment variables and home folders


def test_variables_are_replaced_in_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SCRATCH", "/scratch/ada"), ("ROWS", "1000"), ("WHO", "a${b}"), ("MODEL", "org/model")):
        monkeypatch.setenv(name, value)
    spec = parse(
        store="${SCRATCH}/acts-${WHO}",
        model={"id": "${MODEL}"},
        corpus={"path": ["${SCRATCH}/a/*.parquet", "$x/$$y"], "rows": "${ROWS}", "labels": ["language"]},
        anchors=[{"name": "words", "where": {"dollars": "language = '$${WHO} $1'"}}],
    )
    assert spec.store == "/scratch/ada/acts-a${b}"  # once: what a variable holds is text
    assert spec.model.id == "org/model"
    assert spec.corpus.path == ("/scratch/ada/a/*.parquet", "/specs/$x/$$y")
    assert spec.corpus.rows == 1000
    assert spec.anchors[0].where == {"dollars": "language = '${WHO} $1'"}


def test_variables_that_cannot_be_replaced_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    found = mistakes(store="${GONE}/acts", corpus={"path": ["here", "${EMPTY}x"]}, model={"id": "${A:-b}"})
    assert found == [
        "store: the environment variable GONE is not set: set it, or write $${GONE} for the text itself",
        "model.id: ${A:-b} names no environment variable (letters, digits and _); write $${A:-b} for the text itself",
        "corpus.path[1]: the environment variable EMPTY is empty: set it, or write $${EMPTY} for the text itself",
    ]


def test_credentials_in_a_variable_are_refused_in_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written out they are: no value of a variable reaches a store or a job that a spec's text may not."""
    monkeypatch.setenv("SECRET", "key:secret")
    (problem,) = mistakes(store="s3://${SECRET}@bucket/acts")
    assert "carries credentials" in problem
    assert "secret" not in problem.removeprefix("store: the URL s3://... carries credentials")[:20]


@pytest.mark.parametrize("text", ["plain", "${A}", "$${A}", "$$${A} ${B:-c}", "$ {", "${", "a${b}c}"])
def test_what_is_escaped_is_read_back_as_it_was(text: str) -> None:
    value = {"key": [text, 5, {"inner": text}], "none": None}
    assert expanded(escaped(value), {}) == (value, [])


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    spec = parse(store="~/acts", corpus={"path": "~/data/*.parquet"}, model={"id": "~/models/llama"})
    assert spec.store == "/home/ada/acts"
    assert spec.corpus.path == ("/home/ada/data/*.parquet",)
    assert spec.model.id == "/home/ada/models/llama"
    for section in ({"store": "~nobody-here/acts"}, {"corpus": {"path": "~nobody-here/x"}}):
        (problem,) = mistakes(**section)
        assert problem.startswith("no folder of a user ~nobody-here on this machine: ~nobody-here/")
