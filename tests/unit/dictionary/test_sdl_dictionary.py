"""Shapes and blocks of every variant, how weights begin, normalisation and how it is folded in, and what is refused."""

from dataclasses import replace

import pytest
import torch
from formulas import ACTIVATIONS, LATENTS, ROWS, VARIANTS, config_of, randn, random_dictionary
from small_training import SETTINGS, make_trainer
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import Activation, Gated, JumpReLU, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.dictionary.shape import config_of as config_from
from workers.tensors import to_numpy

SITE = ("resid_post.1",)


def normalisation(widths: tuple[int, ...], seed: int) -> Normalisation:
    """Each site has a mean of its own and a scale of its own."""
    scales = torch.linspace(0.1, 0.4, len(widths)).repeat_interleave(torch.tensor(widths))
    return Normalisation(3 * randn(sum(widths), seed=seed), scales)


# ---- shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(variant: str) -> None:
    config = VARIANTS[variant]
    dictionary = random_dictionary(config).requires_grad_(False)
    x = randn(ROWS, config.d_in)
    z = dictionary.encode(x)
    assert z.shape == (ROWS, config.total_latents)
    assert dictionary(x).shape == (ROWS, config.d_out)
    assert dictionary.b_dec.shape == (config.d_out,)
    assert (dictionary.W_skip is None) == (variant != "skip")
    if variant != "cross_layer":
        assert dictionary.W_enc.shape == (LATENTS, config.d_in)
        assert dictionary.W_dec.shape == (LATENTS, config.d_out)
        assert dictionary.b_enc.shape == (LATENTS,)


def test_the_blocks_of_a_cross_layer_transcoder() -> None:
    config = DictionaryConfig(("a", "b", "c"), ("d", "e", "f"), (2, 3, 4), (5, 6, 7), 8, TopK(2), cross_layer=True)
    blocks = config.blocks()
    assert [b.reads for b in blocks] == [slice(0, 2), slice(2, 5), slice(5, 9)]
    assert [b.writes for b in blocks] == [slice(0, 18), slice(5, 18), slice(11, 18)]
    assert [b.written_widths for b in blocks] == [(5, 6, 7), (6, 7), (7,)]
    assert (config.total_latents, config.d_in, config.d_out) == (24, 9, 18)
    dictionary = random_dictionary(config).requires_grad_(False)
    assert [tuple(b.W_enc.shape) for b in dictionary.each_block()] == [(8, 2), (8, 3), (8, 4)]
    assert [tuple(b.W_dec.shape) for b in dictionary.each_block()] == [(8, 18), (8, 13), (8, 7)]
    x = randn(ROWS, 9)
    changed = x.clone()
    changed[:, 5:] += 1  # the last layer's input
    assert torch.equal(dictionary(x)[:, :11], dictionary(changed)[:, :11])  # reaches the last output alone
    assert not torch.equal(dictionary(x)[:, 11:], dictionary(changed)[:, 11:])


def test_stored_activations_are_encoded_as_they_are() -> None:
    dictionary = random_dictionary(VARIANTS["transcoder"]).float().requires_grad_(False)
    x = randn(ROWS, 6).to(torch.bfloat16)
    torch.testing.assert_close(dictionary.encode(x), dictionary.encode(x.float()), rtol=0, atol=0)


