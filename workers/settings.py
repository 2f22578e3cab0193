"""What a person may set, one frozen model per section of the spec. Unknown keys are refused.

`jobs.spec` puts these together into the spec file; the stages in this package take the sections they need.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.errors import InputError
from pipeline.models import ModelInfo
from pipeline.sites import Site, expand_sites, parse_site


class Settings(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_sites(value: Any) -> Any:
    value = _as_list(value)
    return expand_sites(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Sites = Annotated[tuple[str, ...], BeforeValidator(_as_sites)]
Count = Annotated[int, Field(gt=0)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


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
    path: str
    """A Parquet file, a folder of them, or a glob pattern."""
    text: str = "text"
    """The column that holds the text."""
    labels: Names = ()
    """Columns whose values define subpopulations; each must have a value in every record."""
    context: Annotated[int, Field(gt=1)] = 1024
    """Most tokens of a context, BOS included."""
    rows: Count | None = None
    """Rows to plan; all the corpus has, if not given."""
    seed: int = 0
    """Seed of the order of documents."""
    skip_first: Annotated[int, Field(ge=0)] = 1
    """Leading positions of a context that are no rows; 1 leaves out BOS, an attention sink."""
    rows_per_unit: Annotated[int, Field(ge=1024)] | Literal["auto"] = "auto"
    """Rows of a unit of work, a power of two; a worker holds two in memory. auto: 65536, less in a small corpus."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the rows, in whole units at the end, that no dictionary is trained on."""

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


class HarvestSettings(Settings):
    sites: Annotated[Sites, Field(min_length=1)]
    """Sites to store, as a list; ranges like mlp_in.4-12 and resid_post.{4,8} are allowed."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What is stored."""
    workers: Count | Literal["auto"] = "auto"
    """Harvester actors; auto fills the cluster. Never changes the bytes."""
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

    def parsed_sites(self) -> list[Site]:
        return [parse_site(site) for site in self.sites]


class AnchorSettings(Settings):
    name: Name
    by: Names
    """Label columns; each value with enough rows becomes an anchor."""
    min_rows: Count = 1000
    """Values with fewer training rows give no anchor: their mean would be noise."""


class ActivationSettings(Settings):
    kind: Literal["topk"] = "topk"
    k: Count = 32


class DictionarySettings(Settings):
    name: Name
    input: Annotated[Sites, Field(min_length=1, max_length=1)]
    """The site that is encoded."""
    output: Annotated[Sites, Field(max_length=1)] = ()
    """The site that is reconstructed; the input's own, if not given."""
    latents: Count
    activation: ActivationSettings = ActivationSettings()
    anchors: str | None = None
    """The name of an anchor set; the first latents are pulled toward its vectors."""
    anchor_weight: Annotated[float, Field(ge=0)] = 0.1
    """lambda_a."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """2e-4 / sqrt(latents / 2^14), if not given."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.output or self.input


class TrainSettings(Settings):
    rows: Count | None = None
    """Rows to stream, over several epochs if more than the store has; one epoch, if not given."""
    batch_rows: Count = 4096
    seed: int = 0
    """Seed of the stream's order and of the weights."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    threads: Count = 2
    """CPU threads of the trainer."""
    gpus: Literal[0, 1] = 0
    """1 trains on a GPU."""
    dictionaries: Annotated[tuple[DictionarySettings, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> "TrainSettings":
        names = [d.name for d in self.dictionaries]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"dictionaries need different names; {', '.join(twice)} is used twice")
        return self


class EvaluateSettings(Settings):
    rows: Count = 65536
    """Most held-out rows to measure reconstruction and AUROC on."""
    contexts: Count = 128
    """Most held-out contexts to measure the recovered loss on."""


class ClusterSettings(Settings):
    address: str = "local"
    """`local` starts Ray on this machine for the run; `auto` uses the cluster this machine belongs to; or host:port."""


COMPILE_FROM_FLOPS = {"cpu": 1e14, "cuda": 1e17}
"""A run of more floating-point operations than this lasts minutes, and a compiler repays its half minute."""


def compile_layers(harvest: HarvestSettings, info: ModelInfo, num_rows: int, layers: int) -> bool:
    """Resolve harvest.compile. It depends on model, rows and device kind alone, as it changes the last bits."""
    if harvest.compile != "auto":
        return harvest.compile
    flops_per_row = 2 * 12 * info.d_model**2 * layers  # 12 d^2 parameters a layer, two operations each
    return num_rows * flops_per_row > COMPILE_FROM_FLOPS["cuda" if harvest.gpus_per_worker else "cpu"]


def check_tokenizer(found: str, stored: str, where: str) -> None:
    """Raise InputError unless two tokenizer digests agree."""
    if found != stored:
        raise InputError(
            f"the tokenizer of {where} ({found}) is not the one the store was planned with ({stored}): "
            "token ids would mean other text. Give model.tokenizer the right one, or use another store"
        )
