"""The strings of a store's tokens, from the tokenizer's file that is kept in it."""

import json
from functools import cached_property

from storage.errors import StorageError, Unreachable
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


class TokenStrings:
    """The strings of tokens. The tokenizer's file is read when one is asked for first, and not again, whatever came
    of it."""

    def __init__(self, table: StoredTable):
        self._table = table

    def get(self, token: int) -> str | None:
        """Return a token's string; None if it has none. Raises StorageError where the file does not tell it."""
        pieces = self._pieces
        if isinstance(pieces, StorageError):
            raise pieces
        return pieces.get(token)

    @cached_property
    def _pieces(self) -> dict[int, str] | StorageError:
        try:
            return {token: piece for piece, token in token_pieces(self._table).items()}
        except Unreachable:  # which ends the command
            raise
        except StorageError as error:
            return error
