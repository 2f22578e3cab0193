"""What became a row is told by the plan before there is a store, and by the status and the report after: the same."""

import json
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
from conftest import write_store
from corpora import ensure_rows
from lab import SITE, Lab

from jobs.report.page import report_page
from jobs.spec.spec import load_spec
from jobs.status import found_extreme, status_record, status_text
from jobs.token_rows import token_rows, token_rows_of, token_words
from storage.errors import Unreachable
from storage.store import Store, open_store
from storage.table.token_pieces import TokenStrings

BOS, EOS, PAD = ({"id": i, "string": string} for i, string in enumerate(["<s>", "</s>", "<pad>"]))
TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}{% if enable_thinking %}think{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
)
TEXTS = {"corpus.path": "texts.jsonl", "corpus.labels": []}
IDS = {"corpus.path": "ids.jsonl", "corpus.labels": [], "corpus.tokens": "ids"}
CHATS = {"corpus.path": "chats.jsonl", "corpus.labels": [], "corpus.messages": "messages", "model.id": "chat"}


@pytest.fixture
def told(lab: Lab, chat_model: Callable[[str], Path]) -> Lab:
    """The lab with corpora of every kind, and a model whose tokenizer has a chat template."""
    records: dict[str, Any] = {
        "texts": {"text": "count every town"},
        "ids": {"ids": [5, 6, 1, 7, 8, 2, 9]},
        "chats": {"messages": [{"role": "user", "content": "weigh"}, {"role": "assistant", "content": "the grain"}]},
    }
    for name, record in records.items():
        (lab.folder / f"{name}.jsonl").write_text(3 * (json.dumps(record) + "\n"))
    chat_model(TEMPLATE).rename(lab.folder / "chat")
    return lab


@pytest.mark.parametrize(
    ("changes", "record", "lines"),
    [
        (TEXTS, {}, ["bos: '<s>' (0); specials: text"]),
        ({**TEXTS, "corpus.bos": False}, {"bos": None}, ["bos: none; specials: text"]),
        (
            {**TEXTS, "corpus.specials": "tokens", "corpus.exclude_tokens": ["<pad>", "</s>"]},
            {"specials": "tokens", "exclude_tokens": [EOS, PAD]},
            ["bos: '<s>' (0); specials: tokens; exclude_tokens: '</s>' (1), '<pad>' (2)"],
        ),
        (
            {**IDS, "corpus.separator": "</s>", "corpus.exclude_tokens": 2},
            {"specials": None, "separator": EOS, "exclude_tokens": [PAD]},
            ["bos: '<s>' (0); separator: '</s>' (1); exclude_tokens: '<pad>' (2)"],
        ),
        (
            {**CHATS, "corpus.chat_date": "2026-07-26"},
            {"chats": {"roles": [], "markers": True, "chat_date": "2026-07-26"}},
            ["bos: '<s>' (0); specials: text", "roles: all; markers: true; chat_date: 2026-07-26"],
        ),
        (
            {
                **CHATS,
                "corpus.chat_date": "2026-07-26",
                "corpus.roles": ["assistant", "user"],
                "corpus.markers": False,
                "corpus.template_arguments": {"enable_thinking": False},
            },
            {
                "chats": {
                    "roles": ["assistant", "user"],
                    "markers": False,
                    "template_arguments": {"enable_thinking": False},
                    "chat_date": "2026-07-26",
                }
            },
            [
                "bos: '<s>' (0); specials: text",
                'roles: assistant, user; markers: false; template_arguments: {"enable_thinking": false}; '
                "chat_date: 2026-07-26",
            ],
        ),
    ],
)
def test_plan_status_and_report_say_the_same(
    told: Lab, changes: dict[str, Any], record: dict[str, Any], lines: list[str]
) -> None:
    expected = {"bos": BOS, "specials": "text", "separator": None, "exclude_tokens": [], "chats": None, **record}
    spec = told.spec(changes)
    assert json.loads(told.run("plan", spec, "--json"))["token_rows"] == expected
    planned = told.run("plan", spec)
    loaded = load_spec(spec)
    store, _ = ensure_rows(told.store, loaded.corpus, loaded.model)
    assert json.loads(told.run("status", told.store, "--json"))["token_rows"] == expected
    status, page = told.run("status", told.store), report_page(store, "")
    for name, words in zip(["tokens", "chats"], lines, strict=False):
        assert f"\n{name:<10} {words}\n" in planned
        assert f"\n{name:<9} {words}\n" in status
        assert f"<dt>{name.capitalize()}</dt><dd>{escape(words)}</dd>" in page
    assert ("\nchats " in planned) == ("\nchats " in status) == ("<dt>Chats" in page) == (len(lines) == 2)
    assert json.loads(told.run("plan", spec, "--json"))["token_rows"] == expected  # beside the store too


