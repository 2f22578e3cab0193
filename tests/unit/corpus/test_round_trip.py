"""Texts that go through a tokenizer and back: sound ones of every kind, and broken ones. All made here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import WORDS, write_corpus
from corpora import VOCABULARY, plan, with_tokenizer, write
from lab import Lab
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from pipeline.corpus.round_trip import RECORDS, TEXTS, check_round_trip, sample_texts, unknown_token
from pipeline.errors import InputError
from pipeline.tokens.same_tokenizer import PROBES
from workers.plan.source import Source, open_source
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

BLANK = "\u2581"
BYTES = [f"<0x{n:02X}>" for n in range(256)]
READABLE = [
    *WORDS,
    "The grain was carried over the river, and people do not count it; don't they?",
    "it's  two  blanks and\ta tab,\nand lines\r\n\r\nof  code(x_1) -> {'a': [1, 2]}",
    "Wörter über Körner, naïve café, e\u0301 a\u030a, İstanbul Straße ΣΊΣΥΦΟΣ",
    f"a literal {BLANK} and [UNK] and <unk> and <s>",
    "雨 日本語のテキスト 한국어 العَرَبِيَّة 😀👩‍👩‍👧",
    "ﬁne ½ ² ™ \uff21\uff22 \u00a0 \u200b \ufeff \x07 end",
]


def wrapped(backend: Tokenizer, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(READABLE * 3, trainer)
    return backend


def byte_level(normalizer: Any = None, add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    return trained(
        backend,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )


def word_piece(lowercase: bool = True) -> Tokenizer:
    """As BERT's: no case, no accents, blanks around punctuation, and a token for what is unknown."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    backend.train_from_iterator([text for text in READABLE if text.isascii()] * 3, trainer)
    return backend


def llama_2(normalizer: Any = None) -> Tokenizer:
    """Characters, words and 256 bytes, with a blank put before."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, BLANK, *sorted({c for text in READABLE[:20] for c in text} - {" "})]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizer or normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def unigram(byte_fallback: bool) -> Tokenizer:
    """As SentencePiece's, after NFKC and with runs of blanks as one."""
    specials = ["<unk>", *(BYTES if byte_fallback else [])]
    letters = sorted({c for text in READABLE[:24] for c in text} - {" "})
    pieces = [(piece, -20.0) for piece in specials] + [(piece, -3.0) for piece in [BLANK, *letters, BLANK + "the"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if byte_fallback else decoders.Metaspace()
    )
    return backend


def clip() -> Tokenizer:
    """Lower case, blanks thrown away, and a mark where a word ends."""
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    return trained(backend, trainer)


def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(backend, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))


def with_added_tokens() -> Tokenizer:
    backend = byte_level()
    backend.add_tokens([AddedToken("the grain", lstrip=True, rstrip=True), AddedToken("people", single_word=True)])
    backend.add_special_tokens(["<|im_start|>"])
    return backend


SOUND: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level after NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level after NFKC and lower case": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "byte-level with a blank put before": lambda: byte_level(add_prefix_space=True),
    "byte-level with added tokens": with_added_tokens,
    "WordPiece": word_piece,
    "WordPiece with case": lambda: word_piece(lowercase=False),
    "bytes where characters lack": llama_2,
    "bytes where characters lack, nothing put before": lambda: llama_2(normalizers.Replace(" ", BLANK)),
    "unigram": lambda: unigram(byte_fallback=False),
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "CLIP": clip,
    "words": words,
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_tokenizers_are_not_refused(kind: str) -> None:
    check_round_trip(wrapped(SOUND[kind]()), [*READABLE, *(text[:40] for text in READABLE)], kind)


@pytest.mark.parametrize("kind", [kind for kind in SOUND if kind.startswith(("byte", "unigram with"))])
def test_sound_tokenizers_take_any_text(kind: str) -> None:
    """Those that know every character by its bytes."""
    check_round_trip(wrapped(SOUND[kind]()), PROBES, kind)


