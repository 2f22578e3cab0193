"""Roles with templates that behave as each family's do, in words of our own: what they rewrite, merge, trim and add."""

import pickle
from datetime import date
from typing import Any

import jinja2
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.corpus.chats.encode import UNCLEAR, ChatEncoder, needs_day
from pipeline.corpus.chats.messages import WithTools
from pipeline.errors import InputError

CONTROL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<turn>", "</turn>"]

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
EOS_AT_THE_END = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
"""As Phi 3's: the rendering of two messages does not begin that of four."""
THOUGHTS_LEFT_OUT = (
    "{% for m in messages %}{% set text = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and enable_thinking is not false %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
)
"""As Qwen 3's: only the last answer keeps its thoughts, and has some in any case."""
SYSTEM_IN_USER = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if 'image' in part %}<image>{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '</turn>\n' }}{% endfor %}"
)
"""As Gemma 3's: the system message is the beginning of the user's, contents are trimmed, the assistant is `model`."""
DEFAULT_BLOCK = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set text = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set text = '' %}{% endif %}"
    "{{ '<|im_start|>system\n' }}{{ 'Day: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% if tools %}{{ 'Tools:\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}{% endif %}"
    "{{ text }}{{ '<|im_end|>' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
)
"""As Llama 3's: a block with the day and the tools, with a system message or without."""
DEFAULT_IN_LOOP = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a granary.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
"""As SmolLM 2's: a default system message, written within the loop over the messages."""
TOOLS_IN_LAST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}{{ '[TOOLS]' }}"
    "{{ tools | tojson }}{{ '[/TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral's: tools stand before the last question."""
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + ' ' }}{{ call.function.arguments | tojson }}"
    "{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def make_tokenizer(template: Any) -> Any:
    """One token a byte, and control strings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in CONTROL], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def told(template: Any, messages: Any, tools: Any = None, **how: Any) -> Any:
    """Stretches of one role and their text, or why there are none."""
    encoder = ChatEncoder(make_tokenizer(template), None, **how)
    return stretches(encoder, messages, tools)


def stretches(encoder: ChatEncoder, messages: Any, tools: Any = None) -> Any:
    found = encoder.encode([WithTools(messages, tools)])
    if found.bad:
        return found.bad[0]
    assert found.roles is not None
    parts: list[tuple[str, list[int]]] = []
    for token, role in zip(found.tokens.tolist(), found.roles.tolist(), strict=True):
        if not parts or parts[-1][0] != found.role_names[role]:
            parts.append((found.role_names[role], []))
        parts[-1][1].append(token)
    return [(role, encoder.tokenizer.decode(ids)) for role, ids in parts]


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return chat if system is None else [{"role": "system", "content": system}, *chat]


def test_an_end_that_only_the_whole_has() -> None:
    assert told(EOS_AT_THE_END, turns("a", "b", "a", "b")) == [
        ("user", "<|user|>\na<|end|>\n"),
        ("assistant", "<|assistant|>\nb<|end|>\n"),
        ("user", "<|user|>\na<|end|>\n"),
        ("assistant", "<|assistant|>\nb<|end|>\n</s>"),
    ]
    assert told(EOS_AT_THE_END, turns("a", "s"), markers=False) == [
        ("template", "<|user|>\n"),
        ("user", "a"),
        ("template", "<|end|>\n<|assistant|>\n"),
        ("assistant", "s"),
        ("template", "<|end|>\n</s>"),
    ]


def test_thoughts_that_are_left_out_of_earlier_answers() -> None:
    chat = turns("2?", "<think>\none\n</think>\n\ntwo", "3?", "<think>\ntwo\n</think>\n\nthree")
    assert told(THOUGHTS_LEFT_OUT, chat, markers=False) == [
        ("template", "<|im_start|>user\n"),
        ("user", "2?"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "two"),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", "3?"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "<think>\ntwo\n</think>\n\nthree"),
        ("template", "<|im_end|>\n"),
    ]
    last = told(THOUGHTS_LEFT_OUT, turns("2?", "two"))[-1]
    assert last == ("assistant", "<|im_start|>assistant\n<think>\n\n</think>\n\ntwo<|im_end|>\n")
    last = told(THOUGHTS_LEFT_OUT, turns("2?", "two"), arguments={"enable_thinking": False})[-1]
    assert last == ("assistant", "<|im_start|>assistant\ntwo<|im_end|>\n")


@pytest.mark.parametrize("question", ["a", "user", '"', "</think>x", "<|im_end|>", "\U000f0000"])
@pytest.mark.parametrize("answer", ['two "three"\n\n', "two\n", "<|im_end|>\n", "</s>", "\U000f0001\n"])
def test_thoughts_beside_texts_of_any_kind(question: str, answer: str) -> None:
    """A template that looks into contents is followed by keeping what it looks for, and nothing else."""
    parts = told(THOUGHTS_LEFT_OUT, turns(question, f"<think>\none\n</think>\n\n{answer}"), markers=False)
    assert [part for part in parts if part[0] != "template"] == [
        ("user", question),
        ("assistant", f"<think>\none\n</think>\n\n{answer}"),
    ]


def test_a_system_message_in_the_user_s() -> None:
    chat = turns(" user ", "model\n", system="system")
    assert told(SYSTEM_IN_USER, chat) == [
        ("template", "<s>"),
        ("user", "<turn>user\n"),
        ("system", "system"),
        ("user", "\n\nuser</turn>\n"),
        ("assistant", "<turn>model\nmodel</turn>\n"),
    ]
    assert told(SYSTEM_IN_USER, turns("a", "b", "c")[1:]) == "the chat template refuses the chat\nturns"


def test_a_block_that_the_template_adds_is_its_own() -> None:
    block = "<s><|im_start|>system\nDay: 26 Jul 2024\n"
    assert told(DEFAULT_BLOCK, turns("a", "b"), day="2024-07-26") == [
        ("template", f"{block}<|im_end|>"),
        ("user", "<|im_start|>user\na<|im_end|>"),
        ("assistant", "<|im_start|>assistant\nb<|im_end|>"),
    ]
    assert told(DEFAULT_BLOCK, turns("a", system="Day: "), day="2024-07-26")[:2] == [
        ("template", block),
        ("system", "Day:<|im_end|>"),
    ]
    tools = [{"name": "weigh", "description": "a"}]
    assert told(DEFAULT_BLOCK, turns("a", system="short"), tools, day="2024-07-26")[:3] == [
        ("template", f'{block}Tools:\n{{"name": "weigh", "description": "a"}}\n'),
        ("system", "short<|im_end|>"),
        ("user", "<|im_start|>user\na<|im_end|>"),
    ]


def test_a_block_that_is_written_with_the_first_message() -> None:
    assert told(DEFAULT_IN_LOOP, turns("a", "b"))[:2] == [
        ("template", "<|im_start|>system\nYou are a granary.<|im_end|>\n"),
        ("user", "<|im_start|>user\na<|im_end|>\n"),
    ]
    assert told(DEFAULT_IN_LOOP, turns("a", "b", system="c"))[0] == ("system", "<|im_start|>system\nc<|im_end|>\n")
    tools = [{"name": "weigh", "description": "a"}]
    assert told(TOOLS_IN_LAST, turns("a", "b", "c"), tools)[-2:] == [
        ("template", '[TOOLS][{"name": "weigh", "description": "a"}][/TOOLS]'),
        ("user", "[INST] c [/INST]"),
    ]


@pytest.mark.parametrize("arguments", [{"sack": "rye"}, '{"sack": "rye"}'])
def test_calls_of_tools_are_the_assistant_s(arguments: Any) -> None:
    call = {"id": None, "function": {"name": "weigh", "arguments": arguments}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "a"}]
    written = '{"sack": "rye"}' if isinstance(arguments, dict) else '"{\\"sack\\": \\"rye\\"}"'
    assert told(CALLS, chat) == [
        ("assistant", f"<|im_start|>assistant\n<call>weigh {written}</call><|im_end|>\n"),
        ("tool", "<|im_start|>tool\na<|im_end|>\n"),
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<turn>' + m.content + '</turn>' }}{% endfor %}",
        "{% for m in messages %}{% if m.content is none %}<turn>none</turn>{% else %}"
        "{{ '<turn>' + m.content + '</turn>' }}{% endif %}{% endfor %}",
    ],
)
def test_a_message_without_content_is_written_as_the_template_can(template: str) -> None:
    (only,) = told(template, [{"role": "assistant", "content": None}, {"role": "assistant", "content": "b"}])
    assert only in [("assistant", "<turn></turn><turn>b</turn>"), ("assistant", "<turn>none</turn><turn>b</turn>")]


TURN = "<turn>{{ m.role }}\n{{ m.content }}</turn>\n"
WAYS_TO_LOOP = {
    "by number": "{% for i in range(messages | length) %}{% set m = messages[i] %}" + TURN + "{% endfor %}",
    "with a macro": "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}"
    "{{ turn(m) | trim + '\n' }}{% endfor %}",
    "over messages of its own": "{% set n = namespace(own=[]) %}{% for m in messages %}"
    "{% set n.own = n.own + [dict(role=m.role, content=m.content)] %}{% endfor %}{% for m in n.own %}"
    + TURN
    + "{% endfor %}",
    "looking ahead": "{% for m in messages %}{% for later in messages[loop.index:] %}{% if later.role == 'tool' %}!"
    "{% endif %}{% endfor %}" + TURN + "{% endfor %}",
    "leaving early": "{% for m in messages %}{% for c in m.content %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{% endfor %}" + TURN + "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "unrolled": "".join(f"{{% set m = messages[{i}] %}}" + TURN for i in range(3)) + "{{ '' }}",
    "back to front": "{% for m in (messages | reverse | list) | reverse %}" + TURN + "{% endfor %}",
}


@pytest.mark.parametrize("template", WAYS_TO_LOOP.values(), ids=list(WAYS_TO_LOOP))
def test_messages_are_followed_however_a_template_comes_to_them(template: str) -> None:
    assert told(template, turns("a", "user", system="</turn>")) == [
        ("system", "<turn>system\n</turn></turn>\n"),
        ("user", "<turn>user\na</turn>\n"),
        ("assistant", "<turn>assistant\nuser</turn>\n"),
    ]


def test_what_a_template_keeps_and_writes_later() -> None:
    kept = "{% set answers %}{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    kept += "{% endgeneration %};{% endfor %}{% endset %}{% for m in messages %}{{ m.role + ' ' }}{% endfor %}"
    assert told(kept + "{{ answers }}", turns("a", "b", "c", "d")) == [
        ("user", "user "),
        ("template", "assistant "),
        ("user", "user "),
        ("template", "assistant "),
        ("assistant", "b"),
        ("template", ";"),
        ("assistant", "d"),
        ("template", ";"),
    ]


def test_contents_that_a_template_would_write_as_python_does_are_refused() -> None:
    parts = [{"type": "image", "image": "x.png"}]
    assert told(CHATML.replace("m.content", "m.content | string"), [{"role": "user", "content": parts}]) == (
        "the chat template refuses the chat\nit writes a list of parts as Python does"
    )


PARTS = [{"type": "text", "text": "hello", "image": None}]


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        (SYSTEM_IN_USER, PARTS, "<turn>user\nhello</turn>\n"),
        (
            SYSTEM_IN_USER,
            [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}],
            "<turn>user\na<image></turn>\n",
        ),
        (CHATML, [*PARTS, {"type": "text", "text": " there"}], "<|im_start|>user\nhello there<|im_end|>\n"),
        (CHATML.replace("m.content", "m.content | string"), PARTS, "<|im_start|>user\nhello<|im_end|>\n"),
        (CALLS, PARTS, "<|im_start|>user\nhello<|im_end|>\n"),  # a list is not a string: the text would be left out
        (
            "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "hello",
            "user:hello",
        ),
    ],
)
def test_parts_are_given_as_the_template_takes_them(template: str, content: Any, written: str) -> None:
    (*_, last) = told(template, [{"role": "user", "content": content}])
    assert last == ("user", written)


@pytest.mark.parametrize(
    "form",
    [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}],
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
        b'[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]',
        ['{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'],
        [{"from": "user", "content": "a"}, {"role": "assistant", "value": "b", "name": None}],
    ],
)
def test_forms_of_chats(form: Any) -> None:
    assert told(CHATML, form) == told(CHATML, turns("a", "b"))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (None, "empty"),
        ("[]", "empty"),
        ("no JSON", "not a list of messages"),
        ({"role": "user"}, "not a list of messages"),
        (["a"], "a message without a role"),
        ([{"from": None, "value": "a"}], "a message without a role"),
        ([{"role": "user<|im_end|>", "content": "a"}], "a role that holds a control string"),
        ([{"role": "user", "content": 5}], "a message whose content is no text"),
        ([{"role": "user", "content": [["a"]]}], "a message whose content is no text"),
        ("[" * 100_000, "not a list of messages"),
    ],
)
def test_what_is_no_chat_is_counted_by_reason(form: Any, reason: str) -> None:
    assert told(CHATML, form) in (reason, "messages nested too deeply")


@pytest.mark.parametrize("tools", ["{", [1], '"a"'])
def test_tools_that_are_none_are_counted(tools: Any) -> None:
    assert told(CHATML, turns("a"), tools) == "tools that are no list of dictionaries"


@pytest.mark.parametrize("tools", ['[{"name": "t", "x": null}]', ['{"name": "t"}'], [{"name": "t", "x": {"y": None}}]])
def test_tools_in_any_form(tools: Any) -> None:
    (first, *_) = told("{{ tools | tojson }}" + CHATML, turns("a"), tools)
    assert first in [("template", '[{"name": "t"}]'), ("template", '[{"name": "t", "x": {}}]')]


LOOKS_CLOSELY = "{% for m in messages %}{{ m.content | length }}{{ m.content | sort | join }}{% endfor %}"


def test_a_chat_whose_roles_cannot_be_told_is_run_and_says_so() -> None:
    """Nothing of what this template writes can be followed, but the loop's messages; and this one has no loop."""
    assert told(LOOKS_CLOSELY, turns("ba")) == [("user", "2ab")]
    whole = "{{ messages | map(attribute='content') | map('e') | join('; ') | upper | sort | join }}"
    assert told(whole, turns("c", "ba")) == [("unclear", " ;ABC")]
    assert told(whole, turns("c", "ba"), roles_asked=True) == UNCLEAR
    assert told(whole, turns("c", "ba</turn>")) == UNCLEAR  # there is no telling whose the control string is
    assert told(LOOKS_CLOSELY, turns("ba"), markers=False) == [("template", "2"), ("user", "ab")]


