"""Why a chat template refuses a chat: its own words are told with the reason, which is counted as one."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan, with_tokenizer, write

from jobs.progress import left_out
from jobs.report.harvest_section import _left_out
from pipeline.corpus.skipped import MOST_LETTERS, Skipped, with_words
from pipeline.errors import InputError
from workers.plan.calls import Cuts

REFUSED = "the chat template refuses the chat"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate,\n\tnot \"' + m.content + '\"') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
GOOD = [{"role": "user", "content": "count the grain"}, {"role": "assistant", "content": "three towns"}]


def bad(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": word}]


@pytest.fixture
def make(tmp_path: Path, llama: Path) -> Any:
    def made(template: str) -> Path:
        return with_tokenizer(
            tmp_path / "model", llama, lambda tokenizer: setattr(tokenizer, "chat_template", template)
        )

    return made


def test_the_words_of_the_first_chat_stand_with_the_count(tmp_path: Path, make: Any) -> None:
    chats = [GOOD, *(bad(f"word {n}") for n in range(40)), GOOD]
    corpus = write(tmp_path / "c.jsonl", [{"messages": chat} for chat in chats])
    cuts = [Cuts(), Cuts(task_bytes=100, bucket_bytes=200), Cuts(bucket_bytes=400)]
    records = [plan(corpus, make(ALTERNATE), c, messages="messages").skipped.to_record() for c in cuts]
    assert records == [records[0]] * 3  # however the corpus is cut
    said = 'Conversation roles must alternate, not "word 0"'
    entry = {"count": 40, "first": [f"c.jsonl:{n}" for n in range(2, 7)], "said": said}
    assert records[0] == {REFUSED: entry}
    assert left_out(REFUSED, entry).startswith(f"40 documents left out: {REFUSED}: {said} (first: c.jsonl:2, ")
    assert f"{REFUSED}: Conversation roles must alternate" in _left_out(records[0])


def test_the_words_are_told_where_nothing_is_left(tmp_path: Path, make: Any) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"messages": bad("a")}])
    with pytest.raises(InputError, match=r"1 for 'the chat template refuses the chat' \(the first: Conversation roles"):
        plan(corpus, make(ALTERNATE), messages="messages")


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        ("{{ messages[0].name + 1 }}", GOOD, "UndefinedError: 'dict object' has no attribute 'name'"),
        ("{{ raise_exception('') }}", GOOD, None),
        ("{{ raise_exception('z' * 1000) }}", GOOD, "z" * MOST_LETTERS + " ..."),
        ("{{ raise_exception('\x1b[31mred\u202e') }}", GOOD, "\ufffd[31mred\ufffd"),
        (
            "{% for m in messages %}{% if m.content is undefined or not m.content %}{{ raise_exception('no content') }}"
            "{% endif %}{{ m.content + 1 }}{% endfor %}",
            [{"role": "assistant", "tool_calls": []}],
            "no content",
        ),  # one form of the chat breaks the template, for another one it has words
        ("{{ messages[0].content | string }}", [{"role": "user", "content": [{"type": "image"}]}], "it writes a list"),
    ],
)
def test_words_of_any_kind(tmp_path: Path, make: Any, template: str, chat: Any, said: str | None) -> None:
    fine = "{% if messages[0].content == 'fine' %}fine{% else %}" + template + "{% endif %}"
    chats = [[{"role": "user", "content": "fine"}], chat]
    corpus = write(tmp_path / "c.jsonl", [{"messages": c} for c in chats])
    entry = plan(corpus, make(fine), messages="messages").skipped.to_record()[REFUSED]
    assert entry["count"] == 1
    assert entry.get("said") is None if said is None else entry["said"].startswith(said)


def test_words_are_those_of_the_first_record_of_all_parts() -> None:
    one, two = Skipped({"a": 1}, {"a": [(7, "x:7")]}, {"a": (7, "late")}), Skipped({"a": 2}, {"a": [(3, "x:3")]})
    three = Skipped({"a": 1}, {"a": [(5, "x:5")]}, {"a": (5, "early")})
    total = {"a": {"count": 4, "first": ["x:3", "x:5", "x:7"], "said": "early"}}
    assert Skipped.sum([one, two, three]).to_record() == Skipped.sum([three, one, two]).to_record() == total
    assert with_words("a", " \n ") == "a"


def test_a_call_with_a_time_that_the_template_cannot_write_is_counted(tmp_path: Path, make: Any) -> None:
    """Such arguments come in Parquet and from `datasets`, and have no form in JSON."""
    call = {"function": {"name": "f", "arguments": {"at": datetime(2026, 1, 2)}}}
    calling = [{"role": "assistant", "content": "one", "tool_calls": [call]}]
    pq.write_table(pa.table({"messages": [GOOD, calling]}), tmp_path / "c.parquet")
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | default('') | tojson }}{% endfor %}"
    record = plan(tmp_path / "c.parquet", make(template), messages="messages").skipped.to_record()
    assert (record[REFUSED]["count"], record[REFUSED]["first"]) == (1, ["c.parquet:1"])
