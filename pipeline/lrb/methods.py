"""What the Linear Representation Bench trains: sizes, methods, and the changes that a sweep makes to them.

Methods are recipes: a shape, an activation and terms of the loss, with every number that the paper leaves out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pipeline.checks import refuse, whole
from pipeline.errors import InputError
from pipeline.lrb.data import Bench, Hierarchy
from pipeline.precision import AUTO
from pipeline.sdl.dictionary.activations import Activation, BatchTopK, Gated, JumpReLU, Products, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig, check_training, default_dead_after_rows
from pipeline.sdl.train.objective import Objective

ARMS = ("plain", "anchored", "random")
"""Nothing, the first true features, or as many random directions as anchors."""
TRUTH = "truth"
"""The arm that begins at all true features and is anchored to none: the minimum near Theorem 3.2's configuration."""
LAYOUTS = {"sae": ((0,), (0,)), "transcoder": ((0,), (1,)), "crosscoder": ((0, 1), (0, 1))}
"""Which sources are read and which are written."""


@dataclass(frozen=True)
class Method:
    """A member of the family as the bench trains it."""

    activation: Activation
    objective: Objective = field(default=Objective())
    layout: str = "sae"
    """sae, transcoder or crosscoder (two sources)."""
    tied: bool = False
    decoder_norm: str = "unit"
    clip: float | None = 1.0
    initialisation: Initialisation = field(default=Initialisation(encoder_scale=1.0))
    effort: float = 1.0
    """Times the size's steps."""
    sides: str = "both"
    """Which rows anchors pull: both, encoder or decoder."""
    products: Products = field(default=Products(dense=AUTO))


@dataclass(frozen=True)
class Size:
    """How large a table is: the data, the dictionary and the training."""

    bench: Bench
    latents: int
    steps: int
    batch_rows: int
    learning_rate: float
    k: int
    anchors: int


@dataclass(frozen=True)
class Cell:
    """What is trained."""

    size: Size
    method: str
    arm: str
    seed: int
    """The seed of the data, the first weights and the order of the samples."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the size, its bench, the method or its parts that are set otherwise, for sweeps: ("k", 10). The first
    of these that has such a field takes it; ("initialisation.decoder_norm", 0.1) names the part too."""


def small() -> Size:
    """An eighth of the paper's features: about a minute for each seed of the table on two cores."""
    return Size(Bench(125, 96, 10_000, 0.92, 0.2), 500, 450, 512, 3e-3, 10, 12)


def quarter() -> Size:
    """A quarter of the paper's features, for sweeps: about five minutes for each seed of the table on two cores."""
    return Size(Bench(250, 192, 20_000, 0.96, 0.2), 1000, 600, 1024, 3e-3, 10, 25)


def half() -> Size:
    return Size(Bench(500, 384, 100_000), 8000, 300, 2048, 2e-3, 10, 50)


def full() -> Size:
    """The paper's n, n_p, F, N, S and M."""
    return Size(Bench(), 16_000, 400, 2048, 2e-3, 20, 100)


SIZES = {"small": small, "quarter": quarter, "half": half, "full": full}


