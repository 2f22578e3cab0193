"""The types of what a person may set for chats."""

import json
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

CHAT_KEYS = ("markers", "tools", "template_arguments", "chat_date")
"""Keys of the section corpus that only chats have."""
_TAKEN = {
    "messages": "messages",
    "tools": "tools",
    "strftime_now": "chat_date",
    "now": "chat_date",
    "date_string": "chat_date",
}


def _as_day(value: Any) -> Any:
    """A day as YYYY-MM-DD; YAML reads one without quotes as a date."""
    if isinstance(value, date) and not isinstance(value, datetime):
        return value.isoformat()
    try:
        return datetime.strptime(value, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"a day is YYYY-MM-DD, as 2026-07-26, unlike {value}") from None


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as they are: what a template may be given, and the store's record can hold."""
    plain = {}
    for name, value in arguments.items():
        if name in _TAKEN:
            raise ValueError(f"{name} comes from corpus.{_TAKEN[name]}: give it there")
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}, and templates are given what JSON has: quote it") from None
    return plain


Day = Annotated[str, BeforeValidator(_as_day)]
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_plain)]
