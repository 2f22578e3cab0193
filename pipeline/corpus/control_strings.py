"""Control strings (`<|im_end|>`) as tokens where a chat's template wrote them, and as text where a message has them.

A tokenizer splits a text at its control strings before anything else. So in a text whose control strings are read as
text, one that is a token stands as a character of Unicode's private planes, which a copy of the tokenizer splits at in
the same way. All tokens are then those of the whole text, but for the control strings in messages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

FIRST_STAND_IN = 0x100000


@dataclass(frozen=True)
class ControlStrings:
    backend: Tokenizer

    @cached_property
    def ids(self) -> Int64:
        """The ids of the control strings, which are the special tokens of the tokenizer, ascending."""
        return np.array(sorted(self._special), np.int64)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._special.values())

    def is_in(self, texts: Sequence[str]) -> bool:
        return any(string in text for text in texts for string in self.texts)

    def encode(self, texts: Sequence[str], is_own: Sequence[Bool]) -> list[tuple[Int64, Int64, Int64]]:
        """Return the tokens of each text, and where in it each begins and ends. `is_own` is true for letters that are
        the messages' own: control strings there are text."""
        used = {character for text in texts for character in set(text) if ord(character) >= FIRST_STAND_IN}
        copy, stand_ins = self._copy(frozenset(used)) if used else self._usual_copy
        token_of = {copy.token_to_id(stand_in): token for token, stand_in in stand_ins.items()}
        written, places = zip(
            *(self._written(t, own, stand_ins) for t, own in zip(texts, is_own, strict=True)), strict=True
        )
        found = []
        for encoding, place in zip(copy.encode_batch(list(written), add_special_tokens=False), places, strict=True):
            ids = np.array([token_of.get(token, token) for token in encoding.ids], np.int64)
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            found.append((ids, place[offsets[:, 0]], place[offsets[:, 1]]))
        return found

    @cached_property
    def _special(self) -> dict[int, AddedToken]:
        return {i: token for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _usual_copy(self) -> tuple[Tokenizer, dict[int, str]]:
        return self._copy(frozenset())

    def _copy(self, used: frozenset[str]) -> tuple[Tokenizer, dict[int, str]]:
        """A copy of the tokenizer that reads control strings as text, and the character that it takes for each."""
        copy = Tokenizer.from_str(self.backend.to_str())
        stand_ins: dict[int, str] = {}
        tokens: list[AddedToken] = []
        number = FIRST_STAND_IN
        for token_id, token in self._special.items():
            while chr(number) in used or copy.token_to_id(chr(number)) is not None:
                number += 1
            stand_ins[token_id] = chr(number)
            number += 1
            tokens.append(
                AddedToken(
                    stand_ins[token_id],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
            )
        copy.add_tokens(tokens)
        copy.encode_special_tokens = True
        return copy, stand_ins

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Every added token, control string or not: the longest of those that begin at a place is found."""
        added = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.content]
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    def _written(self, text: str, is_own: Bool, stand_ins: dict[int, str]) -> tuple[str, Int64]:
        """A text with stand-ins for the template's control strings, and the place in `text` of each of its letters and
        of its end."""
        number_of = {token.content: token_id for token_id, token in self._special.items()}
        edges = [0, *(np.flatnonzero(np.diff(is_own)) + 1).tolist(), len(text)]
        parts: list[str] = []
        places: list[Int64] = []
        at = 0
        for start, stop in pairwise(edges):
            if start == stop or is_own[start]:
                continue
            for match in self._pattern.finditer(text, start, stop):
                if (token_id := number_of.get(match.group())) is not None:
                    parts += [text[at : match.start()], stand_ins[token_id]]
                    places += [np.arange(at, match.start() + 1)]
                    at = match.end()
        parts.append(text[at:])
        places.append(np.arange(at, len(text) + 1))
        return "".join(parts), np.concatenate(places)
