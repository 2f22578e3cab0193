"""Where in its text each token lies, for labels of spans. Costs more than token ids alone: done only with spans."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tokens import long_texts

Int64 = npt.NDArray[np.int64]

SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)
"""All characters of white space: none is beyond U+3000."""


def encode_with_extents(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[Int64]]:
    """Token ids of each text, as `encode_texts` of `pipeline.tokens.tokenizer` gives them, and of each token
    [start, stop): the characters that it stands for, as `trimmed`; int64 [tokens, 2]."""
    found = long_texts.encode_with_places(tokenizer.backend_tokenizer, texts)
    return [ids for ids, _ in found], [trimmed(places, text) for (_, places), text in zip(found, texts, strict=True)]


def trimmed(offsets: Int64, text: str) -> Int64:
    """Extents without the white space at their ends, but for those that are nothing else: ' word' is at its word."""
    if not len(offsets):
        return offsets
    solid = ~np.isin(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), SPACES)
    before = np.insert(np.cumsum(solid, dtype=np.int32), 0, 0)  # solid characters in front of each place
    starts, stops = offsets.clip(max=len(solid)).T.copy()
    mixed = np.flatnonzero(before[starts] < before[stops])
    # Only what has white space at an end goes on, character by character: linear in the white space.
    leading = mixed[~solid[starts[mixed]]]
    while len(leading):
        starts[leading] += 1
        leading = leading[~solid[starts[leading]]]
    trailing = mixed[~solid[stops[mixed] - 1]]
    while len(trailing):
        stops[trailing] -= 1
        trailing = trailing[~solid[stops[trailing] - 1]]
    return np.stack([starts, stops], axis=1)
