"""A dictionary: encoder from the input sites, sparsifying activation, decoder to the output sites.

    z = sigma(W_enc x + b_enc),   y = W_dec^T z + b_dec [+ W_skip x]        (arXiv 2512.05534, definition 2.5)

One class covers the family; `pipeline.sdl.dictionary.shape` says how. Its latents stand in blocks, of which all
variants but cross-layer transcoders have one. `x` and `y` are activations as stored, sites side by side: whatever
normalisation the training used is folded into the weights when a dictionary is saved, so that none can be forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.checks import not_negative, positive
from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import Products
from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import BlockShape, DictionaryConfig

Rows = Tensor | NDArray[Any]


@dataclass(frozen=True)
class Initialisation:
    """How weights begin."""

    encoder: str = "transposed"
    """`transposed`: the decoder's transpose where output = input, else as `independent`: random unit rows."""
    encoder_scale: float | None = None
    """Norm of the encoder's rows; if not given, 1, or less where the first reconstruction would overshoot the input."""
    decoder_norm: float = 1.0
    """Norm of the decoder's rows; 0.1 is usual with L1, 0 for transcoders (decoders of a free norm)."""

    def reasons(self) -> list[str]:
        """Why weights cannot begin so."""
        found = [*positive(encoder_scale=self.encoder_scale), *not_negative(decoder_norm=self.decoder_norm)]
        if self.encoder not in ("transposed", "independent"):
            found.append(f"encoder is transposed or independent, not {self.encoder!r}")
        return [f"initialisation.{reason}" for reason in found]


class Block(nn.Module):
    """Latents that read some input columns and write some output columns.

    W_enc [latents, d_in], b_enc [latents], W_dec [latents, d_out], and the activation's own weights, each [latents].
    """

    def __init__(self, config: DictionaryConfig, shape: BlockShape):
        super().__init__()
        self.shape, self.activation, latents = shape, config.activation, config.latents
        self.W_enc = nn.Parameter(torch.zeros(latents, shape.reads.stop - shape.reads.start))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, shape.writes.stop - shape.writes.start))
        for name, initial in config.activation.own_weights(latents).items():
            if name in config.activation.trained:
                self.register_parameter(name, nn.Parameter(initial))
            else:
                self.register_buffer(name, initial)

    def own(self, name: str) -> Tensor:
        """One of the activation's own weights."""
        found: Tensor = getattr(self, name)
        return found

    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc x + b_enc for x [rows, d_in of this block] -> [rows, latents]."""
        return nn.functional.linear(x, self.W_enc, self.b_enc)

    def decoder_norms(self) -> Tensor:
        """The norm of each latent's decoder, summed over the sites it writes -> [latents]."""
        parts = self.W_dec.split(self.shape.written_widths, dim=1)
        return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).sum(0)

    def selection_weights(self) -> Tensor | None:
        """What preactivations are multiplied with before they compete; None where all norms are 1."""
        if len(self.shape.written_widths) == 1 and not self.free_norms:
            return None
        return self.decoder_norms().detach()

    @torch.no_grad()
    def lower(self, by: Tensor) -> None:
        """Change the biases, those of magnitudes too, as if every product W_enc x were less by `by` [latents]."""
        own = {name: self.own(name) for name in self.activation.own_weights(0)}
        self.b_enc.sub_(by)
        for name, value in self.activation.shift(own, by).items():
            self.own(name).copy_(value)

    free_norms: bool = False
    """True if decoder rows have any norm while training; otherwise each has norm 1."""


