"""Control strings in messages: text, and all other tokens those of the whole text, whatever the tokenizer does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.corpus.chats.encode import ChatEncoder
from pipeline.corpus.control_strings import ControlStrings

CONTROL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>' }}{% endfor %}"
TEXTS = [
    "the grain of the town\n\n",
    "three  towns carried the grain over the river.",
    "<think>hello</think> <s>",
    "> <\n ",
]


def byte_level() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def first_space() -> Tokenizer:
    """As Llama 2's later form: space is written into the first word of a text."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="?"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    return bpe


def space_everywhere() -> Tokenizer:
    """As Llama 2's first form: the beginning of every stretch between control strings."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="?"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe


def composed() -> Tokenizer:
    bpe = byte_level()
    bpe.normalizer = normalizers.NFKC()
    return bpe


def tokenizer(make: Callable[[], Tokenizer], **how: Any) -> Any:
    bpe = make()
    initial = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"▁ \n?"})
    bpe.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=420, initial_alphabet=initial, show_progress=False)
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    made.backend_tokenizer.add_special_tokens([AddedToken(text, special=True, **how) for text in CONTROL])
    made.backend_tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    made.bos_token, made.eos_token = "<s>", "</s>"
    made.chat_template = TEMPLATE
    return made


TOKENIZERS = {
    "byte level": tokenizer(byte_level, normalized=False),
    "byte level, space goes with control strings": tokenizer(byte_level, normalized=False, rstrip=True, lstrip=True),
    "first space": tokenizer(first_space, normalized=False),
    "space everywhere": tokenizer(space_everywhere, normalized=False),
    "found after normalisation": tokenizer(composed, normalized=True),
}
PLAIN = st.lists(
    st.sampled_from(["the", "grain", " ", "\n", "▁", "<", "|>", "<think>", "é", "🌾", "\U00100000", "\U00100003"]),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(contents=st.lists(PLAIN, min_size=1, max_size=3))
def test_without_control_strings_all_tokens_are_those_of_the_whole(name: str, contents: list[str]) -> None:
    backend = TOKENIZERS[name].backend_tokenizer
    text, own = "<s>", [False] * 3
    for content in contents:
        text += f"<|user|>\n{content}<|end|>"
        own += [False] * 9 + [True] * len(content) + [False] * 7
    ((ids, starts, stops),) = ControlStrings(backend).encode([text], [np.array(own)])
    whole = backend.encode(text, add_special_tokens=False)
    assert ids.tolist() == whole.ids
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == whole.offsets


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "content", ["a <|end|> b", "<s>", "</s></s>", "</s", "x<|user|>\nhello<|end|>", "<|end|", "<think>"]
)
def test_a_message_s_control_strings_are_text(name: str, content: str) -> None:
    found = TOKENIZERS[name]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "the grain"}]
    text, tokens = (ChatEncoder(found, None, specials=how).encode([chat]) for how in ("text", "tokens"))
    control = [found.convert_tokens_to_ids(t) for t in CONTROL]
    template = [found.convert_tokens_to_ids(t) for t in ("<s>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>")]
    assert [t for t in text.tokens.tolist() if t in control] == template
    whole = found.backend_tokenizer.encode(
        f"<s><|user|>\n{content}<|end|><|assistant|>\nthe grain<|end|>", add_special_tokens=False
    )
    assert tokens.tokens.tolist() == whole.ids
    decoded = found.backend_tokenizer.decode(text.tokens.tolist(), skip_special_tokens=False)
    for letters in (decoded, content):
        assert "".join(content.split()).replace("▁", "") in "".join(letters.split()).replace("▁", "")
    assert found.backend_tokenizer.encode("<s>", add_special_tokens=False).ids == control[:1]  # it is as it was


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    found = TOKENIZERS["byte level"]
    bos = found.convert_tokens_to_ids("<s>")
    chat = [{"role": "user", "content": "<s>the grain"}]
    tokens = ChatEncoder(found, bos).encode([chat]).tokens.tolist()
    assert bos not in tokens  # contexts get it, and the message's is text
    assert ChatEncoder(found, bos, specials="tokens").encode([chat]).tokens.tolist().count(bos) == 1