def test_two_thousand_messages_take_a_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    renderings: list[None] = []
    render = jinja2.Template.render
    monkeypatch.setattr(jinja2.Template, "render", lambda *a, **k: renderings.append(None) or render(*a, **k))
    chat = turns(*(f"{n % 7} grains, <think>{n}</think>" for n in range(2000)))
    for template in (CHATML, THOUGHTS_LEFT_OUT, SYSTEM_IN_USER):
        parts = told(template, chat)
        assert [role for role, _ in parts if role != "template"] == ["user", "assistant"] * 1000
    assert len(renderings) < 30


def test_a_day_stands_wherever_a_template_asks_for_it() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} {{ now().strftime('%d.%m.') }} {{ date_string }}" + CHATML
    (first, *_) = told(template, turns("a"), day="2025-02-03", names_day=True)
    assert first == ("template", "2025-02-03 03.02. 03 Feb 2025")
    (first, *_) = told("{{ date_string if date_string is defined else 'none' }}" + CHATML, turns("a"), day="2025-02-03")
    assert first == ("template", "none")  # a template's own day stands, unless a person gives one
    (first, *_) = told("{{ strftime_now('%Y-%m-%d') }}" + CHATML, turns("a"))
    assert date.fromisoformat(first[1]) >= date(2025, 1, 1)


