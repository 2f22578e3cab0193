"""Codes that are mostly zero, and the products with them that a training step needs.

A dense code of 4,096 rows and 16,384 latents has 67 million entries of which 131,072 are not zero at k = 32. Everything
after the encoder's product works on those alone: the decoder's output is a bag of decoder rows, the gradient of the
code is a sampled product, and both weight gradients are products of a sparse matrix. Autograd goes through
`Places.encode` and `Places.decode`. Which entries are kept is decided in `pipeline.sdl.dictionary.selection`.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

with warnings.catch_warnings():  # torch says once in a process that its CSR matrices are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1))


@dataclass(frozen=True)
class Places:
    """Which entries of a matrix [rows, latents] are kept, row after row (CSR)."""

    starts: Tensor
    """int64 [rows + 1]: where each row's entries begin."""
    latent: Tensor
    """int64 [entries]: which latent each is, ascending within a row."""
    latents: int

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def row(self) -> Tensor:
        """int64 [entries]: the row of each."""
        return torch.repeat_interleave(self.starts.diff())

    def of_entries(self, per_latent: Tensor) -> Tensor:
        """A figure for each latent [latents] -> for each entry [entries]."""
        return per_latent[self.latent]

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """The kept entries of x @ W_enc.T + b_enc, for x [rows, d], W_enc [latents, d] -> [entries]."""
        values: Tensor = _Encode.apply(x, W_enc, b_enc, self)
        return values

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """code @ W_dec for the code with these values [entries], W_dec [latents, d] -> [rows, d]."""
        y: Tensor = _Decode.apply(values, W_dec, self)
        return y

    def dense(self, values: Tensor) -> Tensor:
        """The code -> [rows, latents]."""
        return values.new_zeros(self.rows, self.latents).index_put((self.row, self.latent), values)

    def between(self, first: int, last: int) -> tuple["Places", Tensor]:
        """The places of the latents [first, last), counted from `first`, and which of our entries they are."""
        kept = ((self.latent >= first) & (self.latent < last)).nonzero().squeeze(1)
        starts = self.starts.new_zeros(len(self.starts))
        torch.cumsum(torch.bincount(self.row[kept], minlength=self.rows), 0, out=starts[1:])
        return Places(starts, self.latent[kept] - first, last - first), kept

    # ---- the products, without autograd

    def sampled_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The kept entries of left @ right.T, for left [rows, d], right [latents, d] -> [entries]."""
        zero = self._matrix(left.new_zeros(len(self.latent)))
        product: Tensor = torch.sparse.sampled_addmm(zero, left, right.T, beta=0.0)
        return product.values()

    def bag(self, values: Tensor, W: Tensor) -> Tensor:
        """code @ W -> [rows, d]."""
        return functional.embedding_bag(
            self.latent, W, self.starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    def transposed_product(self, values: Tensor, dense: Tensor) -> Tensor:
        """code.T @ dense, for dense [rows, d] -> [latents, d]."""
        starts, row, order = self._by_latent
        shape = (self.latents, self.rows)
        return torch.sparse_csr_tensor(starts, row, values[order], shape, check_invariants=False) @ dense

    def summed(self, values: Tensor) -> Tensor:
        """The sum of each latent's values -> [latents]."""
        return values.new_zeros(self.latents).index_add_(0, self.latent, values)

    def _matrix(self, values: Tensor) -> Tensor:
        shape = (self.rows, self.latents)
        return torch.sparse_csr_tensor(self.starts, self.latent, values, shape, check_invariants=False)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose: where each latent's entries begin, the row of each, and where it stands here."""
        order = torch.sort(self.latent, stable=True).indices
        starts = self.starts.new_zeros(self.latents + 1)
        torch.cumsum(torch.bincount(self.latent, minlength=self.latents), 0, out=starts[1:])
        return starts, self.row[order], order


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x)
        ctx.places = places
        return places.sampled_product(x, W_enc) + b_enc[places.latent]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, ctx.places.transposed_product(grad, x), ctx.places.summed(grad), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.places = places
        return places.bag(values, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, W_dec = ctx.saved_tensors
        return ctx.places.sampled_product(grad, W_dec), ctx.places.transposed_product(values, grad), None
