"""What a token row is: BOS, control strings, excluded tokens, separators, and what is kept beside documents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from corpora import contexts_of, ensure_rows, ids, plan, store_of, with_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from pipeline.corpus.encode import TextEncoder
from pipeline.errors import InputError
from pipeline.tokens.tokenizer import load_tokenizer
from storage.errors import StoreMismatch
from storage.store import Store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

BOS, EOS = 0, 1
Tokenizing = Callable[[Path], Any]


# ---- BOS


def test_auto_does_what_calling_the_tokenizer_does(tmp_path: Path, llama: Path, without_added_bos: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    for name, model in (("added", llama), ("not", without_added_bos)):
        called = transformers.AutoTokenizer.from_pretrained(model)("count every town")["input_ids"]
        assert contexts_of(store_of(tmp_path / name, corpus, model, skip_first=0)) == [called]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_as_the_spec_says(tmp_path: Path, llama: Path, without_added_bos: Path, bos: bool) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    for name, model in (("added", llama), ("not", without_added_bos)):
        found = contexts_of(store_of(tmp_path / name, corpus, model, bos=bos, skip_first=0))
        assert found == [[BOS] * bos + ids(model, "count every town")]


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_every_window_begins_alike(tmp_path: Path, llama: Path, bos: Any) -> None:
    text = "count every town " * 20
    corpus = write(tmp_path / "a.jsonl", [{"text": text}])
    windows = contexts_of(store_of(tmp_path / "store", corpus, llama, bos=bos, context=16, skip_first=0))
    assert len(windows) > 3
    lead = int(bos is not False)
    assert all(window[:lead] == [BOS] * lead for window in windows)
    assert [t for window in windows for t in window[lead:]] == ids(llama, text)


@pytest.mark.parametrize("content", ["text", "tokens"])
def test_a_bos_that_is_there_is_not_doubled(tmp_path: Path, llama: Path, content: str) -> None:
    given = {"text": "<s>one two three"} if content == "text" else {"tokens": [BOS, 40, 41, 42]}
    corpus = write(tmp_path / "a.jsonl", [given])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama, **{content: content}, specials="tokens"))
    assert context.count(BOS) == 1
    assert context[0] == BOS


def test_a_bos_is_asked_for_that_there_is_not(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"corpus\.bos: the tokenizer has no BOS; leave the key out"):
        plan(corpus, model, bos=True)
    assert plan(corpus, model, bos=False).sizes.rows


def test_a_tokenizer_that_begins_with_several_tokens(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> </s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"begins texts with 2 tokens \(<s> </s>\).*corpus\.bos: true"):
        plan(corpus, model)
    assert contexts_of(store_of(tmp_path / "store", corpus, model, bos=True))[0][:2] != [BOS, EOS]


def test_an_eos_that_a_tokenizer_adds_is_no_row(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    assert contexts_of(store_of(tmp_path / "store", corpus, model)) == [ids(llama, "count every town")]


# ---- control strings


@pytest.mark.parametrize(
    "text", ["strike <s>old</s> new text", "<s>one two three", "a log: <pad><pad></s>", "</s>", "<s><s> town"]
)
def test_control_strings_are_text(tmp_path: Path, llama: Path, text: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": text}])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama))
    assert context[0] == BOS
    assert not {BOS, EOS, 2}.intersection(context[1:])
    assert load_tokenizer(str(llama)).decode(context[1:]) == text


def test_control_strings_as_tokens(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "strike <s>old</s> new text"}])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama, specials="tokens"))
    assert context == [BOS, *ids(llama, "strike <s>old</s> new text")]
    assert EOS in context


def test_a_tokenizer_is_left_as_it_was(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    TextEncoder(tokenizer, BOS, "text").encode(["</s>"])
    assert tokenizer.backend_tokenizer.encode("</s>", add_special_tokens=False).ids == [EOS]


def test_a_store_from_before_there_was_a_choice_says_so(tmp_path: Path, llama: Path) -> None:
    """Its control strings are tokens: it goes on with the key that says it, and is refused without."""
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every <s> town"}])
    model = ModelSettings(id=str(llama))

    def ensure(**options: Any) -> tuple[Store, bool]:
        spec = CorpusSettings(path=str(corpus), context=64, **options)
        return ensure_rows(tmp_path / "store", spec, model)

    store, made = ensure(specials="tokens")
    assert made
    assert "specials" not in store.info.plan  # as stores from before
    assert not ensure(specials="tokens")[1]
    with pytest.raises(StoreMismatch, match=r"corpus\.specials: 'tokens' in the store, 'text' in the spec"):
        ensure()


PIECES = ["count", " every", "<s>", "</s>", "<pad>", "<", "s>", "\n", "雨", " naïve", "a" * 40, "\t", "</", "é", "🌧"]


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), context=st.sampled_from([5, 9, 64]))
def test_rows_are_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: list[str], context: int
) -> None:
    """Decoding a document's rows gives its text back, whatever control strings it holds and however it is cut."""
    text = "".join(parts)
    if not text.strip():
        return
    folder = tmp_path_factory.mktemp("rows")
    store = store_of(folder / "store", write(folder / "a.jsonl", [{"text": text}]), llama, context=context)
    tokens = store.columns(0, store.num_rows, ("token",))["token"].tolist()
    assert load_tokenizer(str(llama)).decode(tokens, skip_special_tokens=False) == text
    assert not {BOS, EOS, 2}.intersection(tokens)
