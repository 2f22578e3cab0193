"""How a dictionary is trained, and what of it does not go together."""

from dataclasses import dataclass, field

import torch

from pipeline.checks import positive, refuse, seeds, shares, whole
from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import BatchTopK, Gated, Products
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.objective import Anchors, Objective

LONG_RUN = 100_000
"""Steps for which the rates in the literature are meant."""


@dataclass(frozen=True)
class Resampling:
    """When dead latents begin anew, and from how many rows (see `pipeline.sdl.train.resampling`)."""

    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the steps at which an event begins."""
    rows: int = 819_200
    """Rows that an event draws from, over several batches; fewer where the next event comes first."""
    encoder_scale: float = 0.2
    """Norm of a new encoder row, in mean norms of the alive ones."""

    def reasons(self) -> list[str]:
        """Why it cannot be so: numbers, and events that are out of order or not within the training."""
        found = [f"resampling.{r}" for r in (*whole(rows=self.rows), *positive(encoder_scale=self.encoder_scale))]
        if not self.at:
            found.append("resampling.at has no event: leave resampling out")
        if list(self.at) != sorted(set(self.at)) or not all(0 <= share < 1 for share in self.at):
            found.append(
                "resampling.at must be shares of the steps, at least 0 and below 1, in ascending order, unlike "
                f"{', '.join(map(str, self.at))}"
            )
        return found

    def steps_left(self, step: int, steps: int, batch_rows: int) -> int | None:
        """Batches of the event under way that are left, this one included; None where there is no event."""
        starts = [int(share * steps) for share in self.at]
        for start, following in zip(starts, [*starts[1:], steps], strict=True):
            length = max(1, min(self.rows // batch_rows, (following - start) // 2))
            if start <= step < start + length:
                return start + length - step
        return None


@dataclass(frozen=True)
class TrainingConfig:
    """How a dictionary is trained. All of it determines the weights."""

    steps: int
    batch_rows: int
    learning_rate: float
    """Peak of Adam's learning rate."""
    objective: Objective = field(default=Objective())
    warmup_share: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which it falls to zero."""
    dead_after_rows: int = 10_000_000
    """Rows after which a latent that was silent on all of them counts as dead."""
    decoder_norm: str = "unit"
    """unit: decoder rows keep norm 1, over all sites together. free: they have any."""
    clip: float | None = 1.0
    """Largest norm of the gradient of all weights together, of a loss that sums the error over dimensions. Gradients
    are larger than 1 almost throughout: Adam's second moments, which remember a thousand steps, then do not hold the
    steep beginning against the rest of a run (docs/decisions/0013)."""
    resampling: Resampling | None = None
    initialisation: Initialisation = field(default=Initialisation())
    tied: bool = False
    """The encoder is the decoder's transpose throughout (where the output is the input)."""
    anchors_first: bool = True
    """Anchored latents begin at their anchors, so that none has to cross the space; else as all others do."""
    products: Products = field(default=Products())
    fused: bool = True
    """Adam in one kernel over all weights; False: one operation after the other."""
    seed: int = 0


def check_training(shape: DictionaryConfig, config: TrainingConfig, anchors: Anchors | None) -> None:
    """Raise InputError where dictionary, objective and anchors do not fit together."""
    refuse(
        [
            *_impossible_numbers(config),
            *config.objective.reasons(shape),
            *config.initialisation.reasons(),
            *([] if config.resampling is None else config.resampling.reasons()),
            *_norm_reasons(shape, config),
            *(_tied_reasons(shape, config) if config.tied else []),
        ]
    )
    if config.resampling is not None:
        refuse(_silence_reasons(config, config.resampling))
    if anchors is not None:
        _check_anchors(shape, anchors)


def _check_anchors(shape: DictionaryConfig, anchors: Anchors) -> None:
    if not anchors.count:
        raise InputError("anchors of neither side: give those of the encoder, of the decoder, or of both")
    if anchors.count > shape.latents:
        raise InputError(f"{anchors.count} anchors do not fit into {shape.latents} latents")
    blocks = shape.blocks()
    for side, of_side, width, columns in (
        ("encoder", anchors.encoder, shape.d_in, [block.reads for block in blocks]),
        ("decoder", anchors.decoder, shape.d_out, [block.writes for block in blocks]),
    ):
        if of_side is None:
            continue
        if of_side.shape != (anchors.count, width):
            raise InputError(
                f"anchors of the {side} must be [{anchors.count}, {width}] for these sites, not {list(of_side.shape)}"
            )
        if not bool(torch.isfinite(of_side).all()):
            raise InputError(f"anchors of the {side} hold nan or infinity")
        zero = torch.stack([(of_side[:, part] == 0).all(1) for part in columns]).any(0).nonzero().flatten()
        if len(zero):
            where = " at the sites of one layer" if len(blocks) > 1 else ""
            raise InputError(
                f"anchor {int(zero[0])} of the {side} is zero{where} ({len(zero)} such), which is no direction"
            )


