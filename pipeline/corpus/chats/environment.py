"""The environment that chat templates run in: what they find in transformers' they find here.

Templates come with models and are no more trusted than those: they run in jinja's sandbox and are given plain data.
"""

import json
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.corpus.chats.messages import Message

GENERATION = "granary_generation"
"""The variable that holds what is called with the body of a `{% generation %}` block."""


class GenerationBlocks(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as an attribute of instances)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.Name(GENERATION, "load"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class PlainNamespace(jinja2.utils.Namespace):
    """A namespace in which a template cannot hide names that the sandbox would not let it read."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace has no name that begins with an underscore, as {name} does")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> PlainNamespace:
    made = PlainNamespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


class Refusal(jinja2.TemplateError):
    """A template says that it does not take a chat, in its own words."""


def _raise(message: Any) -> NoReturn:
    raise Refusal(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dictionaries:
    """`dict` for templates: without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Message:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> Message:
        return dict.fromkeys(*args)


@lru_cache(maxsize=1)
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_raise, namespace=_namespace, dict=_Dictionaries())
    return made
