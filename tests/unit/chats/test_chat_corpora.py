"""Chats from the spec to the store: the day, tools, template arguments and markers, and what a store keeps of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import ensure_rows, plan, read_corpus, write_chats
from pydantic import ValidationError

from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns
from pipeline.errors import InputError
from storage.errors import StoreMismatch
from storage.store import Store
from storage.verify.findings import Fault
from storage.verify.verify import verify
from workers.plan import source
from workers.plan.calls import Cuts
from workers.plan.match import check_settings, table_settings
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

TURN = "{{ '<' + m.role + '>' + m.content + '</s>' }}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
DATED = "{{ bos_token + 'on ' + strftime_now('%d %b %Y') }}" + LOOP
TOOLED = "{% if tools %}{{ 'tools: ' }}{% for t in tools %}{{ t.name + '; ' }}{% endfor %}{% endif %}" + LOOP
THINKING = "{{ 'thinks' if enable_thinking else 'does not' }}" + LOOP
DAYS = ("2026-07-26", "2026-07-27")

CHATS = [
    [{"role": "user", "content": f"{n} grains of {what}"}, {"role": "assistant", "content": f"not {n + 1}"}]
    for n in range(20)
    for what in ("rye", "oats")
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", CHATS)


def made(place: Path, corpus: Path, model: Path, grow: bool = False, **settings: Any) -> tuple[Store, bool]:
    spec = CorpusSettings(path=str(corpus), messages="messages", context=100, rows_per_unit=1024, **settings)
    return ensure_rows(place, spec, ModelSettings(id=str(model)), grow=grow)


def text_of(store: Store) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(store.path / store.info.folder / "tokenizer")
    return str(tokenizer.decode(np.concatenate(store.context_tokens(0, store.info.num_contexts - 1))))


def test_a_store_keeps_its_day(tmp_path: Path, chats: Path, chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run of the next day appends was written on the first day, and is what that day would have given."""
    model = chat_model(DATED)
    monkeypatch.setattr(source, "today", lambda: DAYS[0])
    whole, _ = made(tmp_path / "whole", chats, model)
    store, _ = made(tmp_path / "store", chats, model, rows=300)
    assert store.info.plan["chat_date"] == whole.info.plan["chat_date"] == DAYS[0]
    assert text_of(whole).count("26 Jul 2026") == len(CHATS)

    monkeypatch.setattr(source, "today", lambda: DAYS[1])
    again, is_new = made(tmp_path / "store", chats, model, rows=300)
    assert not is_new
    assert again.info.plan == store.info.plan
    grown, is_new = made(tmp_path / "store", chats, model, grow=True)
    assert is_new
    assert grown.info.plan == whole.info.plan
    assert grown.info.corpus_digest == whole.info.corpus_digest
    fresh, _ = made(tmp_path / "fresh", chats, model)
    assert fresh.info.plan["chat_date"] == DAYS[1]
    assert text_of(fresh).count("27 Jul 2026") == len(CHATS)


def test_a_day_that_the_spec_gives(tmp_path: Path, chats: Path, chat_model: Any) -> None:
    model = chat_model(DATED)
    store, _ = made(tmp_path / "store", chats, model, chat_date=DAYS[0])
    assert "26 Jul 2026" in text_of(store)
    assert not made(tmp_path / "store", chats, model)[1]  # it stands where the spec does not say it any more
    with pytest.raises(
        StoreMismatch, match=r"corpus\.chat_date: '?2026-07-26'? in the store, '?2026-07-27'? in the spec"
    ):
        made(tmp_path / "store", chats, model, chat_date=DAYS[1])
    given = {"path": str(chats), "messages": "messages", "context": 100, "rows_per_unit": 1024}
    check_settings(store, CorpusSettings(**given))
    check_settings(store, CorpusSettings(**given, chat_date=DAYS[0]))
    with pytest.raises(StoreMismatch, match="chat_date"):
        check_settings(store, CorpusSettings(**given, chat_date=DAYS[1]))


