"""What is measured, the most important first. Pure: no torch, so that the list costs nothing to read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A Llama by its config."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    unit_tokens: int
    """Positions of a unit: a fraction of a second's work, as pinning its memory and summing its rows take longer. At
    every layer it has half as many."""
    batch_tokens: int = 4096
    """As harvest.batch_tokens has it by default."""


@dataclass(frozen=True)
class HarvestCase:
    """Harvesting units of one shape, beside the forward pass without sites and the matrix products alone."""

    shape: Shape
    sites: int | None
    """Sites at evenly spaced layers, the last one among them; None: one site at every layer."""
    context: int
    """Tokens of each context; where `packed`, most tokens: lengths are then spread evenly up to it."""
    compiled: bool = False
    larger_batches: int = 1
    """How many times the usual positions a batch has."""
    threads: int = 2
    """As harvest.threads_per_worker has it by default."""
    packed: bool = False

    @property
    def batch_tokens(self) -> int:
        return self.shape.batch_tokens * self.larger_batches

    @property
    def unit_tokens(self) -> int:
        return self.shape.unit_tokens // (2 if self.sites is None else 1)

    @property
    def name(self) -> str:
        sites = "every layer" if self.sites is None else f"{self.sites} site{'s' if self.sites > 1 else ''}"
        parts = [f"harvest {self.shape.name}", sites, f"contexts of {'up to ' if self.packed else ''}{self.context}"]
        if self.larger_batches > 1:
            parts.append(f"batches of {self.batch_tokens}")
        if self.threads > type(self).threads:
            parts.append(f"{self.threads} threads")
        return ", ".join([*parts, "compiled" if self.compiled else "eager"])


@dataclass(frozen=True)
class StepCase:
    """A TopK training step, beside the encoder's product alone."""

    d: int
    latents: int
    k: int
    batch_rows: int

    @property
    def name(self) -> str:
        return f"step, d = {self.d}, F = {self.latents}, k = {self.k}, batch {self.batch_rows}"


@dataclass(frozen=True)
class CopyCase:
    """A copy between the host's memory and the card's."""

    to_card: bool
    pinned: bool
    mib: int

    @property
    def name(self) -> str:
        return f"copy {'to' if self.to_card else 'from'} the card, {'pinned' if self.pinned else 'pageable'} memory"


Case = HarvestCase | StepCase | CopyCase


@dataclass(frozen=True)
class Measurement:
    case: Case
    least_s: float
    """With less time left it is not begun: a shorter one may still fit."""
    most_s: float
    """After so long it is given up."""


LLAMA_8B = Shape("8B", 4096, 14336, 32, 32, 8, 128256, unit_tokens=16384)
LLAMA_1B = Shape("1B", 2048, 8192, 16, 32, 8, 128256, unit_tokens=65536)
STEPS = (StepCase(512, 16384, 32, 4096), StepCase(2048, 65536, 64, 8192), StepCase(4096, 131072, 64, 8192))
SITES = (1, 4, None)


def full_plan() -> list[Measurement]:
    """Return what a card is asked, for about six minutes besides the tests."""
    eager = HarvestCase(LLAMA_8B, 1, 1024)
    cases: list[Case] = [
        *copies(mib=1024),
        *of_sites(eager),
        *STEPS,
        *(replace(eager, compiled=True, sites=sites) for sites in (1, 4)),
        *of_sites(replace(eager, context=256)),
        *of_sites(replace(eager, context=8192)),
        *(case for context in (1024, 256, 8192) for case in of_sites(replace(eager, shape=LLAMA_1B, context=context))),
        replace(eager, shape=LLAMA_1B, compiled=True),
        replace(eager, context=8192, compiled=True),
        replace(eager, context=256, compiled=True),
        replace(eager, sites=None, threads=8),
        replace(eager, larger_batches=4),
        replace(eager, packed=True),
        replace(eager, shape=LLAMA_1B, sites=None, compiled=True),
        replace(eager, sites=None, compiled=True),
        *(
            replace(eager, shape=shape, sites=sites, context=context, compiled=True)
            for shape in (LLAMA_1B, LLAMA_8B)
            for context in (1024, 256, 8192)
            for sites in SITES
        ),
    ]
    return [_limited(case) for case in dict.fromkeys(cases)]  # each once, where it stands first


def small_plan() -> list[Measurement]:
    """Return the same in tiny sizes, for a CPU; a single layer is compiled, which takes longer there than all else."""
    shapes = [
        Shape("tiny 8B", 64, 128, 4, 4, 2, 512, unit_tokens=512, batch_tokens=128),
        Shape("tiny 1B", 32, 64, 5, 4, 2, 512, unit_tokens=1024, batch_tokens=128),
    ]
    one_layer = Shape("of one layer", 32, 64, 1, 2, 2, 512, unit_tokens=256, batch_tokens=128)
    tiny = HarvestCase(shapes[0], 1, 64, threads=1)
    cases: list[Case] = [
        *copies(mib=8),
        *(case for context in (64, 16, 256) for case in of_sites(replace(tiny, context=context))),
        *of_sites(replace(tiny, shape=shapes[1])),
        *(StepCase(d, 8 * d, 4, 64) for d in (16, 32, 64)),
        replace(tiny, packed=True),
        replace(tiny, shape=one_layer, compiled=True),
    ]
    return [Measurement(case, 1.0, 120.0) for case in cases]


def copies(mib: int) -> Iterator[CopyCase]:
    for to_card in (True, False):
        for pinned in (True, False):
            yield CopyCase(to_card, pinned, mib)


def of_sites(case: HarvestCase) -> Iterator[HarvestCase]:
    for sites in SITES:
        yield replace(case, sites=sites)


def _limited(case: Case) -> Measurement:
    """Estimates, as no card was there to measure: compiling takes seconds for each layer that differs."""
    if isinstance(case, HarvestCase):
        if case.compiled:
            every_layer = case.sites is None
            return Measurement(case, 60.0 if every_layer else 20.0, 120.0 if every_layer else 75.0)
        return Measurement(case, 15.0 if case.sites is None else 8.0, 60.0)
    if isinstance(case, StepCase):  # its first weights are drawn on the CPU
        return Measurement(case, 10.0 + case.d * case.latents / 3e7, 75.0)
    return Measurement(case, 3.0, 20.0)