def methods(size: Size) -> dict[str, Method]:
    """What the bench can train."""
    k, latents = size.k, size.latents
    prefixes = tuple(latents // divisor for divisor in (16, 8, 4, 2))
    # Half of F latents with unit decoders, each as strong as its projection, would overshoot x F / 2 d times.
    quiet = Initialisation(encoder_scale=min(1.0, 2 * size.bench.width / latents))
    return {
        "relu": Method(ReLU(), Objective(l1=2.0), initialisation=quiet),
        "jumprelu": Method(JumpReLU(2.5, 1.0), Objective(l0=1e-3), effort=2.0),
        "gated": Method(Gated(), Objective(l1=2.0), initialisation=quiet),
        "topk": Method(TopK(k)),
        "batch_topk": Method(BatchTopK(k)),
        "matryoshka": Method(BatchTopK(k), Objective(prefixes=prefixes)),
        "transcoder": Method(TopK(k), layout="transcoder"),
        "crosscoder": Method(BatchTopK(k), layout="crosscoder"),
    }


def described(method: Method) -> str:
    """What a recipe sets otherwise than the library's defaults, in words."""
    usual = Method(method.activation)
    own = {name: value for name, value in vars(method).items() if name not in (*PARTS, "effort")}
    changed = {name: value for name, value in own.items() if value != getattr(usual, name)}
    for part in ("objective", "initialisation"):
        given, default = vars(getattr(method, part)), vars(getattr(usual, part))
        changed |= {name: value for name, value in given.items() if value != default[name]}
    if method.effort != 1:
        changed["steps"] = f"times {method.effort:g}"
    of = {"": method.activation.kind, **vars(method.activation), **changed}
    return ", ".join(f"{name} {f'{v:.3g}' if isinstance(v, float) else v}".strip() for name, v in of.items())


def resolve(cell: Cell) -> tuple[Size, Method]:
    """The size and the method with the cell's changes. Raises InputError for what there is not, or cannot be."""
    if cell.arm not in (*ARMS, TRUTH):
        raise InputError(f"no arm {cell.arm}; there are {', '.join((*ARMS, TRUTH))}")
    left = dict(cell.changes)
    size = _changed(cell.size, left, "size")
    levels = _hierarchy(size.bench.hierarchy, left)
    bench = _changed(replace(size.bench, hierarchy=None), left, "bench")
    size = replace(size, bench=replace(bench, seed=bench.seed + cell.seed, hierarchy=levels))
    known = methods(size)
    if cell.method not in known:
        raise InputError(f"no method {cell.method!r}; there are {', '.join(known)}")
    method = _changed(known[cell.method], left, "method")
    for part in PARTS:
        method = replace(method, **{part: _changed(getattr(method, part), left, part)})
    if left:
        raise InputError(_no_such_change(left, size, method))
    size = replace(size, steps=round(size.steps * method.effort))
    _check(size, method)
    return size, method


PARTS = ("activation", "objective", "initialisation", "products")
T = TypeVar("T")


def _changed(value: T, left: dict[str, Any], part: str) -> T:
    """`value` with the changes that name a field of it, alone or as `part`.field; they are taken out of `left`."""
    mine, can_be_none = {}, {f.name for f in fields(value) if type(None) in get_args(f.type)}  # type: ignore[arg-type]
    for name in _names(value):
        for given in (name, f"{part}.{name}"):
            if given in left:
                mine[name] = _like(getattr(value, name), left.pop(given), given, optional=name in can_be_none)
    return replace(value, **mine) if mine else value  # type: ignore[type-var]


def _hierarchy(levels: Hierarchy | None, left: dict[str, Any]) -> Hierarchy | None:
    """With changes of its fields, each by itself (parents) or together: ("hierarchy", {"parents": 9})."""
    together = left.pop("hierarchy", None)
    if not isinstance(together, dict | None):
        raise InputError(f'hierarchy is a section, as {{"parents": 9}}, or {{}} for its defaults, not {together!r}')
    wanted = dict(together or {})
    for name in _names(Hierarchy()):
        if name in left:
            wanted[name] = left.pop(name)
    if not wanted and together is None:
        return levels
    found = _changed(levels or Hierarchy(), wanted, "hierarchy")
    if wanted:
        raise InputError(f"a hierarchy has {', '.join(_names(found))}, and no {', '.join(wanted)}")
    return found


def _names(value: Any) -> list[str]:
    """Fields that hold a plain value."""
    return [f.name for f in fields(value) if f.name != "hierarchy" and not is_dataclass(getattr(value, f.name))]


def _like(old: Any, new: Any, name: str, *, optional: bool) -> Any:
    """The new value. Raises InputError if it is of another kind than the old one; what was None becomes a number."""
    if new is None and optional:
        return None
    if isinstance(old, bool | str):
        fits = type(new) is type(old)
    elif isinstance(old, tuple):
        fits = isinstance(new, tuple) and all(type(each) is int for each in new)
    else:
        fits = type(new) is int or (type(new) is float and type(old) is not int)
    if not fits:
        kinds = {bool: "true or false", str: "a word", tuple: "a list of numbers", int: "a whole number"}
        raise InputError(f"{name} is {kinds.get(type(old), 'a number')}, not {new!r}")
    return new


def _no_such_change(left: Iterable[str], size: Size, method: Method) -> str:
    values = (size, size.bench, Hierarchy(), method, *(getattr(method, part) for part in PARTS))
    known = list(dict.fromkeys(name for value in values for name in _names(value)))
    near = [close for name in left for close in get_close_matches(name, known, 1)]
    return f"no such thing to change: {', '.join(left)}; " + (
        f"the nearest is {', '.join(near)}" if near else f"there are {', '.join(known)}"
    )


def _check(size: Size, method: Method) -> None:
    """Raise InputError, before anything runs, for what cannot be trained."""
    if method.layout not in LAYOUTS:
        raise InputError(f"layout is one of {', '.join(LAYOUTS)}, not {method.layout!r}")
    if method.sides not in ("both", "encoder", "decoder"):
        raise InputError(f"sides is both, encoder or decoder, not {method.sides!r}")
    refuse(whole(latents=size.latents, steps=size.steps, batch_rows=size.batch_rows, anchors=size.anchors))
    if size.anchors >= min(size.bench.features, size.latents + 1):
        raise InputError(
            f"{size.anchors} anchors are too many for {size.bench.features} features, of which some must be left to "
            f"score, and {size.latents} latents"
        )
    check_training(config_of(size, method), training_of(size, method, 0), None)


def config_of(size: Size, method: Method) -> DictionaryConfig:
    """The shape of the method's dictionary at a size."""
    reads, writes = LAYOUTS[method.layout]
    width = size.bench.width
    return DictionaryConfig(
        tuple(f"source.{i}" for i in reads),
        tuple(f"source.{i}" for i in writes),
        (width,) * len(reads),
        (width,) * len(writes),
        size.latents,
        method.activation,
    )


def training_of(size: Size, method: Method, seed: int) -> TrainingConfig:
    """How it is trained."""
    return TrainingConfig(
        steps=size.steps,
        batch_rows=size.batch_rows,
        learning_rate=size.learning_rate,
        objective=method.objective,
        dead_after_rows=default_dead_after_rows(size.steps * size.batch_rows),
        decoder_norm=method.decoder_norm,
        clip=method.clip,
        tied=method.tied,
        initialisation=Initialisation() if method.tied else method.initialisation,
        products=method.products,
        seed=seed,
    )
