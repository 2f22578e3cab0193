"""Chats: the tokens of the template's rendering, each with the role of its message; what cannot be told is counted."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import plan, store_of, write, write_chats

from pipeline.corpus.documents import Documents
from pipeline.corpus.table_columns import row_column
from pipeline.errors import InputError
from workers.settings.corpus import CorpusSettings

MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SYSTEM_INSIDE = (
    "{% if messages|length == 1 and messages[0].role == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% else %}"
    "<{{ m.role }}>{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}; {% endif %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
"""As Llama 2's: the system message is put into the first user message."""
LAST_ONLY = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}(thinks) {% endif %}{{ m.content }}</s>{% endfor %}"
"""As Qwen 3's: the last message is written otherwise than it will be when another follows."""
LAST_MARKED = LAST_ONLY.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}",
)

CHATS: list[Any] = [
    [{"role": "user", "content": "count the grain"}, {"role": "assistant", "content": "three towns"}],
    [
        {"role": "system", "content": "weigh"},
        {"role": "user", "content": "what was carried"},
        {"role": "assistant", "content": "every field"},
        {"role": "user", "content": "over the river"},
        {"role": "assistant", "content": "in summer café"},
    ],
]


def texts_by_role(documents: Documents, folder: Path, rows_only: bool = False) -> list[list[tuple[str, str]]]:
    """Return the stretches of tokens of one role in each document, as text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    assert documents.roles is not None
    stops = np.cumsum(documents.context_lengths)
    for start, stop in zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True):
        parts: list[tuple[str, list[int]]] = []
        for at in range(start, stop):
            if rows_only and not documents.is_row[at]:
                continue
            role = documents.role_names[documents.roles[at]]
            if not parts or parts[-1][0] != role:
                parts.append((role, []))
            parts[-1][1].append(int(documents.tokens[at]))
        found.append([(role, tokenizer.decode(ids)) for role, ids in parts])
    return sorted(found)


PLAIN_PARTS = [
    [("system", "<s><system>\nweigh</s>\n"), ("user", "<user>\nwhat was carried</s>\n"),
     ("assistant", "<assistant>\nevery field</s>\n"), ("user", "<user>\nover the river</s>\n"),
     ("assistant", "<assistant>\nin summer café</s>\n")],
    [("user", "<s><user>\ncount the grain</s>\n"), ("assistant", "<assistant>\nthree towns</s>\n")],
]  # fmt: skip


MARKED_PARTS = [
    [("system", "<s><system>\nweigh</s>\n"), ("user", "<user>\nwhat was carried</s>\n"),
     ("template", "<assistant>\n"), ("assistant", "every field"), ("template", "</s>\n"),
     ("user", "<user>\nover the river</s>\n"),
     ("template", "<assistant>\n"), ("assistant", "in summer café"), ("template", "</s>\n")],
    [("user", "<s><user>\ncount the grain</s>\n"),
     ("template", "<assistant>\n"), ("assistant", "three towns"), ("template", "</s>\n")],
]  # fmt: skip
"""Where a template says what the assistant wrote, its markers are not the assistant's."""


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_roles_are_those_of_the_messages(tmp_path: Path, chat_model: Any, template: str) -> None:
    folder = chat_model(template)
    table = plan(write_chats(tmp_path / "c.jsonl", CHATS), folder, messages="messages", context=200)
    (bucket,) = table.buckets
    parts = PLAIN_PARTS if template == PLAIN else MARKED_PARTS
    assert table.role_names == sorted({role for chat in parts for role, _ in chat})
    assert texts_by_role(bucket.documents, folder) == parts  # and BOS is there once
    assert bucket.documents.sizes.rows == bucket.documents.sizes.context_tokens - 2


