"""The shape of a dictionary: which sites it reads and writes, and how many latents do so.

Choosing a variant is choosing sites:

    SAE                       output = input
    transcoder                another site as output; `skip` adds a linear path beside the latents
    crosscoder                several sites as input, the same as output; `shared_latents` of two models share a decoder
    cross-layer transcoder    `cross_layer`: one block of latents a layer, which reads its own input and writes its own
                              and all later outputs
"""

from dataclasses import dataclass
from typing import Any

from pipeline.checks import refuse, whole
from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import Activation, activation_of, activation_record


@dataclass(frozen=True)
class BlockShape:
    """Which columns a block of latents reads and writes."""

    reads: slice
    writes: slice
    written_widths: tuple[int, ...]
    """Widths of the output sites it writes, in order."""


@dataclass(frozen=True)
class DictionaryConfig:
    """The shape of a dictionary. Raises InputError where its parts do not fit together."""

    input: tuple[str, ...]
    """Sites whose activations, side by side, are encoded."""
    output: tuple[str, ...]
    """Sites that are reconstructed; equal to `input` for SAEs and crosscoders."""
    input_widths: tuple[int, ...]
    output_widths: tuple[int, ...]
    latents: int
    """The latents of each block; only cross-layer transcoders have several."""
    activation: Activation
    cross_layer: bool = False
    skip: bool = False
    shared_latents: int = 0
    """The first latents whose decoder is the same for every output site."""

    def __post_init__(self) -> None:
        refuse(whole(latents=self.latents))
        self.activation.check(self.latents)
        for sites, widths in ((self.input, self.input_widths), (self.output, self.output_widths)):
            if len(sites) != len(widths) or not sites:
                raise InputError(f"each site has a width; there are {len(sites)} sites and {len(widths)} widths")
            if len(set(sites)) < len(sites):
                raise InputError(f"a site is given twice: {', '.join(sites)}")
            refuse(
                [reason for s, width in zip(sites, widths, strict=True) for reason in whole(**{f"{s}'s width": width})]
            )
        read = dict(zip(self.input, self.input_widths, strict=True))
        for site, width in zip(self.output, self.output_widths, strict=True):
            if read.get(site, width) != width:
                raise InputError(f"{site} is {read[site]} wide as input and {width} as output; a site has one width")
        if self.cross_layer and (len(self.input) != len(self.output) or len(self.input) < 2):
            raise InputError(
                "a cross-layer transcoder has an output site for each input site, in the order of layers, two or more; "
                f"not {len(self.input)} in and {len(self.output)} out"
            )
        if self.skip and (both := [site for site in self.output if site in self.input]):
            raise InputError(f"skip: {', '.join(both)} is input and output, so the skip alone would reconstruct it")
        if self.shared_latents:
            self._check_shared()

    def _check_shared(self) -> None:
        if self.cross_layer or len(self.output) < 2:
            raise InputError("shared_latents are those of a crosscoder: they need several output sites and one block")
        if len(set(self.output_widths)) > 1:
            widths = ", ".join(f"{s} is {w} wide" for s, w in zip(self.output, self.output_widths, strict=True))
            raise InputError(f"shared_latents have one decoder for all sites, which need one width: {widths}")
        if not 0 < self.shared_latents <= self.latents:
            raise InputError(
                f"shared_latents must be between 1 and latents = {self.latents}, not {self.shared_latents}"
            )

    @property
    def d_in(self) -> int:
        return sum(self.input_widths)

    @property
    def d_out(self) -> int:
        return sum(self.output_widths)

    @property
    def is_autoencoder(self) -> bool:
        return self.input == self.output

    @property
    def total_latents(self) -> int:
        return self.latents * len(self.blocks())

    def blocks(self) -> list[BlockShape]:
        if not self.cross_layer:
            return [BlockShape(slice(0, self.d_in), slice(0, self.d_out), self.output_widths)]
        shapes = []
        for i in range(len(self.input)):
            start, written = sum(self.input_widths[:i]), sum(self.output_widths[:i])
            reads = slice(start, start + self.input_widths[i])
            shapes.append(BlockShape(reads, slice(written, self.d_out), self.output_widths[i:]))
        return shapes

    def record(self) -> dict[str, Any]:
        """As JSON."""
        lists = {name: list(getattr(self, name)) for name in ("input", "output", "input_widths", "output_widths")}
        return {**vars(self), **lists, "activation": activation_record(self.activation)}


def config_of(record: dict[str, Any]) -> DictionaryConfig:
    """The config of a record that `DictionaryConfig.record` gave."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    fields["activation"] = activation_of(record["activation"])
    return DictionaryConfig(**fields)
