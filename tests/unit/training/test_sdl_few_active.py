"""ReLU, JumpReLU and gated codes once few latents are active: at places, and the same as the formulas in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas import ACTIVATIONS, VARIANTS, config_of, randn, random_dictionary
from hypothesis import given
from hypothesis import strategies as st
from small_training import SETTINGS, SPARSE, make_trainer, train
from test_sdl_losses import CASES, anchors_for, assert_is_the_formula
from torch import Tensor

from pipeline.sdl.dictionary import selection
from pipeline.sdl.dictionary.activations import JumpReLU, Products
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.selection import select_above
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.dictionary.sparse import Places
from pipeline.sdl.train.objective import Objective, evaluate

EXACT = Products(selection="float32")
DENSE = Products(sparse=False)
KINDS = ("relu", "jumprelu", "gated")
OF_KINDS = [(activation, objective) for activation, objective in CASES if activation in KINDS]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many latents are active, codes are sparse: small dictionaries have no other way to few of them."""
    monkeypatch.setattr(selection, "SPARSE_SHARE", 1.0)


def mask(places: Places) -> Tensor:
    return places.dense(torch.ones(len(places.latent))).bool()


# ---- codes at places are the formula


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("activation", "objective"), OF_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_all_its_gradients(variant: str, activation: str, objective: Objective) -> None:
    config = config_of(variant, activation)
    code = random_dictionary(config).codes(randn(20, config.d_in, seed=1).double(), EXACT)[0]
    assert code.places is not None
    assert_is_the_formula(config, objective, EXACT, anchors_for(config), progress=0.7)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("prefixes", [(3,), (2, 5, 11)])
def test_prefixes(activation: str, prefixes: tuple[int, ...]) -> None:
    objective = Objective(l1=2, tanh=1, p_norm=3, prefixes=prefixes)
    assert_is_the_formula(config_of("skip", activation), objective, EXACT, None, progress=1.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("offset", [-0.51, -0.49, -0.01, 0.01, 0.49, 0.51])
@pytest.mark.parametrize("threshold", [0.2, 1.3])
def test_the_gradient_of_thresholds_near_the_jump(offset: float, threshold: float) -> None:
    """One latent, `offset` bandwidths above its threshold: which gradients there are, and their size."""
    bandwidth = 0.8
    config = DictionaryConfig(("x",), ("x",), (1,), (1,), 1, JumpReLU(threshold, bandwidth))
    dictionary, value = Dictionary(config).double(), threshold + offset * bandwidth
    with torch.no_grad():
        dictionary.W_enc.fill_(1)
        dictionary.W_dec.fill_(1)
        dictionary.only.own("threshold").fill_(threshold)
    (code,) = dictionary.codes(torch.tensor([[value]]).double(), EXACT)
    assert code.places is not None
    active = dictionary.only.activation.active(code, dictionary.only).sum()
    assert active.item() == float(offset > 0)
    assert code.values.sum().item() == pytest.approx(value if offset > 0 else 0)
    slope = 1 / bandwidth if abs(offset) < 0.5 else 0
    for output, expected in ((active, -slope), (code.values.sum(), -threshold * slope)):
        dictionary.zero_grad()
        output.backward(retain_graph=True)
        found = dictionary.only.own("threshold").grad
        assert (0 if found is None else found.item()) == pytest.approx(expected)


@pytest.mark.parametrize("products", [EXACT, Products()])
@pytest.mark.parametrize("activation", KINDS)
def test_a_code_without_any_active_latent(activation: str, products: Products) -> None:
    """All latents are silent on all rows: the error remains, and its gradient for b_dec."""
    dictionary, x = random_dictionary(config_of("sae", activation)).float(), randn(20, 6, seed=1)
    with torch.no_grad():
        dictionary.b_enc.sub_(100)
    objective = SPARSE[activation] if activation == "jumprelu" else Objective(l1=1, tanh=1, p_norm=1)
    codes = dictionary.codes(x, products)
    assert codes[0].places is not None
    assert len(codes[0].values) == 0
    assert codes[0].firings().tolist() == [0] * 14
    found = evaluate(objective, dictionary, x, x, codes, None, None, 1.0)
    found.loss.backward()
    assert found.loss.isfinite()
    assert dictionary.b_dec.grad.any()
    assert not dictionary.W_dec.grad.any()
    assert not dictionary.W_enc.grad.any()


# ---- which entries there are


@given(st.integers(1, 600), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([-1.0, 0.0, 2.5]))
def test_all_that_are_above_and_no_others(rows: int, latents: int, seed: int, floor: float) -> None:
    """In float32, of whole numbers, whose products are exact; over several slabs; with a floor for each latent too."""
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((rows, 3), (latents, 3), (latents,))
    )
    floors = floor + torch.arange(latents) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SPARSE_SHARE", 1.0)
        for given_floor in (floor, floors):
            places = select_above(x, W_enc, b_enc, given_floor, torch.float32)
            assert places is not None
            assert torch.equal(mask(places), x @ W_enc.T + b_enc > given_floor)
            assert (places.row * latents + places.latent).diff().gt(0).all()  # row after row, ascending


@pytest.mark.parametrize(("active", "sparse"), [(29, True), (30, True), (31, False), (500, False)])
def test_not_once_too_many_are_active(active: int, sparse: bool) -> None:
    """The share of 1,000 latents that is still worth it."""
    b_enc = torch.full((1000,), -1.0)
    b_enc[:active] = 1
    places = select_above(torch.zeros(300, 4), torch.zeros(1000, 4), b_enc, 0.0, torch.float32)
    assert (places is not None) == sparse


