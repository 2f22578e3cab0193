"""What a person may set, one frozen model per section of the spec. Unknown keys are refused.

`jobs.spec` puts these together into the spec file; the stages in this package take the sections they need.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.errors import InputError
from pipeline.models import ModelInfo
from pipeline.placement import Offload, Placement
from pipeline.sites import Site, parse_site
from workers.chat_settings import CHAT_KEYS, Day, TemplateArguments
from workers.dictionary_settings import DictionarySettings
from workers.section import Count, Names, Seconds, Seed, Settings, Sites

RANGE_PATTERN = r"^[0-9]+-[0-9]+$"


class ModelSettings(Settings):
    id: str
    """A Hugging Face folder, or the name of a model on the hub."""
    revision: str = "main"
    """Branch, tag or commit on the hub; a local folder has none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the model computes in."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""


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
    """Columns whose values define subpopulations; each must have a value in every record."""
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
        if self.roles and self.messages is None:
            raise ValueError("roles are those of messages: give the column that holds the chats as messages")
        if self.messages is None and (given := [name for name in CHAT_KEYS if name in self.model_fields_set]):
            raise ValueError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for chats: give the column that holds "
                "them as messages"
            )
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


class OffloadSettings(Settings):
    folder: str
    """A folder on the workers' disks for weights that fit neither their GPUs nor their memory; emptied at the end."""
    cpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Most GiB of weights that a worker holds in CPU memory; what is free there, if not given."""


@dataclass(frozen=True)
class WorkerRange:
    """How many harvesters a run has: it waits for the minimum, and uses what the cluster has up to the maximum."""

    minimum: int
    maximum: int | None
    """None: as many as the cluster has room for."""


class HarvestSettings(Settings):
    sites: Annotated[Sites, Field(min_length=1)]
    """Sites to store, as a list; ranges like mlp_in.4-12 and resid_post.{4,8} are allowed."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """What is stored, for sites that do not say it (as resid_post.8@int8 does)."""
    workers: Count | Literal["auto"] | Annotated[str, Field(pattern=RANGE_PATTERN)] = "auto"
    """Harvester actors: 4 (at most), 2-16, or auto, which fills the cluster as it grows. Never changes the bytes."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """GPUs an actor holds; 0 runs on CPU."""
    threads_per_worker: Count = 2
    """CPU threads an actor computes with. In bfloat16 it can change the last bits, so it belongs to the harvest."""
    batch_tokens: Count = 4096
    """Positions of a forward pass, padding included."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention implementation of transformers."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layers; auto compiles runs long enough to repay it (a function of model and rows)."""
    offload: OffloadSettings | None = None
    """For a model that is larger than the worker's devices: keep what does not fit in CPU memory, then on disk."""

    @field_validator("workers")
    @classmethod
    def _minimum_first(cls, workers: int | str) -> int | str:
        if isinstance(workers, str) and workers != "auto":
            minimum, maximum = map(int, workers.split("-"))
            if not 0 < minimum <= maximum:
                raise ValueError(f"a range of workers has at least 1 and the smaller number first, unlike {workers}")
        return workers

    @property
    def worker_range(self) -> WorkerRange:
        if isinstance(self.workers, int):
            return WorkerRange(1, self.workers)
        if self.workers == "auto":
            return WorkerRange(1, None)
        minimum, maximum = map(int, self.workers.split("-"))
        return WorkerRange(minimum, maximum)

    @model_validator(mode="after")
    def _compile_whole_models(self) -> "HarvestSettings":
        if self.compile is True and not self.placement.is_whole:
            raise ValueError(
                "compile: true needs the model on one device, and with offload or several gpus_per_worker its layers' "
                "weights are moved as they run; set compile: false"
            )
        return self

    @property
    def placement(self) -> Placement:
        """Where a worker's model is. Never changes the bytes (that it rules out compiling does: see compile_layers)."""
        device = "cpu" if self.gpus_per_worker == 0 else "cuda" if self.gpus_per_worker == 1 else "auto"
        if self.offload is None:
            return Placement(device)
        gib = self.offload.cpu_memory_gib
        return Placement(device, Offload(self.offload.folder, None if gib is None else int(gib * 2**30)))

    @model_validator(mode="after")
    def _stored_once(self) -> "HarvestSettings":
        if twice := [site for site in self.sites if f"{site}@{self.dtype}" in self.sites]:
            raise ValueError(
                f"{', '.join(twice)} would be stored as {self.dtype} twice, as {twice[0]} and {twice[0]}@{self.dtype}; "
                "leave one out"
            )
        return self

    def parsed_sites(self) -> list[Site]:
        return [parse_site(site) for site in self.sites]

    def stored_types(self) -> dict[str, str]:
        """Site -> the type it is stored as."""
        return {site: parse_site(site).stored or self.dtype for site in self.sites}


