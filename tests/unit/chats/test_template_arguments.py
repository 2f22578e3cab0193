"""What a chat template may be given: its own variables, and nothing that would be dropped or is given elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from corpora import ensure_rows, plan, store_of, with_tokenizer, write
from pydantic import ValidationError

import workers.plan.stage
from pipeline.errors import InputError
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

CHATS = [[{"role": "user", "content": "count the grain"}, {"role": "assistant", "content": "three towns"}]]
TEMPLATE = (
    "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if thinking | default(false) %}!{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path, llama: Path) -> Path:
    return with_tokenizer(tmp_path / "model", llama, lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "c.jsonl", [{"messages": chat} for chat in CHATS])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("conversation", r"give it as corpus\.messages"),
        ("max_length", r"give it as corpus\.context"),
        ("truncation", r"give it as corpus\.context"),
        ("add_special_tokens", r"give it as corpus\.bos"),
        ("return_assistant_tokens_mask", r"give it as corpus\.roles"),
        ("chat_template", r"save it with a tokenizer, and name that as model\.tokenizer"),
        ("continue_final_message", "what transformers does with a text that was rendered: leave it out"),
        ("tokenize", "leave it out"),
        ("padding", "leave it out"),
        ("return_dict", "leave it out"),
        ("return_tensors", "leave it out"),
        ("tokenizer_kwargs", "leave it out"),
        ("chat_template_kwargs", "give what it holds as template_arguments itself"),
        ("raise_exception", "what templates have of their own"),
        ("namespace", "what templates have of their own"),
        ("self", "what templates have of their own"),
        ("granary_watch", "what templates have of their own"),
        ("enable-thinking", "does not read 'enable-thinking'"),
        ("", "does not read ''"),
    ],
)
def test_names_that_are_no_arguments_of_templates(chats: Path, model: Path, name: str, advice: str) -> None:
    with pytest.raises(InputError, match=rf"corpus\.template_arguments: .*{advice}"):
        plan(chats, model, messages="messages", template_arguments={"thinking": True, name: "x"})


@pytest.mark.parametrize(
    ("name", "key"), [("messages", "messages"), ("tools", "tools"), ("now", "chat_date"), ("date_string", "chat_date")]
)
def test_names_that_are_given_elsewhere(name: str, key: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name} comes from corpus\.{key}: give it there"):
        CorpusSettings(path=("x",), messages="m", template_arguments={name: "x"})


def test_a_store_that_was_made_with_an_argument_that_is_not_read_goes_on(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"messages": CHATS[0]}] * 9)
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    def ensure(rows: int, grow: bool = False) -> bool:
        given = {"template_arguments": {"padding": True}, "messages": "messages", "context": 64}
        settings = CorpusSettings(path=(str(corpus),), rows=rows, **given)
        model = ModelSettings(id=str(folder))
        return ensure_rows(tmp_path / "store", settings, model, grow=grow)[1]

    with pytest.raises(InputError, match="padding is about what transformers does"):
        ensure(20)
    with monkeypatch.context() as before:
        before.setattr(workers.plan.stage, "check_arguments", lambda tokenizer, arguments: None)
        assert ensure(20)
    assert not ensure(20)
    assert ensure(30, grow=True)


def test_an_argument_that_the_template_does_not_read(chats: Path, model: Path) -> None:
    message = (
        r"corpus\.template_arguments: the tokenizer's chat template does not read 'enable_thinking', so that it would "
        r"change nothing: leave it out, or mend the name; it reads add_generation_prompt, documents, messages, thinking"
    )
    with pytest.raises(InputError, match=message):
        plan(chats, model, messages="messages", template_arguments={"enable_thinking": True})


def test_arguments_that_the_template_reads_reach_it(tmp_path: Path, chats: Path, model: Path) -> None:
    """A turn that is begun is the template's, as nobody has said anything in it."""
    arguments = {"thinking": True, "documents": [{"title": "scales"}], "add_generation_prompt": True}
    store = store_of(tmp_path / "store", chats, model, messages="messages", template_arguments=arguments, context=200)
    rows = store.sql("select role, piece from rows join tokens using (token) order by row").fetchall()
    text = "".join(piece for _, piece in rows).replace("Ġ", " ")
    assert text == "[scales]<user>count the grain!<assistant>three towns!<assistant>"
    end = "".join(piece for role, piece in rows if role == "template").replace("Ġ", " ")
    assert end.endswith("<assistant>")


def test_a_chat_longer_than_a_context_goes_on_in_the_next(tmp_path: Path, model: Path) -> None:
    """As texts do: no token is lost, each context begins with BOS, and roles go on."""
    chat = [{"role": role, "content": "three towns and a field " * 20} for role in ("user", "assistant") * 3]
    corpus = write(tmp_path / "c.jsonl", [{"messages": chat}])
    whole, cut = (store_of(tmp_path / f"store {n}", corpus, model, messages="messages", context=n) for n in (4096, 64))
    assert (whole.info.num_contexts, whole.info.num_documents, cut.info.num_documents) == (1, 1, 1)
    assert cut.info.num_contexts > 10
    for name in ("token", "role"):
        np.testing.assert_array_equal(whole.columns(0, whole.num_rows)[name], cut.columns(0, cut.num_rows)[name])
    bos: set[Any] = {int(tokens[0]) for tokens in cut.context_tokens(0, cut.info.num_contexts - 1)}
    assert len(bos) == 1
    assert cut.info.skipped == {}
