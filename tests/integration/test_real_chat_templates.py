"""Chat templates that people use, as the `trl` wheel ships them: every chat is harvested, and the assistant's tokens
are those that transformers finds by the marks of a template's training variant.

The wheel is fetched from PyPI into the temporary folder; nothing of it is in this repository.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.corpus.chats.encode import ChatEncoder, needs_day
from pipeline.corpus.chats.messages import WithTools
from pipeline.corpus.chats.roles import UNCLEAR_ROLE

pytestmark = pytest.mark.slow

WHEEL = "trl==1.16.0"
CONTROL = r"<[|\uff5c][^<>{}'\"\s]*?[|\uff5c]>|<\|?[a-z_]+\|?>|</?s>|\[/?[A-Z_]+\]"

USER = {"role": "user", "content": "How much grain is there?"}
ANSWER = {"role": "assistant", "content": "Three sacks, and a half."}
MORE = [{"role": "user", "content": "And of rye?\n\nIn pounds."}, {"role": "assistant", "content": "42"}]
SYSTEM = {"role": "system", "content": "Answer briefly: a number."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abc123def", "type": "function", "function": {"name": "weigh", "arguments": {"sack": "rye"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "weigh", "content": "42 pounds"}
WEIGH = {
    "name": "weigh",
    "description": "Weigh a sack.",
    "parameters": {
        "type": "object",
        "properties": {"sack": {"type": "string", "description": "Which sack"}},
        "required": ["sack"],
    },
}
TOOLS = [{"type": "function", "function": WEIGH}]
THOUGHT = {"role": "assistant", "content": "<think>\nI count them.\n</think>\n\nThree sacks."}
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "single": ([USER, ANSWER], None),
    "many": ([USER, ANSWER, *MORE], None),
    "system": ([SYSTEM, USER, ANSWER], None),
    "system, many": ([SYSTEM, USER, ANSWER, *MORE], None),
    "tools": ([USER, ANSWER, *MORE], TOOLS),
    "tools called": ([SYSTEM, USER, CALL, RESULT, ANSWER, *MORE], TOOLS),
    "thoughts": ([USER, THOUGHT, MORE[0], THOUGHT], None),
}
TAKEN = {"single", "many", "thoughts"}
"""Chats that every template takes."""


@cache
def templates() -> dict[str, str]:
    """The text of each template of the wheel, by name; empty if it cannot be had."""
    folder = Path(tempfile.gettempdir()) / f"granary-{WHEEL.replace('==', '-')}"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode:
            return {}
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.endswith(".jinja")]
        return {Path(name).stem: files.read(name).decode() for name in names}


@cache
def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with merges, also of line ends, and the template's control strings as special tokens."""
    source = templates()[name]
    control = sorted({"<s>", "</s>", *re.findall(CONTROL, source)} - {"<think>", "</think>"})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([source, "\n\n\n " * 20], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.chat_template = source
    return tokenizer


def encoded(name: str, chat: str, **settings: Any) -> tuple[Any, list[str]] | None:
    """The tokens of a chat and the role of each; None if the template refuses it."""
    messages, tools = CHATS[chat]
    found = ChatEncoder(tokenizer_of(name), None, **settings).encode([WithTools(messages, tools)])
    if found.bad:
        assert [reason.partition("\n")[0] for reason in found.bad.values()] == ["the chat template refuses the chat"]
        return None
    assert found.roles is not None
    return found.tokens, [found.role_names[role] for role in found.roles]


def by_transformers(name: str, chat: str) -> tuple[list[int], Any] | None:
    """The same by transformers: tokens, and which are the assistant's by the template's marks."""
    messages, tools = CHATS[chat]
    try:
        found = tokenizer_of(name).apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception:  # noqa: BLE001 (whatever a template raises)
        return None
    return list(found["input_ids"]), np.array(found["assistant_masks"], bool)


def test_every_chat_is_harvested_or_refused_by_its_template() -> None:
    if not templates():
        pytest.skip(f"PyPI cannot be reached for {WHEEL}")
    assert len(templates()) > 60
    refused = []
    for name in templates():
        for chat in CHATS:
            ours, theirs = encoded(name, chat), by_transformers(name, chat)
            if ours is None:
                assert theirs is None, (name, chat)
                refused.append((name, chat))
                continue
            tokens, roles = ours
            assert UNCLEAR_ROLE not in roles, (name, chat)
            text = tokenizer_of(name).decode(tokens)
            answer = "42" if "many" in chat or "tools" in chat else "Three sacks"
            by_role = "".join(
                tokenizer_of(name).decode([t]) for t, role in zip(tokens, roles, strict=True) if role == "assistant"
            )
            assert answer in text, (name, chat)
            assert answer in by_role, (name, chat)
            takes_texts = "selectattr" not in templates()[name] and "for line in" not in templates()[name]
            if theirs is not None and takes_texts and not needs_day(tokenizer_of(name), {}, False):
                assert tokens.tolist() == theirs[0], (name, chat)
    assert not [(name, chat) for name, chat in refused if chat in TAKEN]
    assert len(refused) < 25


def test_a_marked_template_s_assistant_is_the_oracle_s() -> None:
    if not templates():
        pytest.skip(f"PyPI cannot be reached for {WHEEL}")
    compared = 0
    for name, source in templates().items():
        if not re.search(r"{%-?\s*generation", source):
            continue
        for chat in CHATS:
            ours, theirs = encoded(name, chat), by_transformers(name, chat)
            if ours is None or theirs is None or ours[0].tolist() != theirs[0]:
                continue
            compared += 1
            assert [role == "assistant" for role in ours[1]] == theirs[1].tolist(), (name, chat)
    assert compared > 150


def test_an_unmarked_template_s_assistant_agrees_with_its_twin() -> None:
    """Where both write the same: with markers it is the oracle's tokens and the header before them, which the oracle
    leaves to the template, and without markers it is some of the oracle's."""
    if not templates():
        pytest.skip(f"PyPI cannot be reached for {WHEEL}")
    compared = 0
    for name, source in templates().items():
        twin = f"{name}_training"
        if twin not in templates() or re.search(r"{%-?\s*generation", source):
            continue
        for chat in CHATS:
            theirs = by_transformers(twin, chat)
            plain = encoded(name, chat)
            if theirs is None or plain is None:
                continue
            text = tokenizer_of(name).decode(plain[0])
            if text != tokenizer_of(twin).decode(theirs[0]):
                continue
            compared += 1
            oracle = letters_of(twin, theirs[0], theirs[1])
            whole = letters_of(name, plain[0], [role == "assistant" for role in plain[1]])
            bare_tokens = encoded(name, chat, markers=False)
            assert bare_tokens is not None
            bare = letters_of(name, bare_tokens[0], [role == "assistant" for role in bare_tokens[1]])
            assert (whole | ~oracle).all(), (name, chat, text)
            if chat == "tools called":  # some templates write a tool's answer, with the call's name, into the call
                continue
            assert (oracle | ~bare).all(), (name, chat, text)
            extra = whole & ~oracle
            ends = np.flatnonzero(extra[:-1] & ~extra[1:]) + 1
            assert oracle[ends].all(), (name, chat, text)  # a header, and then what the oracle has
    assert compared > 60


def test_messages_cannot_write_a_template_s_control_strings() -> None:
    if not templates():
        pytest.skip(f"PyPI cannot be reached for {WHEEL}")
    for name in templates():
        tokenizer = tokenizer_of(name)
        control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        encoder = ChatEncoder(tokenizer, None)
        found = []
        for inserted in (" ".join(control.values()), "grain"):
            chat = [{**message, "content": f"{message['content']} {inserted}"} for message in [USER, ANSWER, *MORE]]
            tokens = encoder.encode([chat])
            assert not tokens.bad, (name, tokens.bad)
            found.append([token for token in tokens.tokens.tolist() if token in control])
        assert found[0] == found[1], name


def letters_of(name: str, tokens: Any, chosen: Any) -> Any:
    """Return for each byte of a text whether it is of a chosen token, so that tokens of two tokenizers compare."""
    tokenizer = tokenizer_of(name)
    lengths = [len(tokenizer.decode([token]).encode()) for token in tokens]
    return np.repeat(np.asarray(chosen, bool), lengths)
