"""What a chat template may be given besides messages and tools: the variables that it reads, and nothing else.

An argument that the template does not read would be ignored without notice, so it is refused. Many such names are
parameters of `apply_chat_template` in transformers.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.corpus.chats.encode import template_sources
from pipeline.corpus.chats.environment import GENERATION, environment
from pipeline.corpus.chats.templates import WATCH, variables_of
from pipeline.errors import InputError

_OF_THE_CORPUS = {
    "conversation": "messages",
    "conversations": "messages",
    "max_length": "context",
    "truncation": "context",
    "add_special_tokens": "bos",
    "return_assistant_tokens_mask": "roles",
}
"""Names, and the keys of the section corpus that say the same."""
_NESTED = ("template_arguments", "chat_template_kwargs", "template_kwargs")
_OF_TRANSFORMERS = (
    "tokenize",
    "padding",
    "return_tensors",
    "return_dict",
    "tokenizer_kwargs",
    "processor_kwargs",
    "continue_final_message",
)


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise InputError, with what to write instead, for an argument that none of the tokenizer's templates reads."""
    read = {name for source in template_sources(tokenizer) for name in variables_of(source)}
    for name in arguments:
        if name in (GENERATION, WATCH, "self", *environment().globals):
            raise InputError(f"corpus.template_arguments: {name} is what templates have of their own; leave it out")
        if name not in read:
            raise InputError(f"corpus.template_arguments: {_advice(name, sorted(read))}")


def _advice(name: str, read: list[str]) -> str:
    if name in _OF_THE_CORPUS:
        return f"{name} is none that the chat template reads; give it as corpus.{_OF_THE_CORPUS[name]}"
    if name in _NESTED:
        return f"{name} is none that the chat template reads: give what it holds as template_arguments itself"
    if name == "chat_template":
        return f"{name} is the tokenizer's: save it with a tokenizer, and name that as model.tokenizer"
    if name in _OF_TRANSFORMERS:
        return f"{name} is about what transformers does with a text that was rendered: leave it out"
    return (
        f"the tokenizer's chat template does not read {name!r}, so that it would change nothing: leave it out, or mend "
        f"the name; it reads {', '.join(read) or 'nothing'}"
    )
