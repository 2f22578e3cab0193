"""The forms in which chats come, made into one: a list of {role, content} without None, and the tools it may call.

Read are lists of dictionaries, JSON in a string, a dictionary with a list for each key, `{from, value}` conversations,
contents that are a text, nothing (a message of tool calls), or a list of parts. Arrow gives every dictionary every key
that any of them has, with None for those it lacks; templates ask whether a key is there, so keys with None are removed
at every depth.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError

MOST_ROLES = 127
NO_MESSAGES = "empty"
NO_LIST = "not a list of messages"
NO_ROLE = "a message without a role"
NO_TEXT = "a message whose content is no text"
NO_CONTENT = "a message without content"
BAD_TOOLS = "tools that are no list of dictionaries"
TOO_DEEP = "messages nested too deeply"

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The names of `from` in `{from, value}` conversations, and the roles that templates know. Others stay as they are."""
CONTENT_KEYS = {"content", "value", "tool_calls", "function_call", "reasoning_content", "thinking", "reasoning"}
"""A message has one of them: of one with its words elsewhere (`text`, `parts`) nothing but markers would be left."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, some the second, and transformers fills both."""


@dataclass(frozen=True)
class WithTools:
    """The content of a record that has tools beside its messages."""

    messages: Any
    tools: Any


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    tools: list[Message] | None


def read_chat(content: Any) -> Chat | str:
    """A record's chat, or why it is none."""
    given, tools = (content.messages, content.tools) if isinstance(content, WithTools) else (content, None)
    try:
        messages = _messages(messages_of(given))
        if isinstance(messages, str):
            return messages
        found = _tools(tools)
    except RecursionError:
        return TOO_DEEP
    return found if isinstance(found, str) else Chat(messages, found)


def messages_of(value: Any) -> Any:
    """Return the messages of a record, which may be held as JSON in a text, as a whole or message by message, or as a
    dictionary that has a list for each of their keys. What is none of these is returned as it is."""
    value = _from_json(value)
    if isinstance(value, dict) and all(isinstance(of_key, list) for of_key in value.values()):
        if len({len(of_key) for of_key in value.values()}) != 1:  # also where there is no key
            return value
        return [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=True)]
    return [_from_json(message) for message in value] if isinstance(value, list) else value


def variants(chat: Chat) -> Iterator[Chat]:
    """The chat, and then the ways to write the same that a template may take where it refuses another: a content that
    is missing as None or as an empty text, and a tool call's arguments as a dictionary or as JSON in a text."""
    yield chat
    without = [m for m in chat.messages if "content" not in m]
    for empty in (None, "") if without else ():
        yield Chat([{"content": empty, **m} for m in chat.messages], chat.tools)
    if any(m.get("tool_calls") for m in chat.messages):
        other = [_other_arguments(m) for m in chat.messages]
        yield Chat(other, chat.tools)
        for empty in (None, "") if without else ():
            yield Chat([{"content": empty, **m} for m in other], chat.tools)


def joined_parts(chat: Chat) -> Chat:
    """The chat with the texts of each list of them put together, for templates that know no parts."""
    return Chat([{**m, "content": _joined(m["content"])} if "content" in m else m for m in chat.messages], chat.tools)


def split_parts(chat: Chat) -> Chat:
    """The chat with each content that is a text as a list of one part, for templates that know nothing else."""
    return Chat(
        [
            {**m, "content": [{"type": "text", "text": m.get("content", "")}]}
            if isinstance(m.get("content", ""), str)
            else m
            for m in chat.messages
        ],
        chat.tools,
    )


def _joined(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _from_json(value: Any) -> Any:
    """What JSON in a text or in bytes holds; other values, and texts that are no JSON, as they are."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _messages(given: Any) -> list[Message] | str:
    if given is None or given == []:
        return NO_MESSAGES
    if not isinstance(given, list):
        return NO_LIST
    messages = []
    for one in given:
        message = _message(without_none(one)) if isinstance(one, dict) else NO_ROLE
        if isinstance(message, dict) and not CONTENT_KEYS & {*one, *message}:
            message = NO_CONTENT
        if isinstance(message, str):
            return message
        messages.append(message)
    return messages


def _message(given: Message) -> Message | str:
    message = dict(given)
    if "role" not in message and isinstance(name := message.pop("from", None), str):
        message = {"role": ROLES.get(name.lower(), name), **message}
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        return NO_ROLE
    content = message.get("content")
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        parts = [_part(part) for part in content if part is not None]
        if None in parts:
            return NO_TEXT
        message["content"] = parts or ""  # templates that know no parts would write []
    elif content is not None and not isinstance(content, str):
        return NO_TEXT
    calls = message.get("tool_calls")
    if isinstance(calls, list) and not any(call is not None for call in calls):
        del message["tool_calls"]  # templates that ask whether it is there would write calls in place of the content
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _part(given: Any) -> Message | None:
    """A part of a content; None for what is none, and for a text whose words are not where templates look for them."""
    if isinstance(given, str):
        return {"type": "text", "text": given}
    if not isinstance(given, dict):
        return None
    text = given.get("text")
    if isinstance(text, dict) and isinstance(text.get("value"), str):  # with its annotations beside it
        return {**given, "text": text["value"]}
    if given == {"type": "text"}:
        return {**given, "text": ""}  # it was null
    is_elsewhere = any(isinstance(given.get(key), str) for key in ("content", "value"))
    is_lacking = not isinstance(text, str) and given.get("type", "text") == "text"
    return None if is_lacking and ("type" in given or is_elsewhere) else given


def _tools(given: Any) -> list[Message] | str | None:
    given = _from_json(given)
    if given is None or given == [] or given == "":
        return None
    tools = [without_none(_from_json(tool)) for tool in given] if isinstance(given, list) else [given]
    return tools if all(isinstance(tool, dict) for tool in tools) else BAD_TOOLS


def check_role_names(names: Collection[str]) -> None:
    """Raise InputError for more roles than a store can number."""
    if len(names) > MOST_ROLES:
        raise InputError(
            f"corpus.messages: messages have more than {MOST_ROLES} roles, as {', '.join(sorted(names)[:5])}: their "
            "key role (or from) should hold a few names, as user and assistant"
        )


def without_none(value: Any) -> Any:
    """A value without the keys of dictionaries, at any depth, that have None."""
    if isinstance(value, dict):
        return {key: without_none(of) for key, of in value.items() if of is not None}
    return [without_none(of) for of in value] if isinstance(value, list | tuple) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys of dictionaries included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from texts_in(part)


def _other_arguments(message: Message) -> Message:
    """A message whose tool calls have their arguments in the other form, where they have one."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_other_call(call) if isinstance(call, dict) else call for call in calls]}


def _other_call(call: Message) -> Message:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _other_call(function)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and isinstance(read := _from_json(arguments), dict):
        return {**call, "arguments": read}
    if isinstance(arguments, dict):
        with suppress(TypeError):  # values that JSON has not, as times: there is no other form
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
