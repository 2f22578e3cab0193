"""The loss of every variant, activation and term against direct formulas in float64: its value and all gradients."""

import pytest
import torch
from formulas import LATENTS, ROWS, VARIANTS, Formulas, config_of, leaves, randn, random_dictionary
from torch import Tensor

from pipeline.checks import refuse
from pipeline.sdl.dictionary.activations import Products
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.losses import auxiliary_loss, reconstruction_loss, squared_anchoring, unit_rows
from pipeline.sdl.train.objective import Anchors, Objective, anchoring_weight, evaluate, p_of

NOTHING = Objective(auxk=0, anchoring=0)
DENSE, SPARSE = Products(sparse=False), Products(sparse=True, selection="float32")

TERMS: dict[str, list[Objective]] = {
    "topk": [NOTHING, Objective(auxk=0.5, auxk_k=2), Objective(auxk=0.5)],
    "batch_topk": [NOTHING, Objective(auxk=0.5, auxk_k=2, anchoring=0.7, anchoring_distance="cosine")],
    "relu": [Objective(l1=5, auxk=0), Objective(tanh=3, tanh_scale=2, auxk=0.1), Objective(p_norm=4, p_end=0.4)],
    "jumprelu": [
        Objective(l0=0.3, auxk=0),
        Objective(l0=0.3, l0_target=4, auxk=0.2, preactivation=2),
        Objective(tanh=3, preactivation=2, auxk=0),
        Objective(l1=5, p_norm=3, p_start=0.2, anchoring_end=0.9, anchoring_distance="cosine"),
    ],
    "gated": [Objective(l1=5, auxk=0), Objective(tanh=3, p_norm=4, preactivation=2, auxk=0.3)],
}
CASES = [(activation, objective) for activation, objectives in TERMS.items() for objective in objectives]


def anchors_for(config: DictionaryConfig, sides: str = "both") -> Anchors:
    """Anchors of any length: the loss looks at directions."""
    encoder, decoder = 3 * randn(2, config.d_in, seed=8).double(), randn(2, config.d_out, seed=9).double()
    return Anchors(None if sides == "decoder" else encoder, None if sides == "encoder" else decoder)


def batch(config: DictionaryConfig) -> tuple[Tensor, Tensor]:
    x = randn(ROWS, config.d_in, seed=1).double()
    return x, x if config.is_autoencoder else randn(ROWS, config.d_out, seed=2).double()


def some_dead(config: DictionaryConfig) -> Tensor:
    """Some of the first block's and none of the last one's, if there are two."""
    dead = torch.zeros(config.total_latents, dtype=torch.bool)
    dead[[1, 4, 5, 9, 12]] = True
    return dead


