"""How a store's tokens became rows, as `granary plan`, `granary status` and the report show it.

Each setting is shown under its key in the spec, with the value that was used: for `bos: auto` the token that was
chosen. A token is shown by its id and its string.
"""

import json
from collections.abc import Callable
from typing import Any

from storage.errors import StorageError, Unreachable
from storage.format.records import Record
from storage.store import Store
from storage.table.token_pieces import TokenStrings

MOST_SHOWN = 8
"""Excluded tokens that are told one by one."""


def token_rows(plan: Record, string_of: Callable[[int], str | None]) -> Record:
    """Return the settings that decide what a row is, out of what determined a table. `string_of` gives the string of a
    token, where there is one.

    `specials` is None for token ids, which have no control strings; `chats` is None for a corpus of anything else.
    """

    def token(number: int | None) -> Record | None:
        return None if number is None else {"id": number, "string": string_of(number)}

    chats: Record = {
        "roles": plan.get("roles", []),
        "markers": plan.get("markers", True),
        **{name: plan[name] for name in ("tools", "template_arguments", "chat_date") if name in plan},
    }
    return {
        "bos": token(plan.get("bos")),
        # stores from before there was a choice do not have the key
        "specials": plan.get("specials", "tokens") if plan.get("tokens") is None else None,
        "separator": token(plan.get("separator")),
        "exclude_tokens": [token(number) for number in plan.get("exclude_tokens", [])],
        "chats": None if plan.get("messages") is None else chats,
    }


def token_rows_of(store: Store, strings: TokenStrings) -> Record:
    """Return `token_rows` of a store, with the `strings` of its tokens; they have none where its tokenizer's file does
    not tell them. Raises Unreachable."""

    def string_of(number: int) -> str | None:
        try:
            return strings.get(number)
        except Unreachable:
            raise
        except StorageError:  # `granary verify` tells of damage; it keeps nothing else from being shown
            return None

    return token_rows(store.info.plan, string_of)


def token_words(record: Record) -> str:
    """Say what the tokens are: "bos: '<s>' (1); specials: text"."""
    excluded = record["exclude_tokens"]
    more = f" and {len(excluded) - MOST_SHOWN:,} more" if len(excluded) > MOST_SHOWN else ""
    parts = {
        "bos": "none" if record["bos"] is None else _shown(record["bos"]),
        "specials": record["specials"],
        "separator": None if record["separator"] is None else _shown(record["separator"]),
        "exclude_tokens": ", ".join(map(_shown, excluded[:MOST_SHOWN])) + more,
    }
    return "; ".join(f"{name}: {words}" for name, words in parts.items() if words)


def chat_words(record: Record) -> str | None:
    """Say how chats were read: "roles: assistant; markers: true"; None where there are none."""
    if record["chats"] is None:
        return None
    return "; ".join(f"{name}: {_value(value)}" for name, value in record["chats"].items())


def _shown(token: Record) -> str:
    return str(token["id"]) if token["string"] is None else f"{token['string']!r} ({token['id']})"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "all"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
