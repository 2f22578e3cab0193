"""The types of what a person may set for chats."""

import json
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from pipeline.corpora.chat_environment import GENERATION, environment
from pipeline.corpora.chat_templates import WATCH

CHAT_KEYS = ("markers", "tools", "template_arguments", "chat_date")
"""Keys of the section corpus that only chats have."""
_ELSEWHERE = {
    "messages": "messages",
    "conversation": "messages",
    "conversations": "messages",
    "tools": "tools",
    "strftime_now": "chat_date",
    "now": "chat_date",
    "date_string": "chat_date",
    "max_length": "context",
    "truncation": "context",
    "add_special_tokens": "bos",
    "return_assistant_tokens_mask": "roles",
}
"""Names that apply_chat_template of transformers takes, or gives to templates, and the keys of the section corpus that
say the same."""
_NESTED = ("template_arguments", "chat_template_kwargs", "template_kwargs")
_NO_VARIABLES = {
    "chat_template": "the template is the tokenizer's: save it with one, and name that as model.tokenizer",
    "continue_final_message": "templates do not know it; a chat is run as its template writes it, to its end",
    **dict.fromkeys(
        ("tokenize", "padding", "return_tensors", "return_dict", "tokenizer_kwargs", "processor_kwargs"),
        "it is what transformers does with a text that was rendered, and templates do not know it; leave it out",
    ),
}
"""Names that are no arguments of templates: why, and what to do."""


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
        if name in _ELSEWHERE:
            raise ValueError(f"{name} comes from corpus.{_ELSEWHERE[name]}: give it there")
        if name in _NESTED:
            raise ValueError(f"{name} is no argument of templates: give what it holds as template_arguments itself")
        if name in _NO_VARIABLES:
            raise ValueError(f"{name} is no argument of templates: {_NO_VARIABLES[name]}")
        if name in (GENERATION, WATCH, "self", *environment().globals):
            raise ValueError(f"{name} is what templates have of their own: it cannot be given")
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name that a template can ask for: those have letters, digits and _")
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}, and templates are given what JSON has: quote it") from None
    return plain


Day = Annotated[str, BeforeValidator(_as_day)]
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_plain)]
