"""For any text, any spans and any cut into windows, each row has the value of the span that its characters lie in."""

import numpy as np
import pyarrow as pa
import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers

from pipeline.capture.contexts import ContextPolicy
from pipeline.corpus.documents import Sizes, cut, document_keys
from pipeline.corpus.encode import TextEncoder, TokensEncoder
from pipeline.corpus.extents import encode_with_extents, trimmed
from pipeline.corpus.formats.aligned import AlignedLabel
from pipeline.corpus.spans import innermost, labelled
from pipeline.corpus.table_columns import row_column
from pipeline.corpus.token_labels import NONE, TokenLabels, joined_labels
from pipeline.tokens.tokenizer import encode_texts

CHARACTERS = st.text(st.sampled_from("ab cé雨😀\u0301\n\u00a0\u3000ﬁ.") | st.characters(codec="utf-8"), max_size=30)
MARKS = st.lists(st.sampled_from(["<s>", "</s>", "ab ", " é", "<0x41>"]), max_size=6).map("".join)
"""Strings that tokenizers may take for tokens."""
TEXTS = CHARACTERS | MARKS


def spans_in(text: str) -> st.SearchStrategy[list[tuple[int, int, str]]]:
    places = st.integers(0, len(text))
    span = st.tuples(places, places, st.sampled_from("xyz")).map(lambda s: (min(s[:2]), max(s[:2]), s[2]))
    return st.lists(span, max_size=5)


ANNOTATED = st.lists(TEXTS.flatmap(lambda text: st.tuples(st.just(text), spans_in(text))), max_size=4)


