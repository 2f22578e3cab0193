"""Which role each letter of a rendered chat has.

The text of a message is its own, wherever the template puts it (`pipeline.corpus.chats.colours`). What a template
writes around it, its *markers*, counts with a message too: all that an iteration over the messages writes, and outside
of iterations what one piece of the template writes together with the text of a message. The rest is what the template
adds by itself, role `template`: BOS, a default system message, descriptions of tools, the end. Where a template says by
`{% generation %}` what the assistant wrote, that and nothing else is the assistant's.

Nothing here compares renderings of shorter chats, as templates write a message otherwise when others follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.corpus.chats.colours import NOBODY, Coloured, coloured
from pipeline.corpus.chats.environment import Refusal
from pipeline.corpus.chats.messages import Chat, joined_parts, split_parts, variants
from pipeline.corpus.chats.templates import REFUSALS, ChatTemplate

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

TEMPLATE = "template"
UNCLEAR_ROLE = "unclear"
"""The role of all tokens of a chat whose roles cannot be told."""
LOOKED_AT = 16
"""Messages of a chat by which is seen whether a template takes its form: each is sought in the whole text."""
NOTHING, MARKER, CONTENT, GENERATED = range(4)
"""How a letter belongs to a message, from the weakest on. A token of letters of several kinds has the strongest, so
that a content has every token that holds some of it."""


@dataclass(frozen=True)
class Letters:
    """What of a chat's text belongs to which message."""

    roles: list[str]
    """The roles of the messages, and last the template's."""
    ranks: Int32
    """A rank for each letter. The larger, the stronger it belongs (see above), then the earlier its message."""
    is_content: Bool | None
    """Which letters are the messages' or tools' own text; None where that cannot be told."""

    def role_numbers(self, ranks: Int32) -> Int32:
        """From ranks to indices of `roles`."""
        last = len(self.roles) - 1
        numbers: Int32 = last - ranks % (last + 1)
        return numbers


def rendered(template: ChatTemplate, chat: Chat) -> tuple[Chat, str] | str:
    """A chat in the first form that its template takes, and its text; if the template refuses it in any, why.

    Some templates take contents as texts, some as lists of parts, and some that know one form only write nothing of the
    other: a chat is given in the other form if more of its texts are written then.
    """
    refusals: list[Exception] = []
    taken = _first(template, chat, refusals)
    texts = [text.strip() for message in chat.messages[:LOOKED_AT] for text in _texts(message.get("content"))]
    best = _written(taken, texts)
    for form in (joined_parts(chat), split_parts(chat)):
        if best == len(texts) or form.messages == chat.messages:
            continue
        other = _first(template, form, refusals)
        if (written := _written(other, texts)) > best:
            taken, best = other, written
    return taken if taken is not None and best >= 0 else _why_refused(refusals)


def _why_refused(refusals: Sequence[Exception]) -> str:
    """The words of a template that refuses a chat in each of its forms; without any, what fails in it."""
    for error in refusals:
        if isinstance(error, Refusal):
            return str(error)
    return f"{type(refusals[0]).__name__}: {refusals[0]}" if refusals else "it writes a list of parts as Python does"


def _written(taken: tuple[Chat, str] | None, texts: Sequence[str]) -> int:
    """How many of the texts a template has written; -1 if it refuses them, or has written Python's form of a list."""
    return -1 if taken is None or _is_written_out(*taken) else sum(text in taken[1] for text in texts)


def _first(template: ChatTemplate, chat: Chat, refusals: list[Exception]) -> tuple[Chat, str] | None:
    """The first way to write a chat that the template takes; what it raises for others is put to `refusals`."""
    for form in variants(chat):
        try:
            return form, template.render(form)
        except REFUSALS as error:
            refusals.append(error)
    return None


def _texts(content: object) -> list[str]:
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def _is_written_out(chat: Chat, text: str) -> bool:
    """Return whether a template that knows no parts has written a list of them as Python writes one."""
    lists = [m["content"] for m in chat.messages[:LOOKED_AT] if isinstance(m.get("content"), list)]
    return any(str(part) in text for parts in lists for part in parts)


def letters(
    template: ChatTemplate, chat: Chat, text: str, markers: bool, ends: tuple[str, str], control: Sequence[str]
) -> Letters | None:
    """Tell the letters of a rendered chat apart; None where that cannot be done. `markers`: whether those count with
    their messages. `ends`: BOS and EOS, empty where there is none. `control`: the tokenizer's control strings."""
    found = coloured(template, chat, text, control)
    if found is None or not (found.is_located or markers):
        return None
    count = len(chat.messages)
    roles = [message["role"] for message in chat.messages]
    stretches = _Stretches.of(found)
    if not found.is_located and not (stretches.iteration >= 0).any():
        return None
    message, kind = _belonging(template, found, stretches, roles)
    bos, eos = ends
    if bos and text.startswith(bos) and (found.owner[: len(bos)] == NOBODY).all():
        message[: len(bos)], kind[: len(bos)] = count, NOTHING
    written = np.flatnonzero(kind != NOTHING)
    if eos and len(written) and text[written[-1] + 1 :].strip() == eos:  # it ends the last message, whoever writes it
        message[written[-1] + 1 :], kind[written[-1] + 1 :] = message[written[-1]], MARKER
    if not markers:
        kind[kind == MARKER] = NOTHING
    if stretches.generated is not None:
        _by_generation(message, kind, stretches, roles, markers)
    message[kind == NOTHING] = count
    is_content = found.owner != NOBODY if found.is_located else None
    return Letters([*roles, TEMPLATE], kind * (count + 1) + (count - message), is_content)


