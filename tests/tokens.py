"""Copies of the test model with another tokenizer; a plugin of tests/conftest.py."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from corpora import with_tokenizer
from tokenizers import processors


@pytest.fixture(scope="session")
def without_added_bos(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A tokenizer that defines a BOS and does not add it, as SmolLM2's, OLMo's, Granite's and Phi-3's."""

    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    return with_tokenizer(tmp_path_factory.mktemp("no-bos"), llama, change)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Callable[[str | None], Path]:
    """`chat_model(template)` gives a copy of the model whose tokenizer has a chat template."""

    def make(template: str | None) -> Path:
        folder = tmp_path_factory.mktemp("chat") / "llama"
        shutil.copytree(llama, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make
