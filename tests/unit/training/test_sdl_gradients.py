"""Where each term of the loss sends gradient: every cell of the table (term x parameter).

`all`: some entry of the parameter gets one. `dead`, `anchored`: those rows, each of them, and no other. `-`: exactly
none. What goes wrong elsewhere: AuxK that gives the encoder nothing, or that sees b_dec.
"""

from collections.abc import Callable

import pytest
import torch
from formulas import LATENTS, VARIANTS, config_of, randn, random_dictionary
from torch import Tensor

from pipeline.sdl.dictionary.activations import Products
from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.dictionary import Block, Dictionary
from pipeline.sdl.train.losses import (
    auxiliary_loss,
    cosine_anchoring,
    gate_loss,
    l1_loss,
    p_norm_loss,
    preactivation_loss,
    reconstruction_loss,
    squared_anchoring,
    tanh_loss,
)

ROWS = 200
"""So many that each latent is active somewhere and silent somewhere."""
DEAD, ANCHORED = [1, 4, 5, 9], [0, 1]
COMMON = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
OWN = {"topk": (), "batch_topk": (), "relu": (), "jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}

TABLE = {
    # term               W_enc       b_enc   W_dec       b_dec  W_skip  own weights: see below
    "reconstruction": ("all", "all", "all", "all", "all"),
    "l1": ("all", "all", "all", "-", "-"),
    "tanh": ("all", "all", "all", "-", "-"),
    "p_norm": ("all", "all", "all", "-", "-"),
    "l0": ("-", "-", "-", "-", "-"),
    "auxk": ("dead", "dead", "dead", "-", "-"),
    "preactivation": ("dead", "dead", "-", "-", "-"),
    "gate": ("all", "all", "-", "-", "-"),
    "squared encoder": ("anchored", "-", "-", "-", "-"),
    "squared decoder": ("-", "-", "anchored", "-", "-"),
    "cosine encoder": ("anchored", "-", "-", "-", "-"),
    "cosine decoder": ("-", "-", "anchored", "-", "-"),
}
OWN_TABLE = {
    # thresholds learn from everything that sees values or counts; magnitudes of gated dictionaries from the error alone
    "jumprelu": {"reconstruction": "all", "l1": "all", "tanh": "all", "p_norm": "all", "l0": "all"},
    "gated": {"reconstruction": "all"},
}
OTHERWISE = {("gated", "reconstruction", "b_enc"): "-"}  # a gate is a step, and its bias is in nothing else
ONLY_OF = {"l0": "jumprelu", "gate": "gated"}


def terms(dictionary: Dictionary, activation: str) -> dict[str, Callable[[], Tensor]]:
    config = dictionary.config
    with torch.no_grad():
        for block in dictionary.each_block():
            block.b_enc[DEAD] = 0  # on both sides of zero
    x, y = randn(ROWS, config.d_in, seed=1).double(), randn(ROWS, config.d_out, seed=2).double()
    codes = dictionary.codes(x, Products(sparse=activation in ("topk", "batch_topk"), selection="float32"))
    (y_hat,) = dictionary.reconstructions(codes, x)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[DEAD] = True
    anchors = {side: randn(2, d, seed=d).double() for side, d in (("encoder", config.d_in), ("decoder", config.d_out))}

    def of_blocks(term: Callable[[Block, Code], Tensor]) -> Tensor:
        return sum(term(b, c) for b, c in zip(dictionary.each_block(), codes, strict=True))

    def anchoring(distance: Callable[[Tensor, Tensor], Tensor], side: str) -> Tensor:
        if side == "encoder":
            return of_blocks(lambda b, _: distance(b.W_enc, anchors[side][:, b.shape.reads]))
        return of_blocks(lambda b, _: distance(b.W_dec, anchors[side][:, b.shape.writes]))

    found = {
        "reconstruction": lambda: reconstruction_loss(y - y_hat, config.d_out),
        "l1": lambda: of_blocks(lambda b, c: l1_loss(c, b.decoder_norms())),
        "tanh": lambda: of_blocks(lambda b, c: tanh_loss(c, b.decoder_norms(), 2.0)),
        "p_norm": lambda: of_blocks(lambda b, c: p_norm_loss(c, b.decoder_norms(), 0.5)),
        "l0": lambda: of_blocks(lambda b, c: b.activation.active(c, b).sum()),
        "auxk": lambda: of_blocks(  # the residual as it is: it must not be a way to b_dec
            lambda b, _: auxiliary_loss((y - y_hat)[:, b.shape.writes], x[:, b.shape.reads], b, dead, 2)
        ),
        "preactivation": lambda: of_blocks(lambda b, _: preactivation_loss(x[:, b.shape.reads], b, dead)),
        "gate": lambda: gate_loss(y, dictionary, codes, x, config.d_out),
    }
    for name, distance in (("squared", squared_anchoring), ("cosine", cosine_anchoring)):
        for side in ("encoder", "decoder"):
            found[f"{name} {side}"] = lambda distance=distance, side=side: anchoring(distance, side)
    return {name: term for name, term in found.items() if ONLY_OF.get(name, activation) == activation}


def where(gradient: Tensor | None) -> str:
    if gradient is None or not gradient.any():
        return "-"
    rows = gradient.reshape(len(gradient), -1).abs().sum(1).nonzero().flatten().tolist()
    return {tuple(DEAD): "dead", tuple(ANCHORED): "anchored"}.get(tuple(rows), "all")


def expected(activation: str, term: str) -> dict[str, str]:
    row = dict(zip(COMMON, TABLE[term], strict=True))
    row |= {name: OWN_TABLE[activation].get(term, "-") for name in OWN[activation]}
    return {name: OTHERWISE.get((activation, term, name), cell) for name, cell in row.items()}


@pytest.mark.parametrize("term", TABLE)
@pytest.mark.parametrize("activation", OWN)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cell(variant: str, activation: str, term: str) -> None:
    dictionary = random_dictionary(config_of(variant, activation))
    found = terms(dictionary, activation)
    if term not in found:
        assert ONLY_OF[term] != activation
        return
    found[term]().backward()
    wanted = expected(activation, term)
    cells = {}
    for name, parameter in dictionary.named_parameters():
        cells.setdefault(name.rpartition(".")[2], set()).add(where(parameter.grad))
    if dictionary.W_skip is None:
        del wanted["W_skip"]
    assert cells == {name: {cell} for name, cell in wanted.items()}


def test_the_sign_of_what_revives() -> None:
    """AuxK and the preactivation term both raise what dead latents would have been active with."""
    dictionary = random_dictionary(config_of("sae", "jumprelu"))
    terms(dictionary, "jumprelu")["preactivation"]().backward()
    assert (dictionary.b_enc.grad[DEAD] < 0).all()


def test_the_sign_of_what_silences() -> None:
    dictionary = random_dictionary(config_of("sae", "jumprelu"))
    terms(dictionary, "jumprelu")["l0"]().backward()
    gradient = dictionary.only.own("threshold").grad
    assert (gradient <= 0).all()  # a higher threshold lowers the count
    assert (gradient < 0).any()