def test_a_store_from_before_there_was_a_choice(told: Lab) -> None:
    """Its plan does not have the key: control strings were tokens."""
    loaded = load_spec(told.spec({**TEXTS, "corpus.specials": "tokens"}))
    store, _ = ensure_rows(told.store, loaded.corpus, loaded.model)
    assert "specials" not in store.info.plan
    assert "\ntokens    bos: '<s>' (0); specials: tokens" in status_text(status_record(store))


def test_tokens_whose_strings_are_not_known(tmp_path: Path, harvested: Store) -> None:
    """A tokenizer that is damaged, or has no file of the kind, hides no setting."""
    store = open_store(shutil.copytree(harvested.path, tmp_path / "store"))
    (tmp_path / "store" / store.info.folder / "tokenizer" / "tokenizer.json").unlink()
    assert "\ntokens    bos: 0; specials: text" in status_text(status_record(store))
    made_up = write_store(tmp_path / "made-up")  # by `storage` alone
    assert "\ntokens    bos: none; specials: tokens" in status_text(status_record(made_up))


def asked_for(store: Store, fail: bool = False) -> list[str]:
    """What is asked of a store's tokenizer from now on. `fail`: it does not answer."""
    asked = []
    backend: Any = store.root.backend

    def counting(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: str, *arguments: Any) -> Any:
            if str(path).endswith("tokenizer.json"):
                asked.append(name)
                if fail:
                    raise Unreachable(f"{path} did not answer")
            return operation(path, *arguments)

        return call

    for name in ("exists", "read", "open"):
        backend.__dict__[name] = counting(name, getattr(backend, name))
    return asked


@pytest.mark.parametrize(("state", "requests"), [("whole", 2), ("missing", 1), ("damaged", 2)])
def test_the_tokenizer_is_read_once(tmp_path: Path, harvested: Store, state: str, requests: int) -> None:
    store = open_store(shutil.copytree(harvested.path, tmp_path / "store"))
    file = (store.tokenizer_path / "tokenizer.json").path
    if state == "missing":
        file.unlink()
    elif state == "damaged":
        file.write_bytes(b"{}")
    store.info.plan["exclude_tokens"] = list(range(1500))
    asked = asked_for(store)
    record = status_record(store)["token_rows"]
    assert len(asked) == requests
    assert [token["string"] for token in record["exclude_tokens"]][:2] == (
        ["<s>", "</s>"] if state == "whole" else [None, None]
    )


def test_one_reading_is_for_tokens_and_norms(tmp_path: Path, harvested: Store) -> None:
    """Rows of extreme norm are told by the strings of their tokens too."""
    store = open_store(shutil.copytree(harvested.path, tmp_path / "store"))
    asked, strings = asked_for(store), TokenStrings(store)
    token_rows_of(store, strings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.read.extreme_rows.EXTREME", 1.0)  # every row above the median
        assert len(found_extreme(store, [SITE], strings)) == 1
    assert len(asked) == 2


def test_a_store_that_does_not_answer_is_asked_once(tmp_path: Path, harvested: Store) -> None:
    store = open_store(shutil.copytree(harvested.path, tmp_path / "store"))
    store.info.plan["exclude_tokens"] = list(range(1500))
    asked = asked_for(store, fail=True)
    with pytest.raises(Unreachable, match="did not answer"):
        status_record(store)
    assert len(asked) == 1


def test_many_excluded_tokens_are_told_in_part() -> None:
    plan = {"bos": 3, "tokens": "ids", "exclude_tokens": list(range(1000, 2500))}
    record = token_rows(plan, {3: "\n"}.get)
    assert len(record["exclude_tokens"]) == 1500
    words = token_words(record)
    assert words == f"bos: '\\n' (3); exclude_tokens: {', '.join(map(str, range(1000, 1008)))} and 1,492 more"
