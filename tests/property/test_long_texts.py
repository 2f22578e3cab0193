"""Encoding in windows gives the ids of the whole text: for every kind of tokenizer, and texts that are hard to cut."""

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.long_texts import KINDS, TEXTS, make_text, make_tokenizer
from pipeline.tokens import long_texts
from pipeline.tokens.tokenizer import encode_texts

ROOT = Path(__file__).parents[2]
SMALL = {"LONG_CHARS": 300, "WINDOW_CHARS": 400, "OVERLAP_CHARS": 160, "MOST_VARIED_CHARS": 3200}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(long_texts, name, value)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return make_tokenizer(kind, vocabulary=800, chars=20_000)


def whole(of: Tokenizer, text: str) -> list[int]:
    return list(of.encode_batch_fast([text], add_special_tokens=False)[0].ids)


PARTS = st.one_of(
    st.sampled_from(
        ["the ", "grain\n", "\n\n", "  ", "\t", "don't", "<s>", "</s>", "\u2581", "e\u0301", "\U0001f33e", "\r\n"]
    ),
    st.text(max_size=20),
    st.builds(
        lambda c, n: c * n,
        st.sampled_from([*"a10 .\n=-_", "ab", "\u96e8", "\u00e9", "aab", "\u0301"]),
        st.integers(1, 700),
    ),
    st.builds(make_text, st.sampled_from(TEXTS), st.integers(1, 900), st.integers(0, 9)),
)


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(PARTS, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
def test_the_ids_are_those_of_the_whole_text(kind: str, parts: list[str]) -> None:
    of, text = tokenizer(kind), "".join(parts)
    ids, expected = long_texts.encode_long(of, text), whole(of, text)
    if kind.startswith("unigram") and ids != expected:  # a tie, decided by how the sums of scores are rounded
        scores = [score for _, score in json.loads(of.to_str())["model"]["vocab"]]
        assert sum(scores[i] for i in ids) == pytest.approx(sum(scores[i] for i in expected), rel=1e-12)
        assert of.decode(ids) == of.decode(expected)
        return
    assert ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_one_kind(kind: str, text: str) -> None:
    of, long = tokenizer(kind), make_text(text, 6000)
    assert long_texts.encode_long(of, long) == whole(of, long)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_places_are_those_in_the_whole_text(kind: str, text: str) -> None:
    of, long = tokenizer(kind), make_text(text, 3000)
    (ids, places), (short, of_short) = long_texts.encode_with_places(of, [long, long[:100]])
    assert (ids, short) == (whole(of, long), whole(of, long[:100]))
    for found, of_text in ((places, long), (of_short, long[:100])):
        assert found.tolist() == [list(p) for p in of.encode(of_text, add_special_tokens=False).offsets]


def test_runs_of_a_vocabulary_of_runs_take_the_best_path() -> None:
    """Paths of a run differ in where they put what is left over: windows are not joined inside it."""
    pieces = [("<unk>", 0.0), *((c * n, -float(n % 3) - 1.0) for c in "ab" for n in (1, 2, 3, 5))]
    of = Tokenizer(models.Unigram(pieces, unk_id=0))
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice("ab") * rng.randint(1, 200) for _ in range(12))
        assert long_texts.encode_long(of, text) == whole(of, text)


def test_several_texts_keep_their_places() -> None:
    of = tokenizer("bytes")
    texts = ["short", make_text("words", 2000), "", make_text("cjk", 1500, 2), "the end"]
    assert long_texts.encode(of, texts) == [whole(of, text) for text in texts]


def test_encode_texts_cuts_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    given_to = []
    encode_long = long_texts.encode_long
    monkeypatch.setattr(long_texts, "encode_long", lambda *a: given_to.append(len(a[1])) or encode_long(*a))
    of = tokenizer("metaspace")
    texts = ["short", make_text("words", 2000)]
    assert encode_texts(PreTrainedTokenizerFast(tokenizer_object=of), texts) == [whole(of, text) for text in texts]
    assert given_to == [2000]