class Dictionary(nn.Module):
    """Blocks of latents, b_dec [d_out], and W_skip [d_out, d_in] of a skip transcoder. All float32."""

    def __init__(self, config: DictionaryConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, shape) for shape in config.blocks())
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in)) if config.skip else None

    def each_block(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def only(self) -> Block:
        """The block of a dictionary that has one."""
        (block,) = self.each_block()
        return block

    @property
    def W_enc(self) -> nn.Parameter:
        """[latents, d_in] of a dictionary of one block."""
        return self.only.W_enc

    @property
    def b_enc(self) -> nn.Parameter:
        return self.only.b_enc

    @property
    def W_dec(self) -> nn.Parameter:
        """[latents, d_out] of a dictionary of one block."""
        return self.only.W_dec

    def initialise(self, seed: int, how: Initialisation | None = None, *, tied: bool = False) -> None:
        """Random decoder rows; the encoder is the decoder's transpose where output = input, else rows of its own.

        `tied`: it is the decoder itself, one matrix, from here on."""
        how = how or Initialisation()
        generator = torch.Generator().manual_seed(seed)
        transposed = how.encoder == "transposed" and self.config.is_autoencoder and not self.config.cross_layer
        scale = how.encoder_scale
        if scale is None:
            scale = self._quiet_scale(how.decoder_norm) if transposed else 1.0
        with torch.no_grad():
            for block in self.each_block():
                for W in (block.W_dec,) if transposed else (block.W_dec, block.W_enc):
                    W.copy_(nn.functional.normalize(torch.randn(W.shape, generator=generator), dim=1))
            self.tie_shared()  # before the encoder is taken from it
            for block in self.each_block():
                block.W_enc.copy_((block.W_dec if transposed else block.W_enc) * scale)
                block.W_dec.mul_(how.decoder_norm)
                if tied:
                    block.W_enc = block.W_dec
                    block.lower(torch.full_like(block.b_enc, self._quiet_bias(how.decoder_norm)))

    def _quiet_bias(self, decoder_norm: float) -> float:
        """How far below zero tied codes that begin dense begin, so that they do not overshoot x: see `_quiet_scale`.

        Of products that are N(0, s^2), s the decoder's norm, a share p is above s Phi^-1(1 - p), and the sum of what is
        above is p F s^2 / d times x."""
        share = self.config.d_in / (self.config.latents * decoder_norm**2)
        if not self.config.activation.begins_dense or share >= 0.5:
            return 0.0
        return decoder_norm * NormalDist().inv_cdf(1 - share)

    def _quiet_scale(self, decoder_norm: float) -> float:
        """The norm of encoder rows, at most 1, with which a transposed encoder's reconstruction is not larger than x.

        F latents of which half are active each give their part of x: the sum is F / 2 d times x. Latents that are
        pushed down from there die: 21 % of a gated dictionary of 8 d latents (docs/decisions/0013)."""
        if not self.config.activation.begins_dense or decoder_norm == 0:
            return 1.0
        return min(1.0, 2 * self.config.d_in / (self.config.latents * decoder_norm))

    @torch.no_grad()
    def tie_shared(self) -> None:
        """Give the shared latents one decoder for all sites, the mean of theirs at the norm they had.

        Those that have one already are left as they are, to the bit."""
        if shared := self.config.shared_latents:
            sites = len(self.config.output)
            W = self.W_dec[:shared].view(shared, sites, -1)
            differ = (W[:, :1] != W).any(2).any(1)
            norm = torch.linalg.vector_norm(W[differ], dim=(1, 2), keepdim=True)
            one = nn.functional.normalize(W[differ].mean(1, keepdim=True), dim=2) * norm / sites**0.5
            W[differ] = one.expand(-1, sites, -1)

    # ---- what a finished dictionary does

    def encode(self, x: Rows) -> Tensor:
        """The code z of x [rows, d_in] -> [rows, total latents], block after block; zero where inactive.

        x is a tensor, or an array as `Store.read` gives it. Raises InputError if it is of another shape."""
        x = self._rows(x, self.config.input, self.config.input_widths)
        return torch.cat([b.activation.infer(b, x[:, b.shape.reads]) for b in self.each_block()], dim=1)

    def decode(self, z: Rows, x: Rows | None = None) -> Tensor:
        """The reconstruction of z [rows, total latents] -> [rows, d_out]. A skip transcoder needs x as well."""
        z = self._rows(z, ["latents"], [self.config.total_latents])
        x = None if x is None else self._rows(x, self.config.input, self.config.input_widths)
        y = self.base(x, len(z))
        for block, code in zip(self.each_block(), z.split(self.config.latents, dim=1), strict=True):
            y = add_columns(y, code @ block.W_dec, block.shape.writes)
        return y

    def forward(self, x: Rows) -> Tensor:
        return self.decode(self.encode(x), x)

    def _rows(self, given: Rows, names: Sequence[str], widths: Sequence[int]) -> Tensor:
        """Rows in the weights' type, where those are."""
        rows = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given, dtype=np.float32))
        if rows.ndim != 2 or rows.shape[1] != sum(widths):
            expected = ", ".join(f"{name} ({width})" for name, width in zip(names, widths, strict=True))
            raise InputError(f"this dictionary takes rows of {expected}: [rows, {sum(widths)}], not {list(rows.shape)}")
        return rows.to(self.b_dec)

    # ---- what training does

    def codes(self, x: Tensor, products: Products) -> list[Code]:
        """The code of each block, with gradients, for x [rows, d_in] float32."""
        return [b.activation.code(b, x[:, b.shape.reads], products) for b in self.each_block()]

    def reconstructions(self, codes: Sequence[Code], x: Tensor, prefixes: Sequence[int] = ()) -> list[Tensor]:
        """What the first latents reconstruct, for each number of them in `prefixes`, and all -> each [rows, d_out]."""
        y = self.base(x, codes[0].rows)
        if not prefixes:
            for block, code in zip(self.each_block(), codes, strict=True):
                y = add_columns(y, code.decode(block.W_dec), block.shape.writes)
            return [y]
        (code,), W_dec = codes, self.W_dec
        found, bounds = [], [0, *prefixes, self.config.latents]
        for first, last in pairwise(bounds):
            if last > first:
                y = y + code.between(first, last).decode(W_dec[first:last])
                found.append(y)
        return found

    def base(self, x: Tensor | None, rows: int) -> Tensor:
        """What the reconstruction is without any latent -> [rows, d_out], or a row that is the same for all."""
        y = self.b_dec.expand(rows, -1)
        if self.W_skip is None:
            return y
        if x is None:
            raise InputError("a skip transcoder's reconstruction has a part of x: give decode(z, x) both")
        for shape in self.config.blocks():  # of several layers none writes an earlier one: those entries stay zero
            part = nn.functional.linear(x[:, shape.reads], self.W_skip[shape.writes, shape.reads])
            y = add_columns(y, part, shape.writes)
        return y

    @torch.no_grad()
    def folded(self, x_norm: Normalisation, y_norm: Normalisation) -> "Dictionary":
        """Return the dictionary on raw activations that equals this one on normalised ones; codes are the same."""
        raw = Dictionary(self.config).to(self.b_dec.device)
        for block, out in zip(self.each_block(), raw.each_block(), strict=True):
            reads, writes = block.shape.reads, block.shape.writes
            out.W_enc.copy_(block.W_enc * x_norm.scale[reads])
            out.W_dec.copy_(block.W_dec / y_norm.scale[writes])
            for name in ("b_enc", *block.activation.own_weights(0)):
                out.own(name).copy_(block.own(name))
            out.lower(out.W_enc @ x_norm.mean[reads])
        raw.b_dec.copy_(self.b_dec / y_norm.scale + y_norm.mean)
        if self.W_skip is not None and raw.W_skip is not None:
            raw.W_skip.copy_(self.W_skip * x_norm.scale / y_norm.scale[:, None])
            raw.b_dec.sub_(raw.W_skip @ x_norm.mean)
        return raw


def add_columns(y: Tensor, part: Tensor, columns: slice) -> Tensor:
    """y with `part` added to some of its columns."""
    if part.shape[1] == y.shape[1]:
        return y + part
    return y + nn.functional.pad(part, (columns.start, y.shape[1] - columns.stop))