def test_the_table_of_roles_in_the_documentation(tmp_path: Path, chat_model: Any) -> None:
    """docs/spec.md shows what is written for a chat and whose each part is; Qwen2.5's template is written alike."""
    text = (Path(__file__).parents[3] / "docs" / "spec.md").read_text()
    table = text.partition("with `markers: false` |\n|---|---|---|\n")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    shown = [(c[0].strip("`").replace("\\|", "|").replace("⏎", "\n"), c[1], c[2]) for c in lines]
    assert len(shown) == 7
    start, end = "<|im_start|>", "<|im_end|>\n"
    loop = "{% for m in messages %}{{ '" + start + "' + m.role + '\n' + m.content + '" + end + "' }}{% endfor %}"
    folder = chat_model(shown[0][0] + loop)
    (record,) = re.findall(r'^{"messages": .*$', text, re.MULTILINE)
    for markers, column in ((True, 1), (False, 2)):
        (bucket,) = plan(
            write(tmp_path / "c.jsonl", [json.loads(record)]), folder, messages="messages", context=200, markers=markers
        ).buckets
        expected = [
            (role, "".join(parts[0] for parts in group)) for role, group in groupby(shown, key=lambda s: s[column])
        ]
        ((first, *rest),) = texts_by_role(bucket.documents, folder)
        assert [(first[0], first[1].removeprefix("<s>")), *rest] == expected


def test_chats_in_parquet_are_those_in_json_lines(tmp_path: Path, chat_model: Any) -> None:
    folder = chat_model(PLAIN)
    chats = [[*CHATS[0], {"role": "tool", "content": "5", "name": "scales"}], CHATS[1]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "c.parquet")
    write_chats(tmp_path / "c.jsonl", chats)
    (one,), (two,) = (plan(tmp_path / f"c.{e}", folder, messages="messages").buckets for e in ("parquet", "jsonl"))
    assert texts_by_role(one.documents, folder) == texts_by_role(two.documents, folder)


def test_every_form_that_holds_a_chat_gives_the_same_rows(tmp_path: Path, chat_model: Any) -> None:
    """JSON of the whole, of each message, and a list for each key; also JSON that is no chat, nested too deeply."""
    folder, chat = chat_model(PLAIN), CHATS[1]
    by_key = {key: [message[key] for message in chat] for key in ("role", "content")}
    held = [chat, json.dumps(chat), [json.dumps(message) for message in chat], by_key, json.dumps(by_key)]
    broken = ["5", "null", json.dumps({"role": ["user"], "content": []}), "[" * 100_000]
    table = plan(write_chats(tmp_path / "c.jsonl", [*held, *broken]), folder, messages="messages", context=200)
    (bucket,) = table.buckets
    assert texts_by_role(bucket.documents, folder) == PLAIN_PARTS[:1] * len(held)
    assert {reason: entry["count"] for reason, entry in table.skipped.to_record().items()} == {
        "empty": 1,
        "messages nested too deeply": 1,
        "not a list of messages": 2,
    }


def test_only_rows_of_the_roles_asked_for_and_all_positions_run(tmp_path: Path, chat_model: Any) -> None:
    folder = chat_model(PLAIN)
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    every, some = (
        store_of(tmp_path / name, path, folder, messages="messages", context=200, roles=roles)
        for name, roles in (("every", ()), ("some", ("assistant",)))
    )
    assert some.info.roles == every.info.roles == ["assistant", "system", "user"]
    role = every.columns(0, every.num_rows)["role"]
    kept = np.flatnonzero(role == 0)
    assert 0 < len(kept) < len(role)
    for name, values in some.columns(0, some.num_rows).items():
        np.testing.assert_array_equal(values, every.columns(0, every.num_rows)[name][kept], err_msg=name)
    for ours, whole in zip(some.context_tokens(0, 1), every.context_tokens(0, 1), strict=True):
        np.testing.assert_array_equal(ours, whole[: len(ours)])
        assert ours[0] == 0  # what stands before the assistant is run with it
    counts = some.sql("select role, count(*) as n from rows group by 1").fetchall()
    assert counts == [("assistant", some.num_rows)]


