"""What a person may set, one frozen model per section of the spec. Unknown keys are refused.

`jobs.spec.spec` puts these together into the spec file; the stages in this package take the sections they need.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.model.describe import ModelInfo
from pipeline.model.placement import Offload, Placement
from pipeline.sites import Site, parse_site
from workers.cluster.environment import problem_of
from workers.settings.dictionaries import DictionarySettings
from workers.settings.section import Count, Names, Seconds, Seed, Settings, Sites

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
    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer` on the hub; main, if not given. The model's own is at `revision`."""

    @model_validator(mode="after")
    def _revision_of_a_tokenizer(self) -> "ModelSettings":
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError(
                "tokenizer_revision is that of a tokenizer from elsewhere: give its name as tokenizer; the model's own "
                "has the model's revision"
            )
        return self

    def tokenizer_place(self, commit: str) -> tuple[str, str]:
        """The tokenizer's folder or repository, and its revision there. `commit`: the model's."""
        if self.tokenizer is None or (self.tokenizer == self.id and self.tokenizer_revision is None):
            return self.id, commit
        return self.tokenizer, self.tokenizer_revision or "main"


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
    """Rows whose norm at the first dictionary's input is above this many times the median are left out; none, if not
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
    env: Names = ()
    """Names of environment variables whose values, where granary is run, the workers get too."""

    @field_validator("env", mode="before")
    @classmethod
    def _names_alone(cls, env: object) -> object:
        # Before anything else looks at it: a message of pydantic's would show what was given, which may be a value.
        names = [env] if isinstance(env, str) else env
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names of environment variables, and found something else")
        for name in names:
            if problem := problem_of(name):
                raise ValueError(problem)
        return env


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
