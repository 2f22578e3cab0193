"""Chats: rendered with the tokenizer's chat template, and which of the rendered tokens belong to which role.

A token's role is that of the message whose rendering put it there: the rendering of the first n messages must begin the
rendering of the first n + 1. Its markers count with a message. Where a template rewrites earlier messages, its
`{% generation %}` markers, if it has them, tell the assistant's tokens from the others (role `template`). Chats where
neither works are counted and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from pipeline.corpora.contents import UNDECODABLE, Encoded, is_unicode
from pipeline.errors import InputError

NO_ROLE = "a message without a role"
NO_MESSAGES = "empty"
UNCLEAR = "the chat template does not show where each message ends"
REFUSED = "the chat template refuses the chat"
TEMPLATE = "template"


@dataclass(frozen=True)
class ChatEncoder:
    """Renders and encodes chats, lists of {role, content}."""

    tokenizer: Any
    bos: int | None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "corpus.messages: the tokenizer has no chat template, so there is no telling how it writes a chat; "
                "give model.tokenizer one that has, or give texts instead (corpus.text)"
            )

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        kept: list[int] = []
        texts: list[str] = []
        spans: list[list[tuple[int, str]]] = []
        for number, messages in enumerate(contents):
            problem, text, parts = self._render(messages)
            if problem:
                bad[number] = problem
            else:
                kept.append(number)
                texts.append(text)
                spans.append(parts)
        names: list[str] = sorted({role for parts in spans for _, role in parts})
        code = {role: i for i, role in enumerate(names)}
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens: list[Any] = [np.empty(0, np.int32)] * len(contents)
        roles: list[Any] = [np.empty(0, np.int8)] * len(contents)
        for number, encoding, parts in zip(kept, encodings, spans, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            message = np.searchsorted([stop for stop, _ in parts], starts, side="right").clip(max=len(parts) - 1)
            of_token = np.array([code[role] for _, role in parts], dtype=np.int8)[message]
            first = int(len(ids) > 0 and ids[0] == self.bos)  # contexts get theirs: it is not doubled
            tokens[number], roles[number] = ids[first:], of_token[first:]
        return Encoded.of(tokens, bad, roles, names)

    def _render(self, messages: Any) -> tuple[str | None, str, list[tuple[int, str]]]:
        """A problem, or the text of a chat and where in it each part ends, with the part's role."""
        if not isinstance(messages, list) or not messages:
            return NO_MESSAGES, "", []
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and m["role"] for m in messages):
            return NO_ROLE, "", []
        # Arrow gives every message every key that any of them has; templates ask whether a key is there.
        messages = [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]
        whole = self._text(messages)
        if whole is None:
            return REFUSED, "", []
        if not all(map(is_unicode, [whole, *(message["role"] for message in messages)])):
            return UNDECODABLE, "", []
        parts: list[tuple[int, str]] = []
        before = ""
        for count, message in enumerate(messages, 1):
            text = whole if count == len(messages) else self._text(messages[:count])
            if text is None:  # a system message alone, say: its text goes with the next message
                continue
            if not (text.startswith(before) and whole.startswith(text)):
                return self._by_markers(messages, whole)
            parts.append((len(text), message["role"]))
            before = text
        return None, whole, parts

    def _by_markers(self, messages: list[Any], whole: str) -> tuple[str | None, str, list[tuple[int, str]]]:
        if "{% generation %}" not in self.tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
            return UNCLEAR, "", []
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        encoding = self.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False)
        if encoding.ids != list(rendered["input_ids"]):
            return UNCLEAR, "", []
        roles = ["assistant" if is_assistant else TEMPLATE for is_assistant in rendered["assistant_masks"]]
        return None, whole, [(stop, role) for (_, stop), role in zip(encoding.offsets, roles, strict=True)]

    def _text(self, messages: list[Any]) -> str | None:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (jinja2.TemplateError, TypeError, KeyError):  # templates refuse with raise_exception
            return None
