"""A comparison of two tokenizers: do they give the same ids, however they are written down?

A newer library, or saving it again, writes the same tokenizer otherwise. What counts is what it does: the vocabulary,
the added tokens with their flags, and the ids of texts: of many scripts and blanks, of pieces of the vocabulary put
together at random, and of the caller's own.
"""

import random
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

PROBES = (
    "The quick brown fox can't jump over 13 lazy dogs; they'll do 1,234,567.89 of it (in 2024)!",
    "  two leading blanks,\ttabs,\n\nempty lines   \r\nand\rreturns \u00a0 \u3000 \u200b\u200d\ufeff trailing   ",
    "def f(x_1, *args):\n    return {'a': [x for x in args if x != 0]}  # comment\n\n\n\n",
    "naïve café Ångström Straße İstanbul ΣΊΣΥΦΟΣ ЁЖИК ﬁne ½ ² ™ \uff21\uff22 ｶﾞ",
    "e\u0301 a\u030a \u1112\u1161\u11ab 한국어 日本語のテキスト、中文文本。 ภาษาไทย हिन्दी العَرَبِيَّة עִבְרִית",
    "😀👩‍👩‍👧🇩🇪 \U0001f9d1\U0001f3fd‍💻 \u0000\u0007\u001b \ud7ff\ue000\ufffd \U0010ffff",
    "<s></s><unk><pad><|endoftext|>[CLS] [MASK] <mask> <|im_start|>user\n<bos> ▁ ## Ġ Ċ",
    "https://example.org/a-b_c?d=%20&e=f#g user@example.org $5 #tag @name …—“quoted” \u2018single\u2019 --- === ***",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 00000000000000000000 ................ ________________",
)
PIECED_TEXTS = 512
PIECES = 12
"""Texts that are made of pieces of the vocabulary, and pieces of each: they try merges that few real texts need."""


def are_same(one: Any, other: Any, texts: Sequence[str] = ()) -> bool:
    """Return whether two `tokenizers.Tokenizer` do the same, as far as their vocabularies and the ids of texts tell."""
    vocabulary = one.get_vocab(with_added_tokens=True)
    if vocabulary != other.get_vocab(with_added_tokens=True) or _added(one) != _added(other):
        return False
    tried = [*PROBES, *_pieced(one, sorted(vocabulary)), *texts]
    return all(a == b for a, b in zip(_ids(one, tried), _ids(other, tried), strict=True))


def read_backend(serialised: str) -> Any:
    """A tokenizer.json as a tokenizer that neither cuts nor pads."""
    backend = Tokenizer.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added(backend: Any) -> dict[int, tuple[Any, ...]]:
    return {
        number: (token.content, token.special, token.single_word, token.lstrip, token.rstrip, token.normalized)
        for number, token in backend.get_added_tokens_decoder().items()
    }


def _ids(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _pieced(backend: Any, pieces: Sequence[str]) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(PIECED_TEXTS if pieces else 0):
        ids = [backend.token_to_id(rng.choice(pieces)) for _ in range(PIECES)]
        texts.append(backend.decode(ids, skip_special_tokens=False))
    return texts
