"""What a person may set of a dictionary: `train.dictionaries[]` of the spec, and the values of `pipeline.sdl` it means.

Sections mirror the frozen values of `pipeline.sdl`, which say what each field does; a test holds their defaults equal.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import Activation, BatchTopK, Gated, JumpReLU, Products, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import (
    Resampling,
    TrainingConfig,
    check_training,
    default_dead_after_rows,
    default_learning_rate,
)
from pipeline.sdl.train.objective import SPARSITY, Objective
from pipeline.sites import expand_sites, parse_site
from storage.format.site_refs import SiteRef
from workers.settings.section import Count, Name, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


def _as_qualified_sites(value: Any) -> Any:
    """Sites with ranges, each perhaps of a named model: `<model>/resid_post.{4,8}`."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return value
    expanded = []
    for text in value:
        ref = SiteRef.parse(text)
        expanded += [str(SiteRef(site, ref.model)) for site in expand_sites([ref.site])]
    return expanded


QualifiedSites = Annotated[tuple[str, ...], BeforeValidator(_as_qualified_sites)]


class ActivationSettings(Settings):
    kind: Literal["topk", "batch_topk", "relu", "jumprelu", "gated"] = "topk"
    k: Count | None = None
    """With topk and batch_topk: latents active on a row, or on average; 32, if not given."""
    threshold: Weight | None = None
    """With jumprelu: initial threshold."""
    bandwidth: Positive | None = None
    """With jumprelu: width around the threshold in which it learns."""

    @model_validator(mode="after")
    def _fitting(self) -> "ActivationSettings":
        takes = {"topk": {"k"}, "batch_topk": {"k"}, "jumprelu": {"threshold", "bandwidth"}}.get(self.kind, set())
        if surplus := sorted({n for n in ("k", "threshold", "bandwidth") if getattr(self, n) is not None} - takes):
            raise ValueError(f"{self.kind} has no {' and no '.join(surplus)}")
        return self

    def activation(self) -> Activation:
        if self.kind in ("topk", "batch_topk"):
            return (TopK if self.kind == "topk" else BatchTopK)(self.k or 32)
        if self.kind == "jumprelu":
            given = {n: v for n in ("threshold", "bandwidth") if (v := getattr(self, n)) is not None}
            return JumpReLU(**given)
        return ReLU() if self.kind == "relu" else Gated()


DETAILS: dict[str, tuple[str, ...]] = {
    "tanh_scale": ("tanh",),
    "p_end": ("p_norm",),
    "p_start": ("p_norm",),
    "sparsity_warmup": SPARSITY,
    "auxk_k": ("auxk",),
}
"""Settings of terms of the loss, and the terms."""


class LossSettings(Settings):
    """Weights of the terms of the loss beside the reconstruction; see pipeline.sdl.train.objective."""

    l1: Weight = 0.0
    l0: Weight = 0.0
    l0_target: Positive | None = None
    tanh: Weight = 0.0
    tanh_scale: Positive = 4.0
    p_norm: Weight = 0.0
    p_end: PositiveShare = 0.2
    p_start: Share = 0.5
    sparsity_warmup: Share = 0.05
    auxk: Weight = 1 / 32
    auxk_k: Count | None = None
    preactivation: Weight = 0.0
    prefixes: tuple[Count, ...] = ()

    def without_effect(self) -> list[str]:
        """Details of terms that have no weight."""
        return [
            f"loss.{detail} has no effect without loss.{' or '.join(terms)}: give that a weight, or leave this out"
            for detail, terms in DETAILS.items()
            if not any(getattr(self, term) for term in terms)
            and getattr(self, detail) != type(self).model_fields[detail].default
        ]


class AnchoringSettings(Settings):
    name: Name
    """The anchor set."""
    weight: Weight = 0.1
    """lambda_a (arXiv 2512.05534)."""
    distance: Literal["squared", "cosine"] = "squared"
    end: PositiveShare | None = None
    """Share of the steps after which the weight has fallen to zero; constant, if not given."""
    sides: Literal["both", "encoder", "decoder"] = "both"
    control: Literal["none", "random", "shuffled"] = "none"
    """random: as many random directions instead; shuffled: the anchors with their coordinates permuted."""
    first: bool = True
    """Anchored latents begin at their anchors."""

    def sites(self, config: DictionaryConfig) -> tuple[str, ...]:
        """The sites whose vectors are needed: those of the sides that are anchored."""
        encoder = config.input if self.sides != "decoder" else ()
        return tuple(dict.fromkeys((*encoder, *(config.output if self.sides != "encoder" else ()))))

    def without_effect(self) -> list[str]:
        """How the weight is used, where there is none."""
        given = [name for name in ("distance", "end") if getattr(self, name) != type(self).model_fields[name].default]
        return [f"anchors.{name} has no effect with weight 0: leave it out" for name in given if not self.weight]

    @property
    def shown(self) -> str:
        """The set's name; of a control another one, as its latents are none of the subpopulations'."""
        return self.name if self.control == "none" else f"{self.name} ({self.control})"