@pytest.fixture(scope="module")
def sentencepiece() -> transformers.PreTrainedTokenizerFast:
    """As Llama 2's: a first space, bytes of unknown characters, and here a normaliser that changes lengths."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", *pieces], show_progress=False)
    bpe.train_from_iterator(["ab cab abc b.a"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def encoder(request: pytest.FixtureRequest, tokenizer: transformers.PreTrainedTokenizerFast) -> TextEncoder:
    of = tokenizer if request.param == "bytes" else request.getfixturevalue("sentencepiece")
    return TextEncoder(of, None, "tokens", with_extents=True)


def value_of(characters: range, text: str, spans: list[tuple[int, int, str]]) -> str | None:
    """The oracle: the value of a token that stands for some characters of a text."""
    solid = [at for at in characters if not text[at].isspace()]
    if solid:  # white space between two solid characters counts, at the ends it does not
        characters = range(solid[0], solid[-1] + 1)
    found = [
        (stop - start, -n, value)
        for n, (start, stop, value) in enumerate(spans)
        if {*range(start, stop)} & {*characters}
    ]
    return min(found)[2] if found else None


@given(ANNOTATED, st.integers(3, 9), st.integers(0, 2), st.booleans())
@example([("ab ab", [(0, 2, "x"), (2, 5, "y")])], 4, 1, True)
def test_rows_have_the_values_of_their_characters(
    encoder: TextEncoder, given_texts: list[tuple[str, list[tuple[int, int, str]]]], context: int, skip: int, bos: bool
) -> None:
    texts = [text for text, _ in given_texts]
    aligned = {"span": AlignedLabel([[list(span) for span in spans] for _, spans in given_texts], are_tags=False)}
    plain = TextEncoder(encoder.tokenizer, None, "tokens").encode(texts)
    encoded = labelled(encoder.encode(texts), aligned, texts)
    assert encoded.tokens.tolist() == plain.tokens.tolist()  # offsets change no token
    assert (encoded.lengths.tolist(), encoded.bad) == (plain.lengths.tolist(), plain.bad)
    offsets = encoder.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    wanted = [
        value_of(range(*offset), text, spans)
        for (text, spans), encoding in zip(given_texts, offsets, strict=True)
        for offset in encoding.offsets
        if text.strip()
    ]
    names = encoded.labels.names["span"]
    assert [None if c == NONE else names[c] for c in encoded.labels.codes["span"].tolist()] == wanted
    records = np.arange(len(texts))
    about = pa.table({"source": [str(n) for n in records]})
    policy = ContextPolicy(context, skip, 7 if bos else None)
    documents = cut(encoded, records, document_keys(0, records), about, policy, ())
    step, lead = context - bos, int(bos)
    rows: list[str | None] = []
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    for start, length in zip(starts.tolist(), encoded.lengths.tolist(), strict=True):
        for first in range(0, length, step):
            window = [*([None] * lead), *wanted[start + first : start + min(first + step, length)]]
            rows += window[skip:]
    codes = row_column(documents, "span", Sizes(0, 0, 0, 0)) if len(documents.keys) else np.array([], np.int32)
    assert [None if c == NONE else names[c] for c in codes.tolist()] == rows


@given(st.lists(st.lists(st.sampled_from([None, "x", "y", 3]), max_size=6), max_size=4), st.booleans())
def test_tags_are_those_of_their_tokens(tags: list[list[object]], has_bos: bool) -> None:
    ids = [[0 if has_bos and n == 0 else 1 + n for n in range(len(of_record))] for of_record in tags]
    aligned = {"tag": AlignedLabel(list(tags), are_tags=True)}
    encoded = labelled(TokensEncoder(99, 0, with_extents=True).encode(ids), aligned, ids)
    names = encoded.labels.names["tag"]
    wanted = [tag for of_record in tags for tag in of_record[int(has_bos) :]]
    found = [None if c == NONE else names[c] for c in encoded.labels.codes["tag"].tolist()]
    assert found == [None if tag is None else str(tag) for tag in wanted]
    assert encoded.tokens.tolist() == TokensEncoder(99, 0).encode(ids).tokens.tolist()


@given(st.data())
def test_tokens_out_of_order_are_labelled_alike(data: st.DataObject) -> None:
    """A normaliser may reorder characters: the same tokens in another order have the same values."""
    ends = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)
    extents = np.array(sorted(data.draw(st.lists(ends, min_size=1, max_size=8))), np.int64).reshape(-1, 2)
    extents = np.stack([np.maximum.accumulate(extents[:, 0]), np.maximum.accumulate(extents[:, 1])], axis=1)
    spans = np.array(data.draw(st.lists(ends, max_size=4)), np.int64).reshape(-1, 2)
    codes = np.arange(len(spans), dtype=np.int32)
    order = np.array(data.draw(st.permutations(range(len(extents)))))
    assert innermost(extents, spans, codes)[order].tolist() == innermost(extents[order], spans, codes).tolist()


@given(
    st.lists(st.tuples(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), st.data()), min_size=1)
)
def test_joined_labels_keep_every_value(parts: list[tuple[list[str], st.DataObject]]) -> None:
    values: list[list[str | None]] = []
    labels = []
    for names, data in parts:
        codes = np.array(data.draw(st.lists(st.integers(-1, len(names) - 1), max_size=4)), dtype=np.int32)
        labels.append(TokenLabels({"l": codes}, {"l": tuple(names)}))
        values.append([None if code == NONE else names[code] for code in codes.tolist()])
    joined = joined_labels(labels, [len(part) for part in values])
    wanted = [value for part in values for value in part]
    if wanted:
        found = [None if c == NONE else joined.names["l"][c] for c in joined.codes["l"].tolist()]
        assert found == wanted
        assert list(joined.names["l"]) == sorted(joined.names["l"])
        used = joined.used(np.ones(len(wanted), dtype=bool))["l"]
        assert used == sorted({value for value in wanted if value is not None})
        again = joined.numbered({"l": ["other", *reversed(used)]})
        assert [None if c == NONE else again.names["l"][c] for c in again.codes["l"].tolist()] == wanted


@given(TEXTS)
def test_ids_with_extents_are_those_without(encoder: TextEncoder, text: str) -> None:
    ids, extents = encode_with_extents(encoder.tokenizer, [text, text])
    assert ids == encode_texts(encoder.tokenizer, [text, text])
    assert [len(of) for of in extents] == [len(of) for of in ids]
    assert (extents[0] >= 0).all()
    assert (extents[0] <= len(text)).all()
    assert (extents[0][:, 0] <= extents[0][:, 1]).all()


def test_white_space_at_the_ends_of_a_token_does_not_count() -> None:
    text = " ab \u3000\ncd\u200b"
    offsets = np.array([[0, 4], [4, 6], [6, 8], [0, 9], [3, 4], [9, 9]])
    assert trimmed(offsets, text).tolist() == [[1, 3], [4, 6], [6, 8], [1, 9], [3, 4], [9, 9]]
    assert trimmed(np.empty((0, 2), np.int64), "").tolist() == []
