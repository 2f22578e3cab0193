"""Chats: rendered with the tokenizer's chat template, and which of the rendered tokens belong to which role.

A message's tokens have its role, its markers included unless `markers` is false; what the template adds by itself has
the role `template` (`pipeline.corpus.chats.roles`). Control strings are tokens where the template wrote them, and text
where a message has them (`pipeline.corpus.control_strings`), with `specials` "text". A chat whose roles cannot be
told has the role `unclear`, or is counted and left out where roles are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pipeline.corpus.chats.messages import Chat, Message, check_role_names, read_chat, texts_in
from pipeline.corpus.chats.roles import UNCLEAR_ROLE, Int32, Letters, letters, rendered
from pipeline.corpus.chats.templates import DATE_TEXT, ChatTemplate, asks_for_the_day, check_template
from pipeline.corpus.control_strings import ControlStrings, Int64
from pipeline.corpus.encode import NOT_AS_TEXT, UNDECODABLE, Encoded, is_unicode
from pipeline.corpus.skipped import with_words
from pipeline.errors import InputError

UNCLEAR = "the chat template does not show where each message ends"
CONTROL_ROLE = "a role that holds a control string"
REFUSED = "the chat template refuses the chat"


@dataclass(frozen=True)
class ChatEncoder:
    """Renders and encodes chats: each a list of {role, content}, JSON of one, or `WithTools`."""

    tokenizer: Any
    bos: int | None
    specials: Literal["text", "tokens"] = "text"
    """What control strings in messages are."""
    markers: bool = True
    """True if a template's markers have the role of their message."""
    day: str | None = None
    """YYYY-MM-DD: the day for templates that ask for it; today, if not given."""
    names_day: bool = False
    """True if `date_string` is that day, as where a person has given it. Otherwise some templates name one of their
    own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Given to the template beside messages and tools."""
    roles_asked: bool = False
    """True if chats whose roles cannot be told are left out."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "corpus.messages: the tokenizer has no chat template, so there is no telling how it writes a chat; "
                "give model.tokenizer one that has, or give texts instead (corpus.text)"
            )
        if problem := check_template(template_source(self.tokenizer)):
            raise InputError(f"corpus.messages: the tokenizer's chat template is no template: {problem}")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # not what it has compiled

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        chats: dict[int, _Rendered] = {}
        for number, content in enumerate(contents):
            found = self._render(content)
            if isinstance(found, str):
                bad[number] = found
            else:
                chats[number] = found
        tokens: list[Any] = [np.empty(0, np.int32)] * len(contents)
        messages: list[Any] = [np.empty(0, np.int32)] * len(contents)
        for (number, chat), (ids, starts, stops) in zip(
            chats.items(), self._encoded(list(chats.values())), strict=True
        ):
            if self.specials == "text" and self._holds_control(chat, ids, starts, stops):
                bad[number] = NOT_AS_TEXT
                continue
            of_token = chat.letters.role_numbers(self._ranks(chat.letters.ranks, ids, starts, stops))
            first = int(len(ids) > 0 and ids[0] == self.bos)  # contexts get theirs: it is not doubled
            tokens[number], messages[number] = ids[first:].astype(np.int32), of_token[first:]
        used = {n: [chat.letters.roles[i] for i in np.unique(messages[n]).tolist()] for n, chat in chats.items()}
        names = sorted({role for roles in used.values() for role in roles})
        check_role_names(names)
        code = {role: i for i, role in enumerate(names)}
        roles: list[Any] = [np.empty(0, np.int8)] * len(contents)
        for number, chat in chats.items():
            roles[number] = np.array([code.get(role, -1) for role in chat.letters.roles], np.int8)[messages[number]]
        return Encoded.of(tokens, bad, roles, names)

    def _render(self, content: Any) -> "_Rendered | str":
        """The text of a chat and whose each letter is, or why it has none."""
        chat = read_chat(content)
        if isinstance(chat, str):
            return chat
        template = self._template(chat.tools)
        taken = rendered(template, chat)
        if isinstance(taken, str):
            return with_words(REFUSED, taken)
        chat, text = taken
        if not all(map(is_unicode, [text, *(message["role"] for message in chat.messages)])):
            return UNDECODABLE
        if self.specials == "text" and self._control.is_in([message["role"] for message in chat.messages]):
            return CONTROL_ROLE
        ends = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        told = letters(template, chat, text, self.markers, ends, self._control.texts)
        if told is None and self.roles_asked:
            return UNCLEAR
        if self.specials == "text" and (told is None or told.is_content is None) and self._has_control_strings(chat):
            return UNCLEAR  # there is no telling a message's from the template's
        return _Rendered(text, Letters([UNCLEAR_ROLE], np.zeros(len(text), np.int32), None) if told is None else told)

    def _encoded(self, chats: "list[_Rendered]") -> list[tuple[Int64, Int64, Int64]]:
        """Return the tokens of each chat, and where in its text each begins and ends."""
        found = []
        for encoding in self.tokenizer.backend_tokenizer.encode_batch(
            [c.text for c in chats], add_special_tokens=False
        ):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            found.append((np.array(encoding.ids, np.int64), offsets[:, 0], offsets[:, 1]))
        if self.specials == "text":
            again = [number for number, chat in enumerate(chats) if self._holds_control(chat, *found[number])]
            if again:
                own = [chats[number].letters.is_content for number in again]
                others = self._control.encode(
                    [chats[number].text for number in again], [o for o in own if o is not None]
                )
                for number, other in zip(again, others, strict=True):
                    found[number] = other
        return found

    def _holds_control(self, chat: "_Rendered", ids: Int64, starts: Int64, stops: Int64) -> bool:
        """Return whether a token that is a control string has some of a message's text."""
        if chat.letters.is_content is None:
            return False
        at = np.flatnonzero(np.isin(ids, self._control.ids))
        before = np.concatenate([[0], np.cumsum(chat.letters.is_content)])
        return bool((before[stops[at]] > before[starts[at]]).any())

    def _ranks(self, ranks: Int32, ids: Int64, starts: Int64, stops: Int64) -> Int32:
        """Return the strongest rank of each token's letters; for a control string, which may have taken space from a
        content beside it, the weakest."""
        edges = np.stack([starts, np.maximum(stops, starts + 1)], axis=1).ravel()
        padded = np.append(ranks, ranks.dtype.type(0))
        strongest = np.maximum.reduceat(padded, edges)[::2] if len(ids) else ranks[:0]
        weakest = np.minimum.reduceat(padded, edges)[::2] if len(ids) else ranks[:0]
        return np.where(np.isin(ids, self._control.ids), weakest, strongest)

    def _has_control_strings(self, chat: Chat) -> bool:
        return self._control.is_in(list(texts_in([chat.messages, chat.tools])))

    @cached_property
    def _control(self) -> ControlStrings:
        return ControlStrings(self.tokenizer.backend_tokenizer)

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {}

    def _template(self, tools: list[Message] | None) -> ChatTemplate:
        source = template_source(self.tokenizer, tools)
        if source not in self._templates:
            day = date.today() if self.day is None else date.fromisoformat(self.day)
            named = {DATE_TEXT: day.strftime("%d %b %Y")} if self.names_day else {}
            variables = {**self.tokenizer.special_tokens_map, **named, **self.arguments}
            self._templates[source] = ChatTemplate(source, tuple(variables.items()), day)
        return self._templates[source]


@dataclass(frozen=True)
class _Rendered:
    text: str
    letters: Letters


def template_source(tokenizer: Any, tools: list[Message] | None = None) -> str:
    """The template of a tokenizer, which may have several. Raises InputError if none of them is for all chats."""
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise InputError(
            f"corpus.messages: the tokenizer does not say which of its chat templates to take: {error}"
        ) from None


def needs_day(tokenizer: Any, arguments: Mapping[str, Any], day_is_given: bool) -> bool:
    """Whether chats that are rendered with this tokenizer depend on the day."""
    return any(asks_for_the_day(source, arguments, day_is_given) for source in template_sources(tokenizer))


def template_sources(tokenizer: Any) -> list[str]:
    """All templates of a tokenizer, but those that are none."""
    of_all = tokenizer.chat_template
    sources = list(of_all.values()) if isinstance(of_all, dict) else [of_all]
    return [source for source in sources if check_template(source) is None]
