"""What a person may set of a corpus: its columns, what its tokens are, and how they become rows."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workers.settings.chats import CHAT_KEYS, Day, TemplateArguments
from workers.settings.section import Count, Names, Seed, Settings, TokenName, TokenNames


class CorpusSettings(Settings):
    path: Annotated[Names, Field(min_length=1)]
    """A file, a folder of files, a glob pattern, an fsspec URL; with format `datasets`, a dataset's name. Of several,
    each is shuffled by itself, and its rows come after those of the ones before it."""
    format: Literal["auto", "parquet", "jsonl", "text", "saved", "datasets"] = "auto"
    """What the files are; auto tells it from their endings. `saved`: a Hugging Face dataset on disk. `datasets`: one
    that is streamed by its name."""
    subset: str | None = None
    """With format `datasets`: which of the dataset's configurations."""
    split: str = "train"
    """With format `datasets`: which of its splits."""
    text: str | None = None
    """The column that holds the text; `text`, if neither tokens nor messages are given."""
    tokens: str | None = None
    """The column that holds token ids, for a corpus that is tokenised already."""
    messages: str | None = None
    """The column that holds chats, lists of {role, content}; they go through the tokenizer's chat template."""
    roles: Names = ()
    """With messages: the roles whose tokens are rows; all, if not given. All tokens are run."""
    markers: bool = True
    """With messages: whether what a template writes around a message counts with it; if not, its role is template."""
    tools: str | None = None
    """With messages: the column with the tools that a chat may call, for the chat template."""
    template_arguments: TemplateArguments = Field(default_factory=dict)
    """With messages: what the chat template is given besides, as {enable_thinking: false}."""
    chat_date: Day | None = None
    """With messages: the day, YYYY-MM-DD, for chat templates that ask for it; that of planning, if not given."""
    labels: Names = ()
    """Columns whose values define subpopulations; each must have a value in every record. Lists of spans, or of one
    value for each token id, label rows instead of documents."""
    columns: Names = ()
    """Columns kept beside each document without being subpopulations: ids, urls, dates."""
    bos: Literal["auto"] | bool = "auto"
    """True if contexts begin with the tokenizer's BOS; auto does what calling the tokenizer does."""
    specials: Literal["text", "tokens"] = "text"
    """What control strings (<s>, <|endoftext|>) in texts and messages are: the characters they are written in, or the
    tokens that they name."""
    exclude_tokens: TokenNames = ()
    """Tokens, ids or strings, that are run and are no rows."""
    separator: TokenName | None = None
    """With tokens: the token at which a record is cut into documents, itself part of none."""
    context: Annotated[int, Field(gt=1)] = 1024
    """Most tokens of a context, BOS included."""
    rows: Count | None = None
    """Rows to plan; all the corpus has, if not given."""
    seed: Seed = 0
    """Seed of the order of documents."""
    skip_first: Annotated[int, Field(ge=0)] = 1
    """Leading positions of a context that are no rows; 1 leaves out BOS, an attention sink."""
    rows_per_unit: Annotated[int, Field(ge=1024)] | Literal["auto"] = "auto"
    """Rows of a unit of work, a power of two; a worker holds two in memory. auto: 65536, less in a small corpus."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the rows, in whole units at the end, that no dictionary is trained on."""

    @model_validator(mode="after")
    def _one_content(self) -> "CorpusSettings":
        given = [name for name in ("text", "tokens", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a corpus has one column that is run; {' and '.join(given)} are given")
        if self.separator is not None and self.tokens is None:
            raise ValueError("a separator cuts records of token ids: give the column that holds them as tokens")
        if both := sorted({*self.labels}.intersection(self.columns)):
            raise ValueError(f"labels are kept beside documents anyway: leave {', '.join(both)} out of columns")
        if self.roles and self.messages is None:
            raise ValueError("roles are those of messages: give the column that holds the chats as messages")
        defaults = {
            name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()
        }
        given = [name for name in CHAT_KEYS if getattr(self, name) != defaults[name]]
        if self.messages is None and given:
            raise ValueError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for chats: give the column that holds "
                "them as messages"
            )
        if self.format != "datasets" and (self.subset is not None or self.split != "train"):
            raise ValueError("subset and split are those of a dataset by name, format: datasets; files have none")
        if self.format == "datasets" and self.rows is None:
            raise ValueError("a dataset that is streamed has no known end: say how many rows to take from it with rows")
        if self.format == "datasets" and len(self.path) > 1:
            raise ValueError("a dataset that is streamed has no known end: nothing can come after it in path")
        return self

    @property
    def content(self) -> tuple[str, str]:
        """The kind of the column that is run (text, tokens or messages), and its name."""
        if self.messages is not None:
            return "messages", self.messages
        return ("tokens", self.tokens) if self.tokens is not None else ("text", self.text or "text")

    @model_validator(mode="after")
    def _power_of_two(self) -> "CorpusSettings":
        if self.rows_per_unit != "auto" and self.rows_per_unit & (self.rows_per_unit - 1):
            raise ValueError(f"rows_per_unit must be a power of two, not {self.rows_per_unit}")
        return self

    def unit_size(self, num_rows: int) -> int:
        """rows_per_unit resolved: a function of the rows, so that it is the same wherever the spec runs.

        auto gives at least 16 units where units of 1,024 rows do: enough to hold some out and to keep workers busy.
        """
        if self.rows_per_unit != "auto":
            return self.rows_per_unit
        return min(65536, max(1024, 1 << ((num_rows // 16).bit_length() - 1))) if num_rows >= 16 else 1024