def test_only_some_templates_ask_for_the_day() -> None:
    for template, asks in ((CHATML, False), (DEFAULT_BLOCK, True), ("{{ now().year }}", True)):
        assert needs_day(make_tokenizer(template), {}, False) == asks
    by_name = make_tokenizer(
        "{% if not date_string is defined %}{% set date_string = 'old' %}{% endif %}{{ date_string }}"
    )
    assert [needs_day(by_name, {}, given) for given in (False, True)] == [False, True]
    assert needs_day(make_tokenizer({"default": CHATML, "tool_use": DEFAULT_BLOCK}), {}, False)
    assert not needs_day(make_tokenizer("{% for %}"), {}, False)


def test_templates_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="the tokenizer's chat template is no template: "):
        ChatEncoder(make_tokenizer("{% for %}"), None)
    with pytest.raises(InputError, match="does not say which of its chat templates"):
        ChatEncoder(make_tokenizer({"one": CHATML, "two": CHATML}), None)
    assert told({"default": CHATML, "tool_use": CALLS}, turns("a"))[0][0] == "user"


def test_templates_cannot_reach_python() -> None:
    for attempt in ("messages.__class__", "strftime_now.__self__", "dict.__class__", "namespace.__globals__"):
        assert told("{{ " + attempt + " }}" + CHATML, turns("a"))[0][1].startswith("<|im_start|>")
    refused = told("{% set n = namespace(__class__=1) %}" + CHATML, turns("a"))
    assert refused.startswith("the chat template refuses the chat\nTemplateError: a namespace has no name that begins")