def test_a_skip_transcoder_decodes_with_its_input() -> None:
    dictionary = random_dictionary(VARIANTS["skip"]).requires_grad_(False)
    x = randn(ROWS, 6).double()
    z = dictionary.encode(x)
    with pytest.raises(ValueError, match=r"decode\(z, x\)"):
        dictionary.decode(z)
    torch.testing.assert_close(
        dictionary.decode(z, x), z @ dictionary.W_dec + dictionary.b_dec + x @ dictionary.W_skip.T
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_record_gives_the_config_back(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    assert config_from(config.record()) == config


# ---- how weights begin


def test_initial_weights_follow_the_seed_and_are_unit_rows() -> None:
    one, two, other = (Dictionary(VARIANTS["sae"]) for _ in range(3))
    for dictionary, seed in ((one, 0), (two, 0), (other, 1)):
        dictionary.initialise(seed)
    assert torch.equal(one.W_dec, two.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(LATENTS))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoder", ["transposed", "independent"])
def test_the_encoder_begins_as_the_decoder_where_output_is_input(variant: str, encoder: str) -> None:
    dictionary = Dictionary(VARIANTS[variant])
    dictionary.initialise(0, Initialisation(encoder, encoder_scale=0.5, decoder_norm=0.1))
    for block in dictionary.each_block():
        torch.testing.assert_close(block.W_enc.norm(dim=1), torch.full((LATENTS,), 0.5))
        torch.testing.assert_close(block.W_dec.norm(dim=1), torch.full((LATENTS,), 0.1))
        if VARIANTS[variant].is_autoencoder:
            same = torch.allclose(block.W_enc, 5 * block.W_dec)
            assert same == (encoder == "transposed")


@pytest.mark.parametrize("decoder_norm", [1.0, 0.25])
@pytest.mark.parametrize("activation", [ReLU(), Gated()])
def test_codes_that_begin_dense_reconstruct_no_more_than_the_input(activation: Activation, decoder_norm: float) -> None:
    dictionary = Dictionary(DictionaryConfig(("x",), ("x",), (16,), (16,), 2048, activation))
    dictionary.initialise(0, Initialisation(decoder_norm=decoder_norm))
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    share = (dictionary(x) * x).sum() / x.square().sum()
    assert share.item() == pytest.approx(1, abs=0.05)
    dictionary.initialise(0, Initialisation(encoder_scale=1, decoder_norm=decoder_norm))
    assert (dictionary(x) * x).sum() / x.square().sum() > 60 * decoder_norm


def test_other_encoders_begin_with_norm_one() -> None:
    for activation, latents in ((TopK(2), 2048), (JumpReLU(), 2048), (ReLU(), 32)):
        dictionary = Dictionary(DictionaryConfig(("x",), ("x",), (16,), (16,), latents, activation))
        dictionary.initialise(0)
        torch.testing.assert_close(dictionary.W_enc.norm(dim=1), torch.ones(latents))


def test_a_decoder_of_norm_zero_leaves_an_encoder() -> None:
    for variant in ("sae", "shared", "transcoder"):
        dictionary = Dictionary(VARIANTS[variant])
        dictionary.initialise(0, Initialisation(decoder_norm=0))
        assert not dictionary.W_dec.any()
        torch.testing.assert_close(dictionary.W_enc.norm(dim=1), torch.ones(LATENTS))


def test_shared_latents_begin_with_one_decoder_of_the_same_norm() -> None:
    dictionary = Dictionary(VARIANTS["shared"])
    dictionary.initialise(0)
    a, b = dictionary.W_dec.split(4, dim=1)
    assert torch.equal(a[:5], b[:5])
    assert not (a[5:] == b[5:]).any()
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(LATENTS))
    dictionary.tie_shared()
    assert torch.equal(dictionary.W_dec[:5, :4], dictionary.W_dec[:5, 4:])


# ---- normalisation


def test_normalisation_is_the_formula() -> None:
    x = randn(ROWS, 6).to(torch.bfloat16)
    norm = Normalisation(randn(6, seed=1), torch.full((6,), 0.5))
    torch.testing.assert_close(norm(x), (x.float() - norm.mean) * 0.5)
    assert norm(x).dtype == torch.float32


def test_normalised_rows_have_mean_zero_and_a_squared_norm_of_d_at_each_site() -> None:
    sites = [2 + 3 * randn(5000, 6), 40 * randn(5000, 4, seed=1) - 7]
    parts = [Normalisation.of(x.mean(0), float((x - x.mean(0)).square().sum(1).mean())) for x in sites]
    found = Normalisation.side_by_side(parts)(torch.cat(sites, dim=1))
    torch.testing.assert_close(found.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    for site in found.split([6, 4], dim=1):
        assert site.square().sum(1).mean().item() == pytest.approx(site.shape[1], rel=1e-4)


@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        (torch.ones(4), 0.0),
        (torch.ones(4), float("nan")),
        (torch.ones(4), float("inf")),
    ],
    ids=["constant", "nan", "infinite"],
)
def test_activations_that_cannot_be_normalised(mean: Tensor, variance: float) -> None:
    with pytest.raises(InputError, match=r"cannot be normalised: .*constant columns, or nan in the harvest"):
        Normalisation.of(mean, variance)