def assert_is_the_formula(
    config: DictionaryConfig, objective: Objective, products: Products, anchors: Anchors | None, progress: float
) -> None:
    refuse(objective.reasons(config))
    dictionary, (x, y), dead = random_dictionary(config), batch(config), some_dead(config)
    codes = dictionary.codes(x, products)
    found = evaluate(objective, dictionary, x, y, codes, dead, anchors, progress)
    direct = Formulas(config, leaves(dictionary), x, y)
    expected = direct.loss(objective, dead, anchors, progress)
    torch.testing.assert_close(found.loss.detach(), expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.fvu, direct.fvu().detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.residual, (y - direct.reconstruction()).detach(), rtol=1e-11, atol=1e-12)
    found.loss.backward()
    expected.backward()
    for name, parameter in dictionary.named_parameters():
        wanted = direct.weights[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("activation", "objective"), CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_all_its_gradients(variant: str, activation: str, objective: Objective) -> None:
    config = config_of(variant, activation)
    assert_is_the_formula(config, objective, DENSE, anchors_for(config), progress=0.7)


@pytest.mark.parametrize("progress", [0.0, 0.03, 0.3, 1.0])
def test_what_changes_in_the_course_of_training(progress: float) -> None:
    """The weights of sparsity rise, the power of p_norm falls, anchoring ends."""
    objective = Objective(l0=1, p_norm=3, p_end=0.3, p_start=0.2, anchoring_end=0.8, sparsity_warmup=0.1)
    config = config_of("crosscoder", "jumprelu")
    assert_is_the_formula(config, objective, DENSE, anchors_for(config), progress)


@pytest.mark.parametrize("distance", ["squared", "cosine"])
@pytest.mark.parametrize("sides", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_anchoring_of_each_side(variant: str, sides: str, distance: str) -> None:
    config = config_of(variant, "topk")
    objective = Objective(anchoring=2.0, anchoring_distance=distance)
    assert_is_the_formula(config, objective, DENSE, anchors_for(config, sides), progress=0.5)


@pytest.mark.parametrize("prefixes", [(3,), (2, 5, 11), (4, LATENTS)])
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sparse_path_is_the_dense_one(variant: str, activation: str, prefixes: tuple[int, ...]) -> None:
    """Both are the formula, with prefixes where there is one block, dead latents and anchors."""
    config = config_of(variant, activation)
    objective = Objective(auxk=0.5, prefixes=() if config.cross_layer else prefixes)
    for products in (DENSE, SPARSE):
        assert_is_the_formula(config, objective, products, anchors_for(config), progress=0.7)


@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_prefixes_of_dense_codes(activation: str) -> None:
    config = config_of("skip", activation)
    assert_is_the_formula(config, Objective(l1=3, prefixes=(3, 7)), DENSE, None, progress=1.0)


def test_without_dead_latents_or_anchors_their_terms_are_left_out() -> None:
    config = config_of("transcoder", "topk")
    dictionary, (x, y) = random_dictionary(config), batch(config)
    objective = Objective(auxk=5, anchoring=5)
    found = evaluate(objective, dictionary, x, y, dictionary.codes(x, DENSE), None, None, 0.5)
    assert found.loss.item() == found.fvu.item()


# ---- single terms


def test_reconstruction_loss_is_the_formula() -> None:
    y, y_hat = randn(40, 5), randn(40, 5, seed=1)
    expected = ((y.double() - y_hat.double()) ** 2).sum(1).mean() / 3.5
    assert reconstruction_loss(y - y_hat, 3.5).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("perfect", [False, True])
def test_auxiliary_loss_of_a_residual_without_variance_spoils_no_weight(perfect: bool) -> None:
    """One row, or a perfect reconstruction: there is nothing to divide by."""
    dictionary = random_dictionary(config_of("transcoder", "topk")).float()
    dead = torch.ones(LATENTS, dtype=torch.bool)
    residual = torch.zeros(ROWS, 5) if perfect else randn(1, 5)
    loss = auxiliary_loss(residual, randn(len(residual), 6), dictionary.only, dead, k=2)
    assert loss.item() == 0
    loss.backward()
    for parameter in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_anchoring_gradient_is_twice_the_difference_on_the_first_rows() -> None:
    W = randn(LATENTS, 6).requires_grad_()
    anchors = unit_rows(randn(3, 6, seed=2))
    squared_anchoring(W, anchors).backward()
    expected = torch.zeros_like(W)
    expected[:3] = 2 * (W[:3].detach() - anchors)
    assert torch.equal(W.grad, expected)


def test_unit_rows_keep_a_zero_row() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# ---- schedules


def test_the_weight_of_anchoring_falls_in_a_line_to_its_end() -> None:
    objective = Objective(anchoring=2.0, anchoring_end=0.5)
    found = [anchoring_weight(objective, share) for share in (0.0, 0.25, 0.5, 0.9)]
    assert found == [2.0, 1.0, 0.0, 0.0]
    assert anchoring_weight(Objective(anchoring=2.0), 1.0) == 2.0


def test_the_power_falls_in_a_line_from_its_start() -> None:
    objective = Objective(p_norm=1, p_end=0.2, p_start=0.5)
    assert [p_of(objective, share) for share in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 1.0, 0.6, 0.2])
    assert p_of(Objective(p_start=1.0), 1.0) == 1.0
