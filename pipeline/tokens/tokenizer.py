"""Tokenizers: finding and loading one, which tokens it puts around a text, and its token ids of texts."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import transformers

from pipeline.checkpoints.absent import why_absent
from pipeline.checkpoints.downloads import page_or_pointer, stand_in
from pipeline.checkpoints.hub import file_here, local_folder, offline_folder, resolve_commit
from pipeline.checkpoints.repository_names import check_name
from pipeline.errors import InputError
from pipeline.model.describe import first_line
from pipeline.tokens import long_texts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
"""One of them is in every repository that a tokenizer can be loaded from."""
READ_FILES = (
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)
"""What a tokenizer may be read from."""
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ADVICE = "give model.tokenizer a folder that has one"


def pin_tokenizer(model_id: str, revision: str = "main") -> str:
    """The commit of a tokenizer on the hub; of what cannot be found `revision` itself, with which loading says why."""
    with suppress(OSError, ValueError):
        return resolve_commit(model_id, revision, TOKENIZER_FILES)
    return revision


def load_tokenizer(model_id: str, revision: str = "main") -> Any:
    """Load a fast tokenizer, local folder or hub id. Raises InputError when there is none."""
    if local_folder(model_id) is None and not model_id.startswith((".", "~", "/")):
        check_name(model_id, "model.tokenizer", "model.tokenizer_revision")
    commit = pin_tokenizer(model_id, revision)
    source = offline_folder(model_id, commit, "tokenizer.json") or model_id
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=commit, use_fast=True)
    except Exception as error:  # noqa: BLE001 the tokenizers library raises nothing more precise
        raise InputError(f"no tokenizer at {model_id}: {_why_none(model_id, commit, error)}") from None
    if (why := _junk(model_id, commit, SETTINGS_FILES)) is not None:  # a server's JSON is read as settings
        raise InputError(f"no tokenizer at {model_id}: {why}")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer of {model_id} has no fast version (tokenizer.json); convert it first")
    # Saved with some tokenizers, and applied in silence: texts would be cut, and padding would become rows.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):  # of training: other ids at each call
        tokenizer.backend_tokenizer.model.dropout = None
    return tokenizer


def _why_none(model_id: str, commit: str, error: Exception) -> str:
    """Why no tokenizer could be loaded, and what to do."""
    folder = local_folder(model_id)
    if (why := _junk(model_id, commit, READ_FILES)) is not None:
        return why
    if folder is not None and not (folder / "tokenizer.json").is_file():
        return f"the folder has no tokenizer.json; {ADVICE}"
    if folder is None and model_id.startswith((".", "~", "/")):
        return f"there is no such folder; {ADVICE}"
    if folder is None and (why := why_absent(model_id, commit, ["tokenizer.json"], error)) is not None:
        return why
    return f"it cannot be loaded ({type(error).__name__}: {first_line(error)}); {ADVICE}"


def _junk(model_id: str, commit: str, names: Sequence[str]) -> str | None:
    """What is in the place of the first of some files that is none of a tokenizer; None if all may be."""
    for name in names:
        if (file := file_here(model_id, commit, name)) is not None and (why := stand_in(file)) is not None:
            return f"its {name} {why}"
    return None


def check_chat_template(tokenizer: Any, where: str) -> None:
    """Raise InputError for a chat template that was not downloaded: what stands in its file is read as a template."""
    found = tokenizer.chat_template or {}
    for template in found.values() if isinstance(found, dict) else [found]:
        if (why := page_or_pointer(template, where)) is not None:
            raise InputError(f"corpus.messages: the chat template of {where} {why}")


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a tokenizer does: vocabulary, merges, rules, BOS."""
    return hashlib.sha256(f"{tokenizer.bos_token_id}|{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()[:16]


def leading_token(tokenizer: Any) -> int | None:
    """The token that calling a tokenizer puts in front of every text: its BOS, or None where it adds none.

    Many tokenizers define a BOS and do not add it (SmolLM2, OLMo, Granite, Phi-3). Raises InputError where several
    tokens are added, as a context begins with one.
    """
    encoding = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    before = next((i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added), 0)
    if before > 1:
        added = " ".join(encoding.tokens[:before])
        raise InputError(
            f"corpus.bos: the tokenizer begins texts with {before} tokens ({added}), and a context begins with one at "
            "most; give corpus.bos: true (its BOS) or false"
        )
    return encoding.ids[0] if before else None


def context_token(tokenizer: Any, bos: str | bool) -> int | None:
    """The token that contexts begin with, by `corpus.bos`: auto (`leading_token`), true (BOS) or false (none).

    Raises InputError where a BOS is asked for that the tokenizer does not have."""
    if bos == "auto":
        return leading_token(tokenizer)
    if bos and tokenizer.bos_token_id is None:
        raise InputError("corpus.bos: the tokenizer has no BOS; leave the key out, or give corpus.bos: false")
    return int(tokenizer.bos_token_id) if bos else None


def vocabulary_token(tokenizer: Any, given: int | str, key: str) -> int:
    """The id of a token that a spec names by its id, or by its string. Raises InputError where there is none."""
    if isinstance(given, int):
        if not 0 <= given < len(tokenizer):
            raise InputError(f"{key}: the tokenizer has no token {given}; its ids are 0 to {len(tokenizer) - 1}")
        return given
    if (found := tokenizer.get_vocab().get(given)) is not None:
        return int(found)
    ids = tokenizer.backend_tokenizer.encode(given, add_special_tokens=False).ids
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    parts = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
    raise InputError(f"{key}: {given!r} is no single token but {parts}; give a token of the vocabulary, or its id")


def control_ids(tokenizer: Any) -> list[int]:
    """The ids of special tokens, but for the one of what is unknown, which texts give.

    Where they are in the vocabulary itself, as SentencePiece's Unigram writes them, a text may give them even when it
    is read as text."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return [i for i, token in added.items() if token.special and i != tokenizer.unk_token_id]


@contextmanager
def special_tokens_as(tokenizer: Any, specials: str) -> Iterator[None]:
    """Within the block, the tokenizer reads its special tokens' strings in a text as `text` or as `tokens`."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = specials == "text"
    try:
        yield
    finally:
        backend.encode_special_tokens = before


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens, in parallel in the tokenizer's own threads."""
    # Straight to the Rust tokenizer: the wrapper warns of texts longer than a context, which we cut ourselves.
    return long_texts.encode(tokenizer.backend_tokenizer, texts)
