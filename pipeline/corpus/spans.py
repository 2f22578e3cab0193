"""Labels of tokens out of spans: each token has the value of the span that its characters lie in, or none.

A token belongs to a span that has at least one of its characters (of ' word': of the word). Where spans overlap, a
token's value is that of the shortest; of two that are as short, of the later one. A record whose spans do not fit its
content is left out with the reason: its rows would be given to the wrong subpopulation, or to none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus.encode import Encoded, is_unicode
from pipeline.corpus.formats.aligned import START_KEYS, STOP_KEYS, TEXT_KEY, VALUE_KEYS, AlignedLabel
from pipeline.corpus.token_labels import NONE, TokenLabels, all_names

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

NULL = "null (a record that has none of them has an empty list)"
NO_LIST = "no list of spans"
NO_ENDS = "a span without start and stop (whole numbers)"
NO_VALUE = "a span without a value"
REVERSED = "a span that ends before it starts"
BEYOND = "a span beyond the end of the content"
ELSEWHERE = "a span whose own text is not at its place (starts and stops count characters)"
UNEVEN = "not one value for each token"
NOT_PLAIN = "a value that is no text, number or truth value"


class BadSpans(Exception):
    """Why a record's spans cannot be taken; counted, never shown as an error."""


def labelled(encoded: Encoded, aligned: Mapping[str, AlignedLabel], contents: Sequence[Any]) -> Encoded:
    """Give tokens their labels. `encoded` has the extents of its tokens, which are those of `contents`. Records with
    bad spans lose their tokens, and are one document. Raises InputError for a label of too many values."""
    assert encoded.extents is not None
    assert encoded.sizes is not None
    record_of = np.arange(len(encoded.lengths)) if encoded.record is None else encoded.record
    first = np.searchsorted(record_of, np.arange(len(contents)))  # document of each record
    bounds = np.insert(np.cumsum(encoded.lengths), 0, 0)[[*first, len(record_of)]].tolist()
    codes = {name: np.full(len(encoded.tokens), NONE, dtype=np.int32) for name in aligned}
    numbers: dict[str, dict[str, int]] = {name: {} for name in aligned}
    bad = dict(encoded.bad)
    wrong: set[int] = set()
    for record, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        extents, size = encoded.extents[start:stop], int(encoded.sizes[first[record]])
        for name, label in aligned.items():
            try:
                values = _values_of(label, record, contents[record], size)
            except BadSpans as problem:
                bad.setdefault(int(first[record]), f"{name}: {problem}")
                wrong.add(record)
                continue
            of_label = numbers[name]
            found = [NONE if value is None else of_label.setdefault(value, len(of_label)) for *_, value in values]
            if label.are_tags:
                codes[name][start:stop] = np.array(found, dtype=np.int32)[extents[:, 0]]
            else:
                spans = np.array([ends for *ends, _ in values], dtype=np.int64).reshape(-1, 2)
                codes[name][start:stop] = innermost(extents, spans, np.array(found, dtype=np.int32))
    names = {name: tuple(of_label) for name, of_label in numbers.items()}
    all_names([names])  # raises
    is_kept = np.ones(len(encoded.lengths), dtype=bool)
    is_kept[list(bad)] = False
    is_kept[np.isin(record_of, list(wrong))] = False
    kept = np.repeat(is_kept, encoded.lengths)
    stays = is_kept | np.isin(np.arange(len(is_kept)), list(bad))  # a record's other documents go with its spans
    number = np.cumsum(stays) - 1
    return replace(
        encoded,
        tokens=encoded.tokens[kept],
        lengths=np.where(is_kept, encoded.lengths, 0)[stays],
        bad={int(number[document]): problem for document, problem in bad.items()},
        extents=None,
        sizes=None,
        labels=TokenLabels(codes, names)[kept],
        record=None if encoded.record is None else encoded.record[stays],
    )


def innermost(extents: Int64, spans: Int64, codes: Int32) -> Int32:
    """The code of the shortest span that each token overlaps, of the later one where they are as short; NONE where
    there is none. `extents` [tokens, 2] and `spans` [spans, 2] are [start, stop)."""
    starts, stops = extents.T
    found = np.full(len(extents), NONE, dtype=np.int32)
    in_order = bool((np.diff(starts) >= 0).all() and (np.diff(stops) >= 0).all())
    firsts, lasts = np.searchsorted(stops, spans[:, 0], side="right"), np.searchsorted(starts, spans[:, 1])
    for number in np.argsort(spans[:, 0] - spans[:, 1], kind="stable").tolist():  # long ones first
        start, stop = spans[number]
        if start == stop:
            continue
        if in_order:
            found[firsts[number] : lasts[number]] = codes[number]
        else:  # a normaliser that reorders characters
            found[(stops > start) & (starts < stop)] = codes[number]
    found[starts == stops] = NONE  # a token of no character, as SentencePiece's first space
    return found


Value = tuple[int, int, str | None]
"""Start, stop and value of a span; None where a token has none."""


def _values_of(label: AlignedLabel, record: int, content: Any, size: int) -> list[Value]:
    """A record's spans, or the values of its tokens. Raises BadSpans."""
    given = label.values[record]
    if given is None:
        raise BadSpans(NULL)
    if label.are_tags and given == []:  # as spans: lists of which all are empty do not show what they are of
        return [(place, place + 1, None) for place in range(size)]
    if label.are_tags:
        if not isinstance(given, list) or len(given) != size:
            raise BadSpans(UNEVEN)
        return [(place, place + 1, None if _is_missing(tag) else _plain(tag)) for place, tag in enumerate(given)]
    if isinstance(given, dict):
        given = _lines(given)
    if not isinstance(given, list):
        raise BadSpans(NO_LIST)
    text = content.decode("utf-8") if given and isinstance(content, bytes) else content
    return [_span(one, text, size) for one in given]


def _span(given: Any, text: Any, size: int) -> Value:
    if isinstance(given, dict):
        start, stop, value = (_first(given, keys) for keys in (START_KEYS, STOP_KEYS, VALUE_KEYS))
    elif isinstance(given, list) and len(given) == 3:
        start, stop, value = given
    else:
        raise BadSpans(NO_LIST)
    first, last = _whole(start), _whole(stop)
    if first is None or last is None:
        raise BadSpans(NO_ENDS)
    if first > last:
        raise BadSpans(REVERSED)
    if first < 0 or last > size:
        raise BadSpans(BEYOND)
    if _is_missing(value):
        raise BadSpans(NO_VALUE)
    own = given.get(TEXT_KEY) if isinstance(given, dict) else None
    if own and isinstance(own, str) and isinstance(text, str) and own.split() != text[first:last].split():
        raise BadSpans(ELSEWHERE)
    return first, last, _plain(value)


def _first(given: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((given[key] for key in keys if key in given), None)


def _whole(number: Any) -> int | None:
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> str:
    """A value as moments and anchors have it: as text."""
    if isinstance(value, bytes | dict | list) or not is_unicode(str(value)):
        raise BadSpans(NOT_PLAIN)
    return str(value)


def _lines(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Spans of one {start: [...], end: [...], label: [...]}."""
    known = (*START_KEYS, *STOP_KEYS, *VALUE_KEYS, TEXT_KEY)
    columns = {key: value for key, value in given.items() if key in known and isinstance(value, list)}
    if len({len(value) for value in columns.values()}) != 1:
        raise BadSpans(NO_LIST)
    return [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
