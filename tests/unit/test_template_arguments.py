"""What a chat template may be given: its own variables, and nothing that would be dropped or is given elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import plan, store_of, with_tokenizer, write
from pydantic import ValidationError

from pipeline.errors import InputError
from workers.corpus_settings import CorpusSettings

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
        ("messages", r"messages comes from corpus\.messages: give it there"),
        ("conversation", r"conversation comes from corpus\.messages"),
        ("tools", r"tools comes from corpus\.tools"),
        ("date_string", r"date_string comes from corpus\.chat_date"),
        ("max_length", r"max_length comes from corpus\.context"),
        ("truncation", r"truncation comes from corpus\.context"),
        ("add_special_tokens", r"add_special_tokens comes from corpus\.bos"),
        ("return_assistant_tokens_mask", r"return_assistant_tokens_mask comes from corpus\.roles"),
        ("chat_template", r"save it with one, and name that as model\.tokenizer"),
        ("continue_final_message", "templates do not know it"),
        ("tokenize", "what transformers does with a text that was rendered"),
        ("padding", "leave it out"),
        ("return_dict", "leave it out"),
        ("return_tensors", "leave it out"),
        ("tokenizer_kwargs", "leave it out"),
        ("chat_template_kwargs", "give what it holds as template_arguments itself"),
        ("raise_exception", "what templates have of their own"),
        ("namespace", "what templates have of their own"),
        ("self", "what templates have of their own"),
        ("granary_watch", "what templates have of their own"),
        ("enable-thinking", "no name that a template can ask for"),
        ("", "no name that a template can ask for"),
    ],
)
def test_names_that_are_no_arguments_of_templates(name: str, advice: str) -> None:
    with pytest.raises(ValidationError, match=advice):
        CorpusSettings(path=("x",), messages="m", template_arguments={name: "x"})


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
