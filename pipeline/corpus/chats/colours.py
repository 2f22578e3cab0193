"""Where in a rendered chat the messages' own text stands: told by rendering the chat once more, in colours.

In the coloured chat every letter of a message's texts is a character that stands for this message (of Unicode's private
planes), so that in the coloured rendering each letter says whose it is, wherever the template has put it, and however
often the same words are elsewhere. Templates look into contents (`'</think>' in content`), so some characters may have
to stay as they are; what shows that nothing else has changed is that the coloured rendering is the plain one but for
its colours. There are several ways of colouring, from all characters to none, and the first that passes is taken.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus.chats.messages import Chat
from pipeline.corpus.chats.templates import MARK, MARK_BASE, MARK_DIGITS, MARK_ZERO, REFUSALS, ChatTemplate, Event

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

FIRST_COLOUR = 0xF0000
MOST_MISSES = 64
"""A message's text is not searched any more, each time from its beginning, after this many stretches that are not in
it: the template changes the text, its case for example."""
MOST_COLOURS = ord(MARK) - FIRST_COLOUR
NOBODY = -1
NAMES = {"role", "type", "id", "tool_call_id"}
"""Keys whose values templates compare: they are not coloured."""
TOLD = {"name", "description"}
"""Keys of tools whose values are coloured."""
SPACE = "\u2005"
"""A space of a width that hardly any text has."""
ESCAPED = r"""["'\\<>&\x00-\x1f]"""
"""Characters that JSON and HTML write otherwise."""


@dataclass(frozen=True)
class Coloured:
    """A rendered chat, letter by letter."""

    text: str
    owner: Int32
    """The message that each character is from, the number of messages for the tools, or NOBODY."""
    is_located: bool
    """True if contents were coloured; otherwise nobody owns anything."""
    events: list[Event]
    places: Int64
    """Where in the text each event was."""


@dataclass(frozen=True)
class Way:
    """A way to colour texts."""

    kept: re.Pattern[str] | None
    """What stays as it is, besides space at a text's ends; None keeps nothing else."""
    colours: bool = True
    space: str | None = None
    """What space at a text's ends becomes: another space, which templates trim as well."""

    def paint(self, text: str, colour: str) -> str:
        core = text.strip()
        if not core or not self.colours:
            return text
        start = text.index(core[0])
        before, after = text[:start], text[start + len(core) :]
        if self.space is not None:
            before, after = self.space * len(before), self.space * len(after)
        inside = colour * len(core) if self.kept is None else self._around_kept(core, colour)
        return f"{before}{inside}{after}"

    def _around_kept(self, core: str, colour: str) -> str:
        assert self.kept is not None
        parts = self.kept.split(core)
        parts[::2] = [colour * len(part) for part in parts[::2]]
        return "".join(parts)


def coloured(template: ChatTemplate, chat: Chat, text: str, control: Sequence[str]) -> Coloured | None:
    """The text of a chat with the owner of each letter, or None if no way of colouring leaves it what it is. `control`:
    the tokenizer's control strings."""
    if len(chat.messages) >= MOST_COLOURS:
        return None
    plain = _points(text)
    before: Chat | None = None
    for way in _ways(template, text, control):
        painted = Chat(
            [_painted(message, chr(FIRST_COLOUR + i), way) for i, message in enumerate(chat.messages)],
            _painted_tools(chat.tools, chr(FIRST_COLOUR + len(chat.messages)), way),
        )
        if painted == before:
            continue
        before = painted
        try:
            watched, events = template.watched(painted)
        except REFUSALS:
            continue
        points = _points(watched)
        found = _unmarked(points, events)
        if found is None or len(found[0]) != len(plain):
            continue
        bare, told, places = found
        owner = bare - FIRST_COLOUR
        owner[(owner < 0) | (owner > len(chat.messages))] = NOBODY
        if not way.colours:
            owner[:] = NOBODY
        space = (bare != plain) & (bare == ord(way.space or MARK))
        if ((bare == plain) | space)[owner == NOBODY].all():
            _give_space(owner, space)
            if _extend(owner, text, chat, painted):
                return Coloured(text, owner, way.colours, told, places)
    return None


def _unmarked(points: Int32, events: list[Event]) -> tuple[Int32, list[Event], Int64] | None:
    """A watched text without its marks, what they stand for, and where in it each was; None if they are spoilt."""
    marks = np.flatnonzero(points == ord(MARK))
    if len(marks) and marks[-1] + MARK_DIGITS >= len(points):
        return None
    digits = points[marks[:, None] + np.arange(1, 1 + MARK_DIGITS)].astype(np.int64) - MARK_ZERO
    numbers = digits[:, 0] * MARK_BASE + digits[:, 1]
    if ((numbers < 0) | (numbers >= len(events))).any():
        return None
    bare = np.delete(points, (marks[:, None] + np.arange(1 + MARK_DIGITS)).ravel())
    return bare, [events[n] for n in numbers.tolist()], marks - np.arange(len(marks)) * (1 + MARK_DIGITS)


def _ways(template: ChatTemplate, text: str, control: Sequence[str]) -> Iterator[Way]:
    if SPACE not in text:
        yield Way(None, space=SPACE)
    yield Way(None)
    yield Way(re.compile(f"({ESCAPED})"))
    # What the template may look for. Control strings last: where one is kept, a message's cannot be told from its own.
    harmless = [literal for literal in template.literals if not any(string in literal for string in control)]
    sought = [literal for literal in template.sought if literal in harmless]
    if sought:
        yield Way(re.compile("(" + "|".join(map(re.escape, sought)) + ")"))
    for literals in (sought, harmless, template.literals):
        yield Way(re.compile("(" + "|".join([*map(re.escape, literals), ESCAPED]) + ")"))
    yield Way(None, colours=False)


def _give_space(owner: Int32, space: npt.NDArray[np.bool_]) -> None:
    """Give space at a text's end to the message whose text is beside it."""
    edges = np.flatnonzero(np.diff(space, prepend=False, append=False)).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        beside = [int(owner[at]) for at in (start - 1, stop) if 0 <= at < len(owner) and owner[at] != NOBODY]
        owner[start:stop] = beside[0] if beside else NOBODY


def _points(text: str) -> Int32:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int32)