def test_stores_without_a_day_go_on(
    tmp_path: Path, chats: Path, chat_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose template asks for none, and those that were made before the day was kept."""
    plain, _ = made(tmp_path / "plain", chats, chat_model(LOOP), chat_date=DAYS[0])
    assert "chat_date" not in plain.info.plan
    assert not made(tmp_path / "plain", chats, chat_model(LOOP), chat_date=DAYS[1])[1]
    model = chat_model(DATED)
    with monkeypatch.context() as before:
        before.setattr(source, "_day", lambda settings, tokenizer: None)
        old, _ = made(tmp_path / "old", chats, model)
        assert "chat_date" not in old.info.plan
    assert not made(tmp_path / "old", chats, model)[1]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_tools_of_each_record_reach_the_template(tmp_path: Path, chat_model: Any, ending: str) -> None:
    tools = [[{"name": "weigh", "x": None}], '[{"name": "count"}, {"name": "carry"}]', None, []]
    if ending == "parquet":
        tools[0] = json.dumps(tools[0])
        tools[3] = ""
        pq.write_table(pa.table({"messages": CHATS[:4], "use": pa.array(tools, pa.string())}), tmp_path / "c.parquet")
    else:
        records = [{"messages": chat, "use": use} for chat, use in zip(CHATS[:4], tools, strict=True)]
        (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path, model = tmp_path / f"c.{ending}", chat_model(TOOLED)
    store, _ = made(tmp_path / "store", path, model, tools="use", roles="template")
    written = text_of(store)
    assert sorted(part.strip() for part in written.split("<s>") if part) == ["tools: count; carry;", "tools: weigh;"]
    assert store.info.plan["tools"] == "use"
    with pytest.raises(StoreMismatch, match="tools"):
        made(tmp_path / "store", path, model, roles="template")
    with pytest.raises(InputError, match=r"corpus\.tools: no(ne of the first 4 chats has| column) 'other'"):
        made(tmp_path / "other", path, model, tools="other")


def test_tools_as_structs_and_as_a_label_too(tmp_path: Path) -> None:
    use = [[{"name": "weigh"}]]
    pq.write_table(pa.table({"messages": CHATS[:1], "use": use, "kind": ["a"]}), tmp_path / "c.parquet")
    corpus = open_corpus(str(tmp_path / "c.parquet"), Columns("messages", "messages", ("kind",), tools="use"))
    (chunk,) = (chunk for piece in corpus.pieces() for chunk in corpus.chunks(piece))
    assert [content.tools for content in chunk.contents] == use
    assert Columns("messages", "messages", ("kind",), tools="kind").names == ("messages", "kind")
    assert read_corpus(tmp_path / "c.parquet", "messages", kind="messages").contents == CHATS[:1]


def test_arguments_reach_the_template_and_belong_to_the_store(tmp_path: Path, chats: Path, chat_model: Any) -> None:
    model = chat_model(THINKING)
    store, _ = made(tmp_path / "store", chats, model, template_arguments={"enable_thinking": True})
    assert text_of(store).count("thinks") == len(CHATS)
    assert store.info.plan["template_arguments"] == {"enable_thinking": True}
    with pytest.raises(StoreMismatch, match="template_arguments"):
        made(tmp_path / "store", chats, model)
    (bucket,) = plan(chats, model, messages="messages", template_arguments={"enable_thinking": False}).buckets
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(bucket.documents.tokens).count("does not") == len(CHATS)


def test_rows_of_contents_alone(tmp_path: Path, chats: Path, chat_model: Any) -> None:
    model = chat_model(LOOP)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def rows(**settings: Any) -> list[str]:
        (bucket,) = plan(chats, model, messages="messages", roles="assistant", context=100, **settings).buckets
        documents = bucket.documents
        stops = np.cumsum(documents.context_lengths)
        parts = zip(np.split(documents.tokens, stops[:-1]), np.split(documents.is_row, stops[:-1]), strict=True)
        return sorted(tokenizer.decode(tokens[is_row]) for tokens, is_row in parts)

    contents = sorted(chat[1]["content"] for chat in CHATS)
    assert rows(markers=False) == contents
    assert rows() == sorted(f"<assistant>{content}</s>" for content in contents)
    store, _ = made(tmp_path / "store", chats, model, markers=False, roles="assistant")
    assert store.info.plan["markers"] is False
    with pytest.raises(StoreMismatch, match="markers"):
        made(tmp_path / "store", chats, model, roles="assistant")
    given = {"path": str(chats), "messages": "messages", "context": 100, "rows_per_unit": 1024, "roles": "assistant"}
    check_settings(store, CorpusSettings(**given, markers=False))
    with pytest.raises(StoreMismatch, match="markers"):
        check_settings(store, CorpusSettings(**given))


def test_defaults_are_no_part_of_a_table() -> None:
    """Stores that were made before these keys were there have none of them."""
    keys = {"markers", "tools", "template_arguments", "chat_date"}
    assert not keys & table_settings(CorpusSettings(path="x", messages="m")).keys()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tools": "t"}, "tools is for chats: give the column that holds them as messages"),
        ({"markers": False, "chat_date": "2026-07-26"}, "markers and chat_date are for chats"),
        ({"messages": "m", "chat_date": "26 July"}, "a day is YYYY-MM-DD, as 2026-07-26, unlike 26 July"),
        ({"messages": "m", "chat_date": 20260726}, "a day is YYYY-MM-DD"),
        ({"messages": "m", "template_arguments": {"tools": []}}, "tools comes from corpus.tools: give it there"),
        (
            {"messages": "m", "template_arguments": {"day": {1, 2}}},
            "day is {1, 2}, and templates are given what JSON has",
        ),
    ],
)
def test_settings_of_chats_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        CorpusSettings(path="x", **settings)


@pytest.mark.parametrize("files", [1, 2])
def test_more_roles_than_a_store_can_number_are_refused(tmp_path: Path, chat_model: Any, files: int) -> None:
    """Also where each call that reads has few."""
    for file in range(files):
        chats = [[{"role": f"speaker {n}", "content": "grain"}] for n in range(130) if n % files == file]
        write_chats(tmp_path / f"{file}.jsonl", chats)
    with pytest.raises(InputError, match="more than 127 roles, as speaker 0, "):
        plan(tmp_path, chat_model(LOOP), Cuts(task_pieces=1), messages="messages")


def test_a_tokenizer_with_several_templates_is_stored_whole(tmp_path: Path, chats: Path, llama: Path) -> None:
    """Each goes into a file of its own, those that have names into a folder; texts have nothing to do with them."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": LOOP, "tool_use": TOOLED}
    tokenizer.save_pretrained(folder)
    store, _ = made(tmp_path / "store", chats, folder, rows=40)
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in store.info.files
    store, grown = made(tmp_path / "store", chats, folder, grow=True, rows=60)
    assert grown
    assert [finding for finding in verify(store.root) if isinstance(finding, Fault)] == []
    assert [str(finding) for finding in verify(store.root) if "not part of the store" in str(finding)] == []
    loaded = transformers.AutoTokenizer.from_pretrained(store.tokenizer_path.path)
    assert loaded.chat_template == tokenizer.chat_template
    template = store.tokenizer_path / "additional_chat_templates" / "tool_use.jinja"
    template.write(template.read() + b" ")
    (fault,) = [finding for finding in verify(store.root) if isinstance(finding, Fault)]
    assert "tool_use.jinja" in str(fault)