def test_many_active_latents_make_a_dense_code() -> None:
    for activation in KINDS:
        (code,) = random_dictionary(config_of("sae", activation)).codes(randn(20, 6).double(), EXACT)
        assert code.places is None


@pytest.mark.parametrize("bias", [0.0, -4.0])
@pytest.mark.parametrize("floor", [0.0, 2.0, 5.0])
def test_bfloat16_misses_next_to_nothing(bias: float, floor: float) -> None:
    """At most one of ten thousand entries above the floor, and none that is far above it."""
    x, W_enc = randn(3000, 96, seed=4), torch.nn.functional.normalize(randn(512, 96, seed=5), dim=1) * 1.3
    b_enc = torch.full((512,), bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SPARSE_SHARE", 1.0)
        places = select_above(x, W_enc, b_enc, floor, torch.bfloat16)
    assert places is not None
    exact = x.double() @ W_enc.double().T + bias
    found, above = mask(places), exact > floor
    missed = above & ~found
    assert int(missed.sum()) <= 1e-4 * int(above.sum())
    assert not missed.any() or (exact[missed] - floor).max() < 0.01 * 1.3
    surplus = exact[found & ~above]
    assert (surplus > floor - 0.15).all()  # what is looked at in vain is near the floor
    assert len(surplus) < 0.15 * int(above.sum()) + 50


@pytest.mark.parametrize("activation", KINDS)
def test_what_bfloat16_misses_is_no_part_of_the_loss(activation: str) -> None:
    """Loss and gradients with entries that were found in bfloat16 are those of the dense float32 code."""
    config = DictionaryConfig(("x",), ("x",), (48,), (48,), 1024, ACTIVATIONS[activation])
    dictionary, x = Dictionary(config), randn(600, 48, seed=7)
    dictionary.initialise(0)
    with torch.no_grad():
        dictionary.b_enc.fill_(-2.2)
        if activation == "gated":
            dictionary.only.own("b_mag").fill_(-1.0)
    # Without p_norm, whose slope at an entry near zero is a matter of its last bits.
    objective = Objective(l1=3, tanh=1, **({"l0": 0.1} if activation == "jumprelu" else {}))
    results = []
    for products in (DENSE, Products()):
        codes = dictionary.codes(x, products)
        assert (codes[0].places is None) == (products is DENSE)
        dictionary.zero_grad()
        found = evaluate(objective, dictionary, x, x, codes, None, None, 1.0)
        found.loss.backward()
        gradients = {n: p.grad.clone() for n, p in dictionary.named_parameters()}
        results.append((found.loss.item(), codes[0].firings(), gradients))
    (loss, firings, wanted), (sparse_loss, sparse_firings, found_gradients) = results
    assert sparse_loss == pytest.approx(loss, rel=1e-5)
    assert (firings - sparse_firings).abs().sum() <= 1e-4 * firings.sum()
    for name, gradient in wanted.items():
        difference = torch.linalg.vector_norm(found_gradients[name] - gradient)
        assert difference <= 1e-3 * torch.linalg.vector_norm(gradient), name


# ---- training goes from one to the other


@pytest.mark.parametrize("activation", KINDS)
def test_training_goes_from_dense_to_sparse_codes_without_a_jump(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents fall silent in the course of training; the losses are those of a training with dense codes alone."""
    config = replace(VARIANTS["sae"], latents=64, activation=ACTIVATIONS[activation])
    monkeypatch.setattr(selection, "SPARSE_SHARE", 0.2)
    objective = {"relu": Objective(l1=40), "gated": Objective(l1=40), "jumprelu": Objective(l0=0.4)}[activation]
    settings = replace(SETTINGS, steps=120, objective=objective, learning_rate=0.01)
    kinds: list[bool] = []

    def seen(*arguments: Any) -> Places | None:
        places = select_above(*arguments)
        kinds.append(places is not None)
        return places

    monkeypatch.setattr("pipeline.sdl.dictionary.activations.select_above", seen)
    of_dense = train(make_trainer(replace(settings, products=DENSE), config), range(120))
    assert not kinds
    found = train(make_trainer(replace(settings, products=EXACT), config), range(120))
    assert not kinds[0]
    assert kinds[-1]
    for one, other in zip(found, of_dense, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
        assert one.l0 == pytest.approx(other.l0, abs=0.2)


# ---- dense products in bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_products_in_bfloat16_are_near(variant: str, activation: str) -> None:
    """bfloat16 has 8 bits: each factor is off by up to 0.2 %, which a sum over a row's entries averages."""
    config = config_of(variant, activation)
    losses = []
    for dense in ("float32", "bfloat16"):
        products = Products(sparse=activation in ("topk", "batch_topk"), selection="float32", dense=dense)
        settings = replace(SETTINGS, objective=SPARSE[activation], products=products, steps=100)
        trainer = make_trainer(settings, config)
        losses.append([m.loss for m in train(trainer, range(30))])
        assert {p.dtype for p in trainer.dictionary.parameters()} == {torch.float32}
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.01)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0] or activation in ("topk", "batch_topk")


def test_what_is_selected_stays_float32() -> None:
    """With the code at places nothing is a dense product: not a bit changes."""
    objective = Objective(auxk=0)
    found = []
    for dense in ("float32", "bfloat16"):
        trainer = make_trainer(replace(SETTINGS, objective=objective, products=Products(dense=dense)), VARIANTS["sae"])
        found.append(train(trainer, range(10)))
    assert found[0] == found[1]