class TrainSettings(Settings):
    rows: Count | None = None
    """Rows to stream, over several epochs if more than the store has; one epoch, if not given."""
    batch_rows: Count = 4096
    seed: Seed = 0
    """Seed of the stream's order and of the weights."""
    max_norm: Annotated[float, Field(ge=1)] | None = None
    """Rows whose norm at the first dictionary's input is above so many times the median are left out; none, if not
    given. 10 leaves out attention sinks."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    threads: Count = 2
    """CPU threads of the trainer."""
    gpus: Literal[0, 1] = 0
    """1 trains on a GPU."""
    dictionaries: Annotated[tuple[DictionarySettings, ...], Field(min_length=1)]

    @property
    def norm_site(self) -> str:
        """The site whose norms `max_norm` is about: the same for all dictionaries, which see the same rows."""
        return self.dictionaries[0].input[0]

    @model_validator(mode="after")
    def _names_differ(self) -> "TrainSettings":
        names = [d.name for d in self.dictionaries]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"dictionaries need different names; {', '.join(twice)} is used twice")
        return self


class EvaluateSettings(Settings):
    rows: Annotated[int, Field(ge=2)] = 65536
    """Most held-out rows to measure reconstruction and AUROC on."""
    contexts: Count = 128
    """Most held-out contexts to measure the recovered loss on."""


class ClusterSettings(Settings):
    address: str = "local"
    """`local` starts Ray on this machine for the run; `auto` uses the cluster this machine belongs to; or host:port."""
    hang_s: Seconds = 120.0
    """A harvester that does not answer, or makes no step, for so long is taken for hung. 10 times the longest time that
    one stood still in the run and went on, if that is more: 120 s is longer than memory pressure or an import."""
    load_s: Seconds = 1800.0
    """The same for a step while the model is loaded and compiled: 140 GB of weights at 100 MB/s."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """After SIGTERM or Ctrl-C, units in flight have so long to finish, and a trainer to write a checkpoint. `ray job
    stop` itself waits 3 s unless the cluster has RAY_JOB_STOP_WAIT_TIME_S."""
    wait_s: Seconds = 1800.0
    """A run ends when the cluster has had no room for the least number of workers for so long."""


COMPILE_FROM_FLOPS = {"cpu": 1e14, "cuda": 1e17}
"""A run of more floating-point operations than this lasts minutes, and a compiler repays its half minute."""


def compile_layers(harvest: HarvestSettings, info: ModelInfo, num_rows: int, layers: int) -> bool:
    """Resolve harvest.compile. It depends on model, rows, device kind and whether the model is in one place, and on
    nothing else, as it changes the last bits."""
    if harvest.compile != "auto":
        return harvest.compile
    if not harvest.placement.is_whole:
        return False
    flops_per_row = 2 * 12 * info.d_model**2 * layers  # 12 d^2 parameters a layer, two operations each
    return num_rows * flops_per_row > COMPILE_FROM_FLOPS["cuda" if harvest.gpus_per_worker else "cpu"]


def check_tokenizer(found: str, stored: str, where: str) -> None:
    """Raise InputError unless two tokenizer digests agree."""
    if found != stored:
        raise InputError(
            f"the tokenizer of {where} ({found}) is not the one the store was planned with ({stored}): "
            "token ids would mean other text. Give model.tokenizer the right one, or use another store"
        )