def test_chats_without_rows_of_those_roles_are_counted(tmp_path: Path, chat_model: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    table = plan(path, chat_model(PLAIN), messages="messages", roles="system")
    assert table.skipped.to_record() == {"no row of the roles asked for": {"count": 1, "first": ["c.jsonl:1"]}}
    with pytest.raises(
        InputError,
        match=r"records are left out, 2 for 'no row of the roles asked for'; corpus\.roles asks "
        "for wizard and its messages are of assistant, system, user ",
    ):
        plan(path, chat_model(PLAIN), messages="messages", roles="wizard")


def test_a_message_that_the_template_puts_into_another_keeps_its_role(tmp_path: Path, chat_model: Any) -> None:
    folder = chat_model(SYSTEM_INSIDE)
    (bucket,) = plan(write_chats(tmp_path / "c.jsonl", CHATS), folder, messages="messages", context=200).buckets
    assert texts_by_role(bucket.documents, folder)[0][:4] == [
        ("user", "<s><user>"),
        ("system", "weigh"),
        ("user", "; what was carried</s>"),
        ("assistant", "<assistant>every field</s>"),
    ]


def test_a_template_may_write_a_message_otherwise_when_another_follows(tmp_path: Path, chat_model: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    folder = chat_model(LAST_MARKED)
    (bucket,) = plan(path, folder, messages="messages", roles="assistant", context=200).buckets
    assert texts_by_role(bucket.documents, folder, rows_only=True) == [
        [("assistant", " three towns")],
        [("assistant", "every fieldin summer café")],
    ]
    (bucket,) = plan(path, chat_model(LAST_ONLY), messages="messages", roles="assistant", context=200).buckets
    assert texts_by_role(bucket.documents, folder, rows_only=True) == [
        [("assistant", "<assistant>(thinks) three towns</s>")],
        [("assistant", "<assistant>every field</s><assistant>(thinks) in summer café</s>")],
    ]


def test_chats_that_cannot_be_used_are_counted(tmp_path: Path, chat_model: Any) -> None:
    refusing = PLAIN + "{% if messages[0].content == 'x' %}{{ raise_exception('no') }}{% endif %}"
    chats = [CHATS[0], [], None, "hello", [{"content": "no role"}], [{"role": None, "content": "x"}]]
    chats += [[*CHATS[0], "not a message"], [{"role": "user", "content": "x"}]]
    table = plan(write_chats(tmp_path / "c.jsonl", chats), chat_model(refusing), messages="messages")
    assert table.skipped.to_record() == {
        "a message without a role": {"count": 3, "first": ["c.jsonl:5", "c.jsonl:6", "c.jsonl:7"]},
        "empty": {"count": 2, "first": ["c.jsonl:2", "c.jsonl:3"]},
        "not a list of messages": {"count": 1, "first": ["c.jsonl:4"]},
        "the chat template refuses the chat": {"count": 1, "first": ["c.jsonl:8"], "said": "no"},
    }


@pytest.mark.parametrize("template", [PLAIN, LAST_MARKED])
def test_chats_with_half_a_surrogate_pair_are_counted(tmp_path: Path, chat_model: Any, template: str) -> None:
    user, assistant = CHATS[0]
    chats = [CHATS[0], [{**user, "content": "hi \ud800 there"}, assistant], [user, {**assistant, "role": "\ud800"}]]
    table = plan(write_chats(tmp_path / "c.jsonl", chats), chat_model(template), messages="messages")
    assert table.skipped.to_record() == {"undecodable": {"count": 2, "first": ["c.jsonl:2", "c.jsonl:3"]}}


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(InputError, match=r"corpus\.messages: the tokenizer has no chat template"):
        plan(write_chats(tmp_path / "c.jsonl", CHATS), llama, messages="messages")


def test_roles_are_cut_with_their_contexts(tmp_path: Path, chat_model: Any) -> None:
    """Chats longer than a context: every token keeps the role it has in the whole chat."""
    folder = chat_model(PLAIN)
    path = write_chats(tmp_path / "c.jsonl", CHATS)
    (whole,), (cut,) = (plan(path, folder, messages="messages", context=n).buckets for n in (300, 9))
    before = whole.sizes.__class__(0, 0, 0, 0)
    for name in ("token", "role", "document"):
        one, two = (row_column(bucket.documents, name, before) for bucket in (whole, cut))
        np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"roles": "assistant"}, "roles are those of messages"),
        ({"text": "a", "messages": "b"}, "text and messages are given"),
        ({"format": "datasets"}, "say how many rows to take"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CorpusSettings(path="x", **settings)
