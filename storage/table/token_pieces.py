"""The strings of a store's tokens, from the tokenizer's file that is kept in it."""

import json

from storage.errors import StorageError
from storage.table.table import StoredTable


def token_pieces(table: StoredTable) -> dict[str, int]:
    """Return piece -> token id, as tokenizer.json spells pieces. Raises StorageError for a tokenizer without one."""
    path = table.tokenizer_path / "tokenizer.json"
    if not path.exists():
        raise StorageError(f"the strings of tokens need {path}, which this store's tokenizer does not have")
    tokenizer = json.loads(table.corpus_file("tokenizer/tokenizer.json"))
    vocabulary = tokenizer["model"]["vocab"]
    pieces = dict(vocabulary.items() if isinstance(vocabulary, dict) else ((p[0], i) for i, p in enumerate(vocabulary)))
    return pieces | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