@dataclass(frozen=True)
class _Stretches:
    """What was being written, letter by letter."""

    iteration: Int32
    """The message of the iteration; NOBODY outside of iterations."""
    generated: Bool | None
    """True for a letter within `{% generation %}`; None if the template has none."""
    pieces: list[tuple[int, int]]
    """Where pieces of the template outside of iterations begin and end."""

    @classmethod
    def of(cls, found: Coloured) -> "_Stretches":
        iteration = np.full(len(found.text), NOBODY, np.int32)
        generated = np.zeros(len(found.text), np.bool_)
        pieces: list[tuple[int, int]] = []
        active: list[tuple[int, int]] = []  # loop and message, from the outside in
        generating = depth = before = start = 0
        for event, place in zip(found.events, found.places.tolist(), strict=True):
            if active:
                iteration[before:place] = active[-1][1]
            generated[before:place] = generating > 0
            before = place
            if event.kind == "message":
                while any(loop == event.loop for loop, _ in active):
                    active.pop()
                active.append((event.loop, event.message))
            elif event.kind == "leave":
                while any(loop == event.loop for loop, _ in active):
                    active.pop()
            elif event.kind == "open":
                start = start if depth else place
                depth += 1
            elif event.kind == "close":
                depth = max(0, depth - 1)
                if not depth:
                    pieces.append((start, place))
            else:
                generating += 1 if event.kind == "generate" else -1
        return cls(iteration, generated if any(e.kind == "generate" for e in found.events) else None, pieces)


def _belonging(
    template: ChatTemplate, found: Coloured, stretches: _Stretches, roles: Sequence[str]
) -> tuple[Int32, Int32]:
    """Return for each letter the message that it belongs to, and how."""
    count = len(roles)
    message, kind = stretches.iteration.copy(), np.where(stretches.iteration >= 0, MARKER, NOTHING).astype(np.int32)
    for start, stop in stretches.pieces:
        outside = start + np.flatnonzero(stretches.iteration[start:stop] == NOBODY)
        own = outside[found.owner[outside] >= 0]
        if len(own):  # what stands before a text goes with it, and what follows the last with that; unless it is tools
            after = np.searchsorted(own, outside)
            owners = found.owner[own]
            message[outside] = owners[after.clip(max=len(own) - 1)]
            of_tools = (message[outside] == count) | (owners[(after - 1).clip(min=0)] == count) & (after > 0)
            kind[outside] = np.where(of_tools, NOTHING, MARKER)
    for start, stop in _added_openings(template, found, stretches, roles):
        message[start:stop], kind[start:stop] = count, NOTHING
    own_text = found.owner >= 0
    message[own_text] = found.owner[own_text]
    kind[own_text] = np.where(message[own_text] < count, CONTENT, NOTHING)
    message[message == NOBODY] = count
    return message, kind


def _by_generation(message: Int32, kind: Int32, stretches: _Stretches, roles: Sequence[str], markers: bool) -> None:
    """Give the assistant what the template says that it wrote, and nothing else."""
    assert stretches.generated is not None
    writers = {number for number in np.unique(stretches.iteration[stretches.generated]).tolist() if number >= 0}
    names = {"assistant", *(roles[number] for number in writers)}
    theirs = np.array([role in names for role in [*roles, TEMPLATE]])
    kind[theirs[message] & ~stretches.generated] = NOTHING
    last = max((number for number, role in enumerate(roles) if role in names), default=None)
    if markers and last is not None:
        written = stretches.generated
        message[written] = np.where(stretches.iteration[written] >= 0, stretches.iteration[written], last)
        kind[written] = GENERATED


def _added_openings(
    template: ChatTemplate, found: Coloured, stretches: _Stretches, roles: Sequence[str]
) -> list[tuple[int, int]]:
    """Stretches that a template adds within an iteration, before the markers of its message: a default system message
    or BOS before the first, or tools before one. Told by how a message of this role begins elsewhere."""
    edges = np.flatnonzero(np.diff(stretches.iteration, prepend=NOBODY, append=NOBODY)).tolist()
    openings = [(edge, stop) for edge, stop in pairwise(edges) if stretches.iteration[edge] >= 0]
    added = []
    for number, (start, stop) in enumerate(openings):
        opening = _opening(found, start, stop, len(roles))
        if number and not (found.owner[start : start + len(opening)] == len(roles)).any():
            continue
        usual = _usual_opening(template, roles[stretches.iteration[start]])
        if usual and usual.strip() and opening != usual and opening.endswith(usual):
            added.append((start, start + len(opening) - len(usual)))
    return added


def _opening(found: Coloured, start: int, stop: int, count: int) -> str:
    """What an iteration writes before the first text of a message."""
    own = np.flatnonzero((found.owner[start:stop] >= 0) & (found.owner[start:stop] < count))
    return found.text[start : start + int(own[0])] if len(own) else ""


def _usual_opening(template: ChatTemplate, role: str) -> str | None:
    """What a template writes before the text of a message of this role that is not the first."""
    if role not in template.learned:
        template.learned[role] = _learn_opening(template, role)
    return template.learned[role]


def _learn_opening(template: ChatTemplate, role: str) -> str | None:
    other = "user" if role == "assistant" else "assistant"
    chat = Chat([{"role": r, "content": "grain"} for r in (role, other, role)], None)
    try:
        text = template.render(chat)
    except REFUSALS:
        return None
    found = coloured(template, chat, text, ())
    if found is None:
        return None
    iteration = _Stretches.of(found).iteration
    inside = np.flatnonzero(iteration == 2)
    return _opening(found, int(inside[0]), int(inside[-1]) + 1, 3) if len(inside) else None