def _painted(value: Any, colour: str, way: Way) -> Any:
    if isinstance(value, str):
        return way.paint(value, colour)
    if isinstance(value, list):
        return [_painted(part, colour, way) for part in value]
    if isinstance(value, dict):
        return {key: part if key in NAMES else _painted(part, colour, way) for key, part in value.items()}
    return value


def _painted_tools(value: Any, colour: str, way: Way) -> Any:
    """Tools with their names and descriptions coloured: templates compare the other texts with one another."""
    if isinstance(value, list):
        return [_painted_tools(part, colour, way) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: way.paint(part, colour) if key in TOLD and isinstance(part, str) else _painted_tools(part, colour, way)
        for key, part in value.items()
    }


def _texts(value: Any) -> Iterator[str]:
    """The texts of a message that are coloured, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in NAMES:
                yield from _texts(part)


def _extend(owner: Int32, text: str, chat: Chat, painted: Chat) -> bool:
    """Give the messages the characters of their texts that were kept: those between two stretches that follow one
    another in a text, and those at a text's ends, if all of them stand there. Whether all stretches can be theirs."""
    sources = [_Source(message, other) for message, other in zip(chat.messages, painted.messages, strict=True)]
    edges = np.flatnonzero(np.diff(owner, prepend=NOBODY, append=NOBODY)).tolist()
    numbers = owner[edges[:-1]].tolist()  # before any of them is given more
    for (start, stop), number in zip(pairwise(edges), numbers, strict=True):
        if 0 <= number < len(sources) and not sources[number].meet(owner, text, start, stop, number):
            return False
    return True


class _Source:
    """The texts of a message, and how far the rendering has come in them."""

    def __init__(self, message: Any, painted: Any) -> None:
        # MARK between texts: a character that no rendering has and that was not kept.
        self.text = MARK.join(["", *_texts(message), ""])
        self.paint = MARK.join(["", *_texts(painted), ""])
        self.letters = {*self.text.casefold()}
        self.misses = 0
        self.at = 0
        self.end = -1
        """Where in the rendering the last stretch ended."""

    def meet(self, owner: Int32, text: str, start: int, stop: int, number: int) -> bool:
        """Take a stretch of the rendering that has the message's colour; whether it can be the message's."""
        stretch = text[start:stop]
        begin = self._after_kept(self.at)
        follows = self.text.startswith(stretch, begin)
        if not follows:
            begin = -1
            if self.misses < MOST_MISSES:
                begin = self.text.find(stretch, self.at)
                begin = self.text.find(stretch) if begin < 0 else begin
            if begin < 0:  # two texts in one, or one that the template has changed: its case, say
                self.misses += 1
                self.end = -1
                return {*stretch.casefold()} <= self.letters
        if follows and self.at > 0 and MARK not in self.text[self.at : begin] and self.end >= 0:
            between = owner[self.end : start]
            if (between == NOBODY).all():
                between[:] = number
        else:
            self._lead(owner, text, start, begin, number)
        self.at, self.end = begin + len(stretch), stop
        self._trail(owner, text, number)
        return True

    def _is_kept(self, at: int) -> bool:
        return ord(self.text[at]) < FIRST_COLOUR and self.paint[at] == self.text[at]

    def _after_kept(self, at: int) -> int:
        """The next place at which a colour is."""
        while at < len(self.text) and (self._is_kept(at) or self.text[at] == MARK):
            at += 1
        return at

    def _lead(self, owner: Int32, text: str, start: int, begin: int, number: int) -> None:
        first = begin
        while self._is_kept(first - 1):
            first -= 1
        length = begin - first
        if self.text[first - 1] == MARK and length and text[max(0, start - length) : start] == self.text[first:begin]:
            stretch = owner[start - length : start]
            if (stretch == NOBODY).all():
                stretch[:] = number

    def _trail(self, owner: Int32, text: str, number: int) -> None:
        last = self.at
        while self._is_kept(last):
            last += 1
        length = last - self.at
        if self.text[last] == MARK and length and text[self.end : self.end + length] == self.text[self.at : last]:
            stretch = owner[self.end : self.end + length]
            if (stretch == NOBODY).all():
                stretch[:] = number
                self.at, self.end = last, self.end + length