def _as_anchoring(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class ResamplingSettings(Settings):
    at: tuple[Share, ...] = (0.25, 0.5, 0.75)
    rows: Count = 819_200
    encoder_scale: Positive = 0.2


class InitialisationSettings(Settings):
    encoder: Literal["transposed", "independent"] = "transposed"
    encoder_scale: Positive | None = None
    decoder_norm: Weight = 1.0


class DictionarySettings(Settings):
    name: Name
    input: Annotated[QualifiedSites, Field(min_length=1)]
    """The sites that are encoded; several make a crosscoder. `<model>/<site>` in a store of several models."""
    output: QualifiedSites = ()
    """The sites that are reconstructed; the input's own, if not given."""
    latents: Count
    """Width of the code; with cross_layer, for each layer."""
    cross_layer: bool = False
    """A cross-layer transcoder: input[i]'s latents write output[i] and all outputs after it."""
    skip: bool = False
    """A transcoder with a linear path beside the latents."""
    shared_latents: Annotated[int, Field(ge=0)] = 0
    """For a crosscoder: how many of the first latents have one decoder for all sites."""
    activation: ActivationSettings = ActivationSettings()
    loss: LossSettings = LossSettings()
    anchors: Annotated[AnchoringSettings | None, BeforeValidator(_as_anchoring)] = None
    """An anchor set whose vectors the first latents are pulled toward: its name, or a section with how."""
    learning_rate: Positive | None = None
    """Peak of Adam's rate; `default_learning_rate` of latents and steps, if not given."""
    warmup: Share = 0.05
    """Share of the steps over which the rate rises."""
    decay: Share = 0.2
    """Share of the steps, at the end, over which it falls to zero."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """unit: decoder rows keep norm 1."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; null: any."""
    tied: bool = False
    """For an SAE or a crosscoder: the encoder is the decoder's transpose throughout."""
    resampling: ResamplingSettings | None = None
    """Revive dead latents at inputs with a large loss; never, if not given."""
    initialisation: InitialisationSettings = InitialisationSettings()
    dead_after_rows: Count | None = None
    """Rows after which a latent that was silent on all of them counts as dead; 10 M, or 2 % of a shorter run, if not
    given."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products are computed in: float32; bfloat16, the dense ones too; or auto, which compares preactivations in
    the faster type of the machine and makes dense products in float32. Weights, selected entries and optimiser are
    float32 in any case, and what a run began with it keeps."""
    exact: bool = False
    """Dense float32 products throughout, and Adam unfused: the plain formula, several times slower."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.output or self.input

    def config(self, width_of: dict[str, int]) -> DictionaryConfig:
        """The shape, once the widths of the sites are known. Raises InputError."""
        return DictionaryConfig(
            input=self.input,
            output=self.outputs,
            input_widths=tuple(width_of[site] for site in self.input),
            output_widths=tuple(width_of[site] for site in self.outputs),
            latents=self.latents,
            activation=self.activation.activation(),
            cross_layer=self.cross_layer,
            skip=self.skip,
            shared_latents=self.shared_latents,
        )

    def objective(self) -> Objective:
        how = self.anchors
        anchoring: dict[str, Any] = {}
        if how is not None:
            anchoring = {"anchoring": how.weight, "anchoring_distance": how.distance, "anchoring_end": how.end}
        return Objective(**self.loss.model_dump(), **anchoring)

    def problems(self) -> list[str]:
        """What does not go together, whatever the widths of the sites are."""
        try:
            config = self.config(dict.fromkeys((*self.input, *self.outputs), 1))
            check_training(config, self.training(steps=10**12, batch_rows=1, seed=0), None)
        except InputError as error:
            return [str(error)]
        found = self.loss.without_effect() + ([] if self.anchors is None else self.anchors.without_effect())
        if reason := self._unordered():
            found.append(reason)
        if self.exact and self.precision == "bfloat16":
            found.append(f"exact means float32 throughout, and precision is {self.precision}: leave out one of them")
        return found

    def _unordered(self) -> str | None:
        """Why the layers of a cross-layer transcoder are not in order; None if they are."""
        if not self.cross_layer:
            return None
        reads, writes = (
            [parse_site(SiteRef.parse(s).site).layer for s in sites] for sites in (self.input, self.outputs)
        )
        if reads == writes == sorted(set(reads)):
            return None
        return (
            "cross_layer: input and output must be of the same layers, ascending, one site of each: latents write "
            f"their own and all later outputs; not {', '.join(self.input)} and {', '.join(self.outputs)}"
        )

    def products(self) -> Products:
        if self.exact:
            return Products(sparse=False, selection="float32")
        return Products() if self.precision == "auto" else Products(selection=self.precision, dense=self.precision)

    def training(self, steps: int, batch_rows: int, seed: int) -> TrainingConfig:
        """Return how it is trained, in `steps` steps."""
        return TrainingConfig(
            steps=steps,
            batch_rows=batch_rows,
            learning_rate=self.learning_rate or default_learning_rate(self.latents, steps),
            objective=self.objective(),
            warmup_share=self.warmup,
            decay_share=self.decay,
            dead_after_rows=self.dead_after_rows or default_dead_after_rows(steps * batch_rows),
            decoder_norm=self.decoder_norm,
            clip=self.clip,
            tied=self.tied,
            resampling=None if self.resampling is None else Resampling(**self.resampling.model_dump()),
            initialisation=Initialisation(**self.initialisation.model_dump()),
            anchors_first=self.anchors is None or self.anchors.first,
            products=self.products(),
            fused=not self.exact,
            seed=seed,
        )