def test_an_encoder_is_sent_to_other_processes_after_use_too() -> None:
    encoder = ChatEncoder(make_tokenizer(CHATML), None)
    before = stretches(encoder, turns("a</turn>"))
    assert stretches(pickle.loads(pickle.dumps(encoder)), turns("a</turn>")) == before


FRAGMENTS = [
    *CONTROL,
    "<s>",
    "</s>",
    "a",
    "user",
    "assistant",
    "system",
    "model",
    " ",
    "\n",
    '"',
    "\\",
    "é",
    "\U0001f33e",
]
FRAGMENTS += ["\U000f0000", "\U00100000", "\U0010ffff", "\x85", "{{", "<think>", "</think>", "Day: "]
CONTENTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join).filter(str.strip)
ENCODERS = {
    name: ChatEncoder(make_tokenizer(template), None, markers=False, day="2024-07-26")
    for name, template in (
        ("chatml", CHATML),
        ("eos", EOS_AT_THE_END.replace("m.role == 'user'", "m.role != 'assistant'")),
        ("system in user", SYSTEM_IN_USER),
        ("block", DEFAULT_BLOCK),
        ("default in loop", DEFAULT_IN_LOOP),
    )
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(CONTENTS, min_size=2, max_size=4), system=CONTENTS)
def test_the_tokens_of_a_content_are_that_content(name: str, texts: list[str], system: str) -> None:
    """Whatever it is, and if it is a control string: text that reads as it, and no token of the template's."""
    chat = turns(*texts, system=system)
    parts = stretches(ENCODERS[name], chat)
    expected = [(m["role"], m["content"]) for m in chat]
    trims = name in ("system in user", "block")
    if name == "system in user":
        expected = [expected[0], *((role, text.strip()) for role, text in expected[1:])]
    elif trims:
        expected = [(role, text.strip()) for role, text in expected]
    assert [part for part in parts if part[0] != "template"] == expected
    control = set(ENCODERS[name].tokenizer.all_special_ids) | set(ENCODERS[name].tokenizer.added_tokens_decoder)
    found, plain = (
        ENCODERS[name].encode([[{**m, "content": text or m["content"]} for m in chat]]).tokens.tolist()
        for text in ("", "x")
    )
    assert [t for t in found if t in control] == [t for t in plain if t in control]
