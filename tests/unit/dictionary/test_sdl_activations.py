"""Each activation in every variant against direct formulas in float64, in training and afterwards; what is refused."""

from dataclasses import replace

import pytest
import torch
from formulas import ACTIVATIONS, LATENTS, ROWS, VARIANTS, Formulas, config_of, leaves, randn, random_dictionary
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import BatchTopK, JumpReLU, Products, TopK, activation_of, activation_record
from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.selection import dense_top_k

DENSE, SPARSE = Products(sparse=False), Products(sparse=True, selection="float32")


def rows_of(config_d_in: int, seed: int = 1) -> Tensor:
    return randn(ROWS, config_d_in, seed=seed).double()


def dense(code: Code) -> Tensor:
    return code.values if code.places is None else code.places.dense(code.values)


@pytest.mark.parametrize("products", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_reconstructions_and_their_gradients(variant: str, activation: str, products: Products) -> None:
    """Any function of the reconstruction and the code: here their products with random numbers."""
    config = config_of(variant, activation)
    dictionary = random_dictionary(config)
    x = rows_of(config.d_in)
    codes = dictionary.codes(x, products)
    (y,) = dictionary.reconstructions(codes, x)
    direct = Formulas(config, leaves(dictionary), x, torch.zeros(ROWS, config.d_out).double())
    expected = [direct.code(i) for i in direct.blocks]
    for code, wanted in zip(codes, expected, strict=True):
        torch.testing.assert_close(dense(code), wanted.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(code.firings(), (wanted > 0).sum(0))
    torch.testing.assert_close(y, direct.reconstruction().detach(), rtol=1e-12, atol=1e-12)

    to_y, to_code = randn(*y.shape, seed=2).double(), randn(ROWS, LATENTS, seed=3).double()
    ((y * to_y).sum() + sum((dense(code) * to_code).sum() for code in codes)).backward()
    ((direct.reconstruction() * to_y).sum() + sum((direct.code(i) * to_code).sum() for i in direct.blocks)).backward()
    for name, parameter in dictionary.named_parameters():
        found, wanted = parameter.grad, direct.weights[name].grad
        if wanted is None or not wanted.any():
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "batch_topk"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_dictionary_encodes_as_it_did_in_training(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    dictionary = random_dictionary(config).requires_grad_(False)
    x = rows_of(config.d_in)
    direct = Formulas(config, leaves(dictionary), x, torch.zeros(ROWS, config.d_out).double())
    expected = torch.cat([direct.code(i) for i in direct.blocks], dim=1).detach()
    torch.testing.assert_close(dictionary.encode(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dictionary(x), direct.reconstruction().detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_batch_top_k_dictionary_encodes_with_its_thresholds(variant: str) -> None:
    config = config_of(variant, "batch_topk")
    dictionary = random_dictionary(config).requires_grad_(False)
    x = rows_of(config.d_in)
    with pytest.raises(InputError, match="not calibrated yet"):
        dictionary.encode(x)
    thresholds = []
    for number, block in enumerate(dictionary.each_block()):
        thresholds.append(randn(LATENTS, seed=number).double() * 0.5)  # negative ones let no negative value pass
        block.own("threshold").copy_(thresholds[-1])
    direct = Formulas(config, leaves(dictionary), x, torch.zeros(ROWS, config.d_out).double())
    pre = [direct.preactivations(i) for i in direct.blocks]
    expected = torch.cat([p * ((p > t) & (p > 0)) for p, t in zip(pre, thresholds, strict=True)], dim=1)
    torch.testing.assert_close(dictionary.encode(x), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated", "relu"])
def test_in_float32_the_code_is_that_of_float64_but_for_rounding(activation: str) -> None:
    config = config_of("sae", activation)
    dictionary = random_dictionary(config)
    x = rows_of(config.d_in)
    direct = Formulas(config, leaves(dictionary), x, x)
    code = dictionary.float().encode(x.float())
    torch.testing.assert_close(code.double(), direct.code(0).detach(), rtol=1e-5, atol=1e-5)


def test_gradients_of_top_k_flow_to_the_kept_entries_alone() -> None:
    preactivations = randn(ROWS, LATENTS).requires_grad_()
    z = dense_top_k(preactivations, 4)
    z.sum().backward()
    torch.testing.assert_close(preactivations.grad, (z > 0).float(), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("products", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_negative_preactivations_are_never_active(activation: str, products: Products) -> None:
    dictionary = random_dictionary(config_of("sae", activation))
    with torch.no_grad():
        dictionary.b_enc.fill_(-1.5)
    (code,) = dictionary.codes(rows_of(6), products)
    assert (dense(code) >= 0).all()
    assert int((dense(code) > 0).sum(1).min()) < 3  # rows with fewer than k positive ones keep only those
    assert (dense(code) > 0).any()


def test_the_weights_of_a_batch_change_which_latents_win() -> None:
    """A latent with a long decoder wins with smaller preactivations: the sum over sites is what counts."""
    config = config_of("crosscoder", "batch_topk")
    dictionary = random_dictionary(config)
    x = rows_of(config.d_in)
    before = dictionary.codes(x, DENSE)[0].firings()
    with torch.no_grad():
        dictionary.W_dec[0] *= 100
    after = dictionary.codes(x, DENSE)[0].firings()
    assert after[0] > before[0]
    assert after[0] == (dictionary.only.preactivations(x)[:, 0] > 0).sum()


def test_decoders_of_norm_one_at_one_site_compete_without_weights() -> None:
    assert random_dictionary(config_of("sae", "batch_topk"), free=False).only.selection_weights() is None
    weights = random_dictionary(config_of("crosscoder", "batch_topk"), free=False).only.selection_weights()
    assert weights is not None
    assert not weights.requires_grad


# ---- straight-through gradients, entry by entry


def test_the_gradient_of_a_jump_relu_threshold_is_that_of_its_window() -> None:
    """-theta / bandwidth for preactivations nearer than half a bandwidth, nothing for others (2407.14435, eq. 11)."""
    config = replace(VARIANTS["sae"], activation=JumpReLU(0.5, 0.2))
    dictionary = Dictionary(config).double()
    biases = [0.39, 0.41, 0.5, 0.59, 0.61, -0.5, 2.0]
    with torch.no_grad():
        dictionary.b_enc[: len(biases)] = torch.tensor(biases)
    (code,) = dictionary.codes(torch.zeros(1, 6).double(), DENSE)
    assert [round(v, 2) for v in code.values[0, :7].tolist()] == [0, 0, 0, 0.59, 0.61, 0, 2.0]
    (3 * code.values).sum().backward()
    expected = [3 * -0.5 / 0.2 * (0.4 < bias < 0.6) for bias in biases]
    torch.testing.assert_close(
        dictionary.only.own("threshold").grad[:7], torch.tensor(expected).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(dictionary.b_enc.grad[:7], torch.tensor([0, 0, 0, 3, 3, 0, 3]).double())


def test_the_gradient_of_a_step_is_that_of_its_window() -> None:
    """-1 / bandwidth, and nothing for the preactivations (2407.14435, eq. 12)."""
    config = replace(VARIANTS["sae"], activation=JumpReLU(0.5, 0.2))
    dictionary = Dictionary(config).double()
    biases = [0.39, 0.41, 0.59, 0.61]
    with torch.no_grad():
        dictionary.b_enc[:4] = torch.tensor(biases)
    (code,) = dictionary.codes(torch.zeros(1, 6).double(), DENSE)
    active = dictionary.only.activation.active(code, dictionary.only)
    assert active[0, :4].tolist() == [0, 0, 1, 1]
    (3 * active).sum().backward()
    expected = torch.tensor([0, -15, -15, 0]).double()
    torch.testing.assert_close(dictionary.only.own("threshold").grad[:4], expected, atol=1e-6, rtol=0)
    assert dictionary.b_enc.grad is None
    assert dictionary.W_enc.grad is None


# ---- records and refusals


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_record_gives_the_activation_back(activation: TopK) -> None:
    assert activation_of(activation_record(activation)) == activation


def test_an_activation_that_is_not_known() -> None:
    with pytest.raises(InputError, match="no activation 'softmax'; there are topk, batch_topk, relu, jumprelu, gated"):
        activation_of({"kind": "softmax"})


@pytest.mark.parametrize("k", [0, -1, LATENTS + 1, 2.5])
@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_k_out_of_range(kind: type[TopK], k: int) -> None:
    expected = rf"activation\.k must be a whole number between 1 and latents = {LATENTS}, not {k}"
    with pytest.raises(InputError, match=expected):
        replace(VARIANTS["sae"], activation=kind(k))


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (JumpReLU(bandwidth=0), "^activation: jumprelu's bandwidth must be above 0 and finite, not 0$"),
        (JumpReLU(bandwidth=float("nan")), "bandwidth must be above 0 and finite, not nan"),
        (JumpReLU(threshold=-0.1), "^activation: jumprelu's threshold must be at least 0 and finite, not -0.1$"),
    ],
)
def test_a_jump_relu_without_a_width_or_below_zero(activation: JumpReLU, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(VARIANTS["sae"], activation=activation)
