"""Tokenizers that are written down otherwise and do the same, and such that do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import harvest, start_harvest, write_corpus
from lab import SITE, SITES, Lab

from pipeline.tokens.same_tokenizer import are_same, read_backend
from pipeline.tokens.tokenizer import load_tokenizer, tokenizer_digest
from storage.store import open_store

Change = Callable[[dict[str, Any]], None]


def in_a_sequence(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"]]}


def without_post_processor(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def an_empty_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": []}


def merges_as_texts_and_keys_in_another_order(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["model"] = dict(reversed(content["model"].items()))
    in_a_sequence(content)


def other_merges_first(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def no_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = []


def two_ids_exchanged(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def composed(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def a_blank_put_before(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def digits_apart(content: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    content["model"]["vocab"]["98"] = 320
    content["model"]["merges"].append(["9", "8"])


def an_added_token_that_takes_blanks(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["rstrip"] = True


def another_added_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<granary>"})


SAME: list[Change] = [
    in_a_sequence,
    without_post_processor,
    an_empty_normalizer,
    merges_as_texts_and_keys_in_another_order,
]
OTHER: list[Change] = [
    other_merges_first,
    no_merges,
    two_ids_exchanged,
    lower_case,
    composed,
    a_blank_put_before,
    an_added_token_that_takes_blanks,
    another_added_token,
]


def rewrite(model: Path, change: Change) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def model(lab: Lab, llama: Path) -> Path:
    """A copy of the model in the lab's folder, which may be changed."""
    return shutil.copytree(llama, lab.folder / "model")


def changed(llama: Path, folder: Path, change: Change) -> Path:
    model = folder / "model"
    shutil.copytree(llama, model)
    rewrite(model, change)
    return model


@pytest.mark.parametrize("change", [*SAME, *OTHER, digits_apart])
def test_what_a_tokenizer_does_counts(llama: Path, tmp_path: Path, change: Change) -> None:
    backend = read_backend((changed(llama, tmp_path, change) / "tokenizer.json").read_text())
    assert are_same(read_backend((llama / "tokenizer.json").read_text()), backend) == (change in SAME)


def test_the_callers_texts_are_tried_too(llama: Path, tmp_path: Path) -> None:
    def one_word(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "xyzzy"}, "content": "plugh"}

    plain = read_backend((llama / "tokenizer.json").read_text())
    other = read_backend((changed(llama, tmp_path, one_word) / "tokenizer.json").read_text())
    assert are_same(plain, other)  # the sample does not have the word
    assert not are_same(plain, other, ["it says xyzzy"])


@pytest.mark.parametrize("change", SAME)
def test_a_store_goes_on_with_a_tokenizer_that_is_written_otherwise(
    lab: Lab, model: Path, corpus: Path, no_ray: None, change: Change
) -> None:
    harvest(lab.store, model, corpus, SITES)
    before = tokenizer_digest(load_tokenizer(str(model)))
    rewrite(model, change)
    now = tokenizer_digest(load_tokenizer(str(model)))
    # Without its post-processor a tokenizer adds no BOS, which is what bos: auto goes by.
    spec = lab.spec({"model.id": "model", "corpus.bos": True})
    assert "all 4 units of resid_post.1, mlp_in.0, mlp_out.0 are there" in lab.run("harvest", spec)
    assert json.loads(lab.run("plan", spec, "--json"))["units_left"] == 0
    assert open_store(lab.store).info.tokenizer_digest == before
    if change is in_a_sequence:
        assert now != before  # or else nothing was tested


@pytest.mark.parametrize("change", OTHER)
def test_a_store_refuses_a_tokenizer_that_does_something_else(
    lab: Lab, model: Path, corpus: Path, no_ray: None, change: Change
) -> None:
    harvest(lab.store, model, corpus, [SITE])
    rewrite(model, change)
    spec = lab.spec({"model.id": "model", "harvest.sites": [SITE]})
    for verb in ("harvest", "plan"):
        err = lab.refused(verb, spec)
        assert f"the tokenizer of {model} (" in err
        assert ") is not the one the store was planned with (" in err


def test_a_store_grows_with_a_tokenizer_that_is_written_otherwise(
    lab: Lab, model: Path, corpus: Path, texts: list[str]
) -> None:
    store = harvest(lab.store, model, corpus, [SITE])
    rewrite(model, in_a_sequence)
    more = write_corpus(lab.folder / "more.parquet", texts[:20])
    grown = start_harvest(lab.store, model, [corpus, more], [SITE], grow=True).store
    assert grown.num_rows > store.num_rows
    assert grown.info.tokenizer_digest == store.info.tokenizer_digest
    assert start_harvest(lab.store, model, [corpus, more], [SITE]).store.num_rows == grown.num_rows


def test_a_stored_tokenizer_that_cannot_be_read(lab: Lab, model: Path, corpus: Path, no_ray: None) -> None:
    """Its digest still tells the same tokenizer; another one cannot be compared, and is refused."""
    import hashlib

    from storage.backends.place import open_place
    from storage.format.records import encode_zarr, read_record

    harvest(lab.store, model, corpus, SITES)
    content = b'{"version": "9.0", "model": {"type": "Unheard"}}'
    (lab.store / "corpus" / "tokenizer" / "tokenizer.json").write_bytes(content)
    place = open_place(lab.store) / "zarr.json"
    root = read_record(place)
    root["attributes"]["granary"]["files"]["tokenizer/tokenizer.json"] = hashlib.sha256(content).hexdigest()
    place.write(encode_zarr(root))
    assert "are there" in lab.run("harvest", lab.spec({"model.id": "model"}))
    rewrite(model, in_a_sequence)
    assert "is not the one the store was planned with" in lab.refused("harvest", lab.spec({"model.id": "model"}))