def test_a_vocabulary_of_runs_is_cut_where_its_tokens_end() -> None:
    """Runs whose tokens are counted from their beginning: a window that begins elsewhere never agrees by itself."""
    vocabulary = {"a" * n: n for n in (1, 2, 4, 8)} | {"\u2581": 0, "\u2581a": 3}
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa"), ("\u2581", "a")]
    of = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    for length in range(1990, 2010):
        assert long_texts.encode_long(of, "a" * length) == whole(of, "a" * length)
    of.normalizer = normalizers.Prepend("\u2581")
    for length in range(1990, 2010):
        assert long_texts.encode_long(of, "a" * length) == whole(of, "a" * length)


@pytest.mark.slow
@pytest.mark.parametrize("most", [2, 3, 5, 7])
def test_pieces_that_are_counted_from_the_beginning_of_a_run(most: int) -> None:
    of = make_tokenizer("bytes", vocabulary=600, chars=20_000)
    of.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d{{1,{most}}}|\s+|\D"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for seed in range(5):
        text = make_text("letters", 101 + seed) + make_text("digits", 3000, seed)
        assert long_texts.encode_long(of, text) == whole(of, text)


def test_added_tokens_and_what_they_strip() -> None:
    of = make_tokenizer("llama2", vocabulary=700, chars=20_000)
    of.add_special_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True), AddedToken("<s>")])
    of.add_tokens([AddedToken("grain", single_word=True), AddedToken("  ", normalized=False)])
    rng = random.Random(0)
    for _ in range(20):
        text = "".join(rng.choices(["<|x|>", "  ", " ", "grain", "grains", "<s>", "the", "\n", "a" * 50], k=400))
        assert long_texts.encode_long(of, text) == whole(of, text)


def test_a_text_without_any_place_to_cut_is_encoded_whole() -> None:
    """One token for all of it."""
    of = tokenizer("wordpiece")
    assert long_texts.encode_long(of, "x" * 5000) == whole(of, "x" * 5000) == [of.token_to_id("<unk>")]


@pytest.mark.slow
def test_memory_of_a_window_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to the tokenizer at once is windows, for texts without spaces too."""
    monkeypatch.setattr(long_texts, "AGREEING", 4)  # of tokens of 16 characters more than this do not fit an overlap
    longest = []
    encoded = long_texts._encoded

    def watched(of: Tokenizer, text: str, spans: list[tuple[int, int]]) -> list[long_texts.Window]:
        longest.extend(stop - start for start, stop in spans)
        return encoded(of, text, spans)

    monkeypatch.setattr(long_texts, "_encoded", watched)
    for kind in KINDS:
        if kind == "wordpiece":  # a word of any length is one token
            continue
        for text in TEXTS:
            if (kind, text) == ("bare", "spaces"):  # one unknown token for all of them
                continue
            longest.clear()
            long_texts.encode_long(tokenizer(kind), make_text(text, 20_000))
            assert max(longest) <= 2 * SMALL["MOST_VARIED_CHARS"], (kind, text)
            assert sum(longest) < 40 * 20_000, (kind, text)


def test_how_far_a_text_is_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "SAID_EVERY_S", 0)
    said: list[str] = []
    long_texts.encode(tokenizer("bytes"), [make_text("words", 4000), "short"], said.append)
    assert said[0].startswith("tokenising a text of 4,000 characters: 9 %")
    assert len(said) >= 8


MEMORY = """
import resource
from benchmarks.long_texts import make_text, make_tokenizer
from pipeline.tokens import long_texts
tokenizer = make_tokenizer("llama2", vocabulary=600, chars=20_000)
texts = [make_text("KIND", 20_000_000), *("the grain of field %d" % n for n in range(1000))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = long_texts.encode(tokenizer, texts, lambda text: None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(ids), len(ids[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "letters"])
def test_a_text_of_20_mb_beside_short_ones_takes_little_memory(kind: str) -> None:
    """By itself the tokenizer takes 1.3 to 2.3 GB; what is left is 8 bytes a token, and the windows."""
    code = MEMORY.replace("KIND", kind)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    peak_mib, num_texts, num_tokens = map(int, result.stdout.split())
    assert (num_texts, num_tokens > 5_000_000) == (1001, True)
    assert peak_mib < 600