def test_blanks_and_nothing() -> None:
    for kind in SOUND.values():
        check_round_trip(wrapped(kind()), ["", " ", "\n\n"], "here")
        check_round_trip(wrapped(kind()), [], "here")


def without_its_decoder() -> Tokenizer:
    backend = byte_level()
    return Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "decoder": None}))


def with_another_ones_decoder() -> Tokenizer:
    backend = byte_level()
    backend.decoder = decoders.Metaspace()
    return backend


def without_some_bytes() -> Tokenizer:
    """Trained on English, without the other bytes: it leaves out what it does not know, in silence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["the grain was carried over the river"] * 9, trainers.BpeTrainer(show_progress=False))
    return backend


def with_two_ids_exchanged() -> Tokenizer:
    """Encodes by one vocabulary; the decoder's byte tokens were replaced."""
    backend = llama_2()
    backend.decoder = decoders.Sequence([decoders.Replace("e", "a"), backend.decoder])
    return backend


def without_bytes_to_fall_back_on() -> Tokenizer:
    pieces = [BLANK, *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", BLANK)
    backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


BROKEN: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "no decoder": (without_its_decoder, r"it was given 'over the river', and what it encoded decodes to '.*Ġ"),
    "another one's decoder": (with_another_ones_decoder, r"it was given 'over the river', .* decodes to '.*Ġ"),
    "bytes are missing": (
        without_some_bytes,
        r"it was given '.*', and what it encoded decodes to '.*'; give",
    ),
    "ids mean others": (with_two_ids_exchanged, r"it was given 'over the river', .* decodes to 'ovar tha rivar'"),
    "nothing to fall back on": (without_bytes_to_fall_back_on, r"it was given 'Wörter', .* decodes to 'rter'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tokenizers_are_refused(kind: str) -> None:
    make, message = BROKEN[kind]
    texts = ["over the river", "Wörter", "the grain, 1984"]
    with pytest.raises(
        InputError, match="the tokenizer of here is broken, or made for another one's vocabulary: "
    ) as e:
        check_round_trip(wrapped(make()), texts, "here")
    assert e.match(message)
    assert "give model.tokenizer the one that the model was trained with" in str(e.value)


@pytest.mark.parametrize(("kind", "share"), [(word_piece, 100), (words, 100), (lambda: unigram(False), 80)])
def test_a_vocabulary_that_knows_little_of_the_corpus(kind: Callable[[], Tokenizer], share: int) -> None:
    texts = ["ფქვილი და მარცვალი", "ბეღელი სოფლის ბოლოს"] * 3
    with pytest.raises(InputError, match=r"does not know (\d+) % of the characters of the corpus \(its token") as e:
        check_round_trip(wrapped(kind()), texts, "here")
    found = e.value.args[0].split(" %")[0].split()[-1]
    assert int(found) >= share
    assert "for example in 'ფქვილი და მარცვალი'" in str(e.value)


def test_what_differs_in_a_long_text_is_shown() -> None:
    with pytest.raises(InputError) as e:
        check_round_trip(wrapped(without_some_bytes()), ["the grain was carried over " * 50 + "Körner"], "here")
    assert "körner" in str(e.value)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("make", "token"), [(byte_level, None), (word_piece, "[UNK]"), (llama_2, "<unk>"), (words, "[UNK]")]
)
def test_the_token_for_what_is_unknown(make: Callable[[], Tokenizer], token: str | None) -> None:
    assert unknown_token(wrapped(make())) == token


def test_a_unigrams_token_for_what_is_unknown() -> None:
    backend = unigram(byte_fallback=False)
    assert unknown_token(wrapped(backend)) == "<unk>"


def test_the_texts_that_are_tried() -> None:
    assert sample_texts([["a", b"b", None, 5, " ", "half \ud800 a pair"]], "text") == ["a", "b", "half  a pair"]
    assert sample_texts((["x"] for _ in range(10**9)), "text") == ["x"] * TEXTS
    chat = [{"role": "user", "content": "a"}, {"from": "human", "value": "b"}, {"content": [{"text": "c"}]}, 5]
    held = [json.dumps(chat[:1]), {"role": ["user"], "content": ["d"]}, "no JSON", "[" * 100_000]
    assert sample_texts([[chat, None, *held]], "messages") == ["a", "b", "c", "a", "d", "no JSON"]
    assert sample_texts(([None] for _ in range(10**9)), "messages") == []
    assert sample_texts([[" "] * RECORDS, ["late"]], "text") == []


@pytest.mark.parametrize("verb", ["harvest", "plan", "run"])
def test_nothing_is_planned_with_a_broken_tokenizer(lab: Lab, llama: Path, no_ray: None, verb: str) -> None:
    model = lab.folder / "model"
    shutil.copytree(llama, model)
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": None}))
    err = lab.refused(verb, lab.spec({"model.id": "model"}))
    assert f"the tokenizer of {model} is broken" in err


def test_token_ids_need_no_round_trip(lab: Lab, llama: Path) -> None:
    model = lab.folder / "model"
    shutil.copytree(llama, model)
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": None}))
    write_corpus(lab.folder / "ids.parquet", ["a"] * 4, ids=[[5, 6, 7]] * 4)
    changes = {"model.id": "model", "corpus.path": "ids.parquet", "corpus.tokens": "ids"}
    assert "rows" in lab.run("plan", lab.spec(changes))


def test_merges_of_another_vocabulary(lab: Lab, llama: Path, no_ray: None) -> None:
    model = lab.folder / "model"
    shutil.copytree(llama, model)
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [["q", "zz"], ["zz", "q"]]
    path.write_text(json.dumps(content))
    err = lab.refused("harvest", lab.spec({"model.id": "model"}))
    assert f"no tokenizer at {model}: it cannot be loaded (" in err


CHAT_TEMPLATE = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"


def _chats(form: str) -> list[dict[str, object]]:
    parts = {
        "parts": [{"type": "text", "text": "the grain"}],
        "a part": {"type": "text", "text": "the grain"},
        "texts": ["the grain"],
        "value": "the grain",
    }
    return [{"m": [{"role": "user", ("value" if form == "value" else "content"): parts[form]}]}] * 3


@pytest.mark.parametrize("form", ["parts", "a part", "texts", "value"])
def test_texts_within_messages_are_tried_in_every_form(tmp_path: Path, llama: Path, form: str) -> None:
    def no_grain(tokenizer: object) -> None:
        tokenizer.chat_template = CHAT_TEMPLATE  # type: ignore[attr-defined]
        tokenizer.backend_tokenizer.decoder = decoders.Replace("grain", "gravel")  # type: ignore[attr-defined]

    model = with_tokenizer(tmp_path / "model", llama, no_grain)
    with pytest.raises(InputError, match=r"the tokenizer of .* is broken.*'the grain'"):
        plan(write(tmp_path / "c.jsonl", _chats(form)), model, messages="m")


@pytest.mark.parametrize("at", [0, 150, 999, None])
def test_the_first_chats_are_read_once(
    tmp_path: Path, llama: Path, at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For their texts and for their tools, of which there is none before chat `at`."""
    model = with_tokenizer(tmp_path / "model", llama, lambda t: setattr(t, "chat_template", CHAT_TEMPLATE))
    chats = [{"m": [{"role": "user", "content": "the grain"}], "tools": [] if n == at else None} for n in range(1100)]
    if at is None:
        chats[RECORDS]["tools"] = []
    settings = CorpusSettings(path=(str(write(tmp_path / "c.jsonl", chats)),), messages="m", tools="tools")
    source = open_source(settings, ModelSettings(id=str(model)), VOCABULARY, "main")
    begun: list[int] = []
    read = Source._contents
    monkeypatch.setattr(Source, "_contents", lambda self: begun.append(1) or read(self))
    if at is None:
        with pytest.raises(InputError, match="none of the first 1,000 chats has 'tools'"):
            source.check_first_records()
    else:
        source.check_first_records()
    assert begun == [1]