def test_a_mean_with_nan_names_its_column() -> None:
    with pytest.raises(InputError, match=r"the mean of column 1 is not finite \(1 such columns\)"):
        Normalisation.of(torch.tensor([1, torch.nan]), 1.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_equals_the_normalised_path(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    dictionary = random_dictionary(config).requires_grad_(False)
    for number, block in enumerate(dictionary.each_block()):
        if activation == "batch_topk":
            block.own("threshold").copy_(randn(LATENTS, seed=number).abs())
    x_norm, y_norm = normalisation(config.input_widths, 1), normalisation(config.output_widths, 2)
    if config.is_autoencoder:
        y_norm = x_norm
    x = 3 + 10 * randn(ROWS, config.d_in, seed=3)
    inputs = (x.double() - x_norm.mean) * x_norm.scale
    z = dictionary.encode(inputs)
    y = dictionary.decode(z, inputs) / y_norm.scale + y_norm.mean
    folded = dictionary.folded(x_norm, y_norm)
    assert folded.b_dec.dtype == torch.float32
    torch.testing.assert_close(folded.encode(x).double(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(x).double(), y, rtol=1e-4, atol=1e-3)
    assert (z > 0).any()


# ---- what is refused


def sites(**changed: object) -> DictionaryConfig:
    return replace(DictionaryConfig(("a.1", "b.1"), ("a.1", "b.1"), (4, 4), (4, 4), LATENTS, TopK(2)), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": (), "input_widths": ()}, "each site has a width; there are 0 sites and 0 widths"),
        ({"input_widths": (4,)}, "each site has a width; there are 2 sites and 1 widths"),
        ({"input": ("a.1", "a.1")}, r"a site is given twice: a\.1, a\.1"),
        (
            {"cross_layer": True, "output": ("c.1",), "output_widths": (4,)},
            "order of layers, .*not 2 in and 1 out",
        ),
        ({"skip": True}, r"skip: a\.1, b\.1 is input and output, so the skip alone would reconstruct it"),
        ({"shared_latents": 15}, "shared_latents must be between 1 and latents = 14, not 15"),
        ({"shared_latents": -1}, "shared_latents must be between 1 and latents = 14, not -1"),
        (
            {"shared_latents": 3, "input_widths": (4, 5), "output_widths": (4, 5)},
            r"shared_latents have one decoder for all sites, which need one width: a\.1 is 4 wide, b\.1 is 5 wide",
        ),
        ({"shared_latents": 3, "output": ("c.1",), "output_widths": (4,)}, "need several output sites and one block"),
        ({"shared_latents": 3, "cross_layer": True}, "need several output sites and one block"),
    ],
)
def test_shapes_that_do_not_fit_together(changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sites(**changed)


def test_rows_of_another_width_are_refused() -> None:
    dictionary = random_dictionary(VARIANTS["crosscoder"])
    with pytest.raises(InputError, match=r"takes rows of .* \(\d\), .*: \[rows, \d+\], not \[\d+, 3\]"):
        dictionary.encode(randn(ROWS, 3))
    width = dictionary.config.d_in
    for wrong in (randn(width), randn(2, width, width)):
        with pytest.raises(InputError, match=r"not \["):
            dictionary.encode(wrong)
    with pytest.raises(InputError, match=r"takes rows of latents \(\d+\)"):
        dictionary.decode(randn(ROWS, 3))


def test_arrays_are_encoded_as_a_store_gives_them() -> None:
    dictionary = random_dictionary(VARIANTS["skip"]).float().requires_grad_(False)
    x = randn(ROWS, dictionary.config.d_in).bfloat16()
    array = to_numpy(x)
    assert array.dtype.name == "bfloat16"
    z = dictionary.encode(array)
    assert torch.equal(z, dictionary.encode(x))
    assert torch.equal(dictionary.decode(z.numpy(), array), dictionary.decode(z, x))


def test_the_skip_of_a_cross_layer_transcoder_reads_no_later_layer() -> None:
    """Trained where later inputs hold earlier outputs, it writes them all the same from what comes before alone."""
    layers = {"input": ("mlp_in.0", "mlp_in.1"), "output": ("mlp_out.0", "mlp_out.1")}
    config = DictionaryConfig(
        **layers, input_widths=(4, 4), output_widths=(3, 3), latents=LATENTS, activation=TopK(1), cross_layer=True,
        skip=True,
    )  # fmt: skip
    trainer = make_trainer(replace(SETTINGS, steps=30), config, plain=True)
    for step in range(30):
        y = randn(64, 6, seed=step)
        x = torch.cat([randn(64, 4, seed=100 + step), y[:, :3], randn(64, 1, seed=200 + step)], dim=1)
        trainer.step(x, y)
    dictionary = trainer.result()
    assert dictionary.W_skip is not None
    assert dictionary.W_skip[:3, :4].any()
    assert dictionary.W_skip[3:, 4:].any()
    x = randn(ROWS, 8)
    changed = torch.cat([x[:, :4], 2 * x[:, 4:]], dim=1)
    torch.testing.assert_close(dictionary(x)[:, :3], dictionary(changed)[:, :3])
    assert not torch.equal(dictionary(x)[:, 3:], dictionary(changed)[:, 3:])


def test_a_cross_layer_transcoder_of_one_layer() -> None:
    with pytest.raises(InputError, match="not 1 in and 1 out"):
        DictionaryConfig(SITE, ("mlp_out.1",), (4,), (4,), LATENTS, Gated(), cross_layer=True)