def _impossible_numbers(config: TrainingConfig) -> list[str]:
    found = [
        *whole(steps=config.steps, batch_rows=config.batch_rows, dead_after_rows=config.dead_after_rows),
        *positive(learning_rate=config.learning_rate, clip=config.clip),
        *shares(warmup=config.warmup_share, decay=config.decay_share),
        *seeds(seed=config.seed),
    ]
    if not found and config.warmup_share + config.decay_share > 1:
        found = [
            f"warmup ({config.warmup_share:g} of the steps) and decay ({config.decay_share:g}) overlap, so that the "
            "rate never gets to its peak: together at most 1"
        ]
    return found


def _norm_reasons(shape: DictionaryConfig, config: TrainingConfig) -> list[str]:
    """Why a dictionary's decoders cannot have such norms."""
    found = []
    if config.decoder_norm not in ("unit", "free"):
        found.append(f"decoder_norm is unit or free, not {config.decoder_norm!r}")
    if config.decoder_norm == "unit" and config.initialisation.decoder_norm != 1:
        found.append("initialisation.decoder_norm other than 1 needs decoder_norm: free")
    if config.decoder_norm == "free" and isinstance(shape.activation, Gated):
        found.append(
            "decoder_norm: free does not go with gated: the penalty is on the gates, whose own reconstruction does not "
            "train decoders, so decoders would shrink and magnitudes grow to evade it; leave it unit"
        )
    if config.initialisation.decoder_norm == 0 and isinstance(shape.activation, BatchTopK):
        found.append(
            "initialisation.decoder_norm 0 does not go with batch_topk: latents compete with their decoders' norms, "
            "and those that get none in the first batches never do; give it 0.1"
        )
    return found


def _tied_reasons(shape: DictionaryConfig, config: TrainingConfig) -> list[str]:
    """Why a dictionary cannot have tied weights."""
    found, initial, usual = [], config.initialisation, Resampling()
    if not shape.is_autoencoder or shape.cross_layer:
        found.append("tied: an encoder can only be its decoder's transpose where the output is the input")
    if initial.encoder != "transposed" or initial.encoder_scale not in (None, 1):
        found.append(
            "tied: the encoder begins as the decoder does, so initialisation.encoder and encoder_scale have no effect: "
            "leave them out"
        )
    if initial.decoder_norm == 0:
        found.append("tied: encoders and decoders of norm 0 have no gradient; give initialisation.decoder_norm another")
    if config.resampling is not None and config.resampling.encoder_scale != usual.encoder_scale:
        found.append(
            "tied: a latent that begins anew has its decoder as encoder, so resampling.encoder_scale has no effect: "
            "leave it out"
        )
    return found


def _silence_reasons(config: TrainingConfig, resampling: Resampling) -> list[str]:
    """Why no event of resampling can find a dead latent."""
    last = int(resampling.at[-1] * config.steps) * config.batch_rows + resampling.rows
    rows = min(last, config.steps * config.batch_rows)
    if config.dead_after_rows < rows:
        return []
    return [
        f"resampling: its last event ends by row {rows:,} and a latent counts as dead after {config.dead_after_rows:,} "
        "silent rows, so that none ever begins anew: lower dead_after_rows, or train longer"
    ]


def default_learning_rate(latents: int, steps: int) -> float:
    """2e-4 / sqrt(latents / 2^14), the scaling rule of Gao et al. 2024, for runs of LONG_RUN steps or more; times
    sqrt(LONG_RUN / steps) for shorter ones, in which weights have to go as far (docs/decisions/0013); at most 0.02."""
    return float(min(0.02, 2e-4 / (latents / 2**14) ** 0.5 * max(1.0, LONG_RUN / steps) ** 0.5))


def default_dead_after_rows(rows: int) -> int:
    """10 M, as in Gao et al. 2024, or 2 % of the rows of a shorter run."""
    return max(1, min(10_000_000, rows // 50))
