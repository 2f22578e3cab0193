"""The check that a spec's tokenizer is the one that a store was planned with: by its digest, else by what it does."""

from typing import Any

from pipeline.errors import InputError
from pipeline.tokens.same_tokenizer import are_same, read_backend
from pipeline.tokens.tokenizer import tokenizer_digest
from storage.store import Store

CONTEXTS = 64
"""Contexts of the store whose texts are tried."""


def check_tokenizer(store: Store, tokenizer: Any, where: str) -> str:
    """Return the digest under which a store knows a tokenizer. Raises InputError unless it gives the ids that the
    store's gave; that it is written down otherwise is no reason. `where`: its folder or name."""
    found, stored = tokenizer_digest(tokenizer), store.info.tokenizer_digest
    if found != stored and not _does_the_same(store, tokenizer.backend_tokenizer):
        raise InputError(
            f"the tokenizer of {where} ({found}) is not the one the store was planned with ({stored}): "
            "token ids would mean other text. Give model.tokenizer the right one, or use another store"
        )
    return stored


def _does_the_same(store: Store, backend: Any) -> bool:
    name = "tokenizer/tokenizer.json"
    if name not in store.info.files:
        return False
    content = store.corpus_file(name).decode()
    try:
        planned_with = read_backend(content)
    except Exception:  # noqa: BLE001 the library raises nothing more precise for a file that it does not know
        return False
    contexts = min(CONTEXTS, store.info.num_contexts)
    tokens = store.context_tokens(0, contexts - 1) if contexts else []
    texts = [planned_with.decode(ids.tolist(), skip_special_tokens=False) for ids in tokens]
    return are_same(planned_with, backend, texts)
