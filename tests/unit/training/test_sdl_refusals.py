"""What does not go together is refused with its reason: terms, activations, anchors. And the controls of anchors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from formulas import ACTIVATIONS, LATENTS, VARIANTS, config_of, randn
from small_training import SETTINGS, SPARSE, make_trainer, train

from pipeline.checks import refuse
from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import TopK
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.anchor_controls import controlled
from pipeline.sdl.train.config import Resampling
from pipeline.sdl.train.objective import Anchors, Objective
from pipeline.sdl.train.trainer import DictionaryTrainer

# ---- terms and activations


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_goes_together_is_not_refused(variant: str, activation: str) -> None:
    refuse(SPARSE[activation].reasons(config_of(variant, activation)))


REFUSED: list[tuple[str, str, Objective, str]] = [
    ("sae", "topk", Objective(l1=1), "^topk fixes how many latents are active with k; l1 would only shrink them$"),
    (
        "sae",
        "batch_topk",
        Objective(tanh=1, p_norm=1),
        "^batch_topk fixes .* with k; tanh, p_norm would only shrink them$",
    ),
    ("sae", "topk", Objective(l0=1), "topk fixes .*; l0 is learned through the thresholds of jumprelu; topk has none"),
    ("sae", "relu", Objective(), "^nothing makes a relu dictionary sparse: give one of l1, l0, tanh, p_norm a weight$"),
    ("sae", "gated", Objective(), "^nothing makes a gated dictionary sparse"),
    ("sae", "jumprelu", Objective(), "^nothing makes a jumprelu dictionary sparse"),
    ("sae", "relu", Objective(l0=1), "^l0 is learned through the thresholds of jumprelu; relu has none"),
    ("sae", "gated", Objective(l0=1), "^l0 is learned through the thresholds of jumprelu; gated has none"),
    ("sae", "relu", Objective(l1=1, l0_target=3), "^l0_target is the target of l0, which has no weight$"),
    ("sae", "jumprelu", Objective(l0=1, l0_target=0), "^l0_target must be above 0 and finite, not 0$"),
    (
        "sae",
        "jumprelu",
        Objective(l0=1, l0_target=-3.0),
        "^l0_target must be above 0 and finite, not -3.0",
    ),
    ("sae", "jumprelu", Objective(l0=1, l0_target=15), "^an l0_target of 15 is more than the 14 latents there are$"),
    ("sae", "topk", Objective(preactivation=1), "^preactivation pulls toward a threshold; topk has none"),
    ("sae", "batch_topk", Objective(preactivation=1), "^preactivation pulls toward a threshold; batch_topk has none"),
    ("sae", "relu", Objective(p_norm=1, p_end=0), "^p_end must be a share, above 0 and at most 1, not 0$"),
    ("sae", "relu", Objective(p_norm=1, p_end=1.5), "^p_end must be a share, above 0 and at most 1, not 1.5$"),
    ("cross_layer", "topk", Objective(prefixes=(2,)), "^prefixes are those of one block of latents; a cross-layer"),
    ("sae", "topk", Objective(prefixes=(5, 3)), "^prefixes must ascend from 1, unlike 5, 3$"),
    ("sae", "topk", Objective(prefixes=(3, 3)), "^prefixes must ascend from 1, unlike 3, 3$"),
    ("sae", "topk", Objective(prefixes=(0, 3)), "^prefixes must ascend from 1, unlike 0, 3$"),
    ("sae", "topk", Objective(prefixes=(3, 15)), "^the prefix 15 is larger than latents = 14$"),
    ("sae", "topk", Objective(anchoring_distance="cosin"), "^anchoring_distance is squared or cosine, not 'cosin'$"),
    (
        "sae",
        "relu",
        Objective(l1=-1.0, auxk=-0.5),
        "^l1 must be at least 0 and finite, not -1.0; auxk must be at least 0 and finite, not -0.5$",
    ),
    ("sae", "relu", Objective(l1=float("nan")), "^l1 must be at least 0 and finite, not nan$"),
    ("sae", "topk", Objective(anchoring=float("inf")), "^anchoring must be at least 0 and finite, not inf$"),
    ("sae", "topk", Objective(auxk_k=0), "^auxk_k must be a whole number above 0, not 0$"),
    ("sae", "topk", Objective(anchoring_end=3), "^anchoring_end must be a share, above 0 and at most 1, not 3$"),
    ("sae", "relu", Objective(p_norm=1, p_start=-1), "^p_start must be a share, at least 0 and at most 1, not -1$"),
    ("sae", "relu", Objective(tanh=1, tanh_scale=0), "^tanh_scale must be above 0 and finite, not 0$"),
]


@pytest.mark.parametrize(("variant", "activation", "objective", "message"), REFUSED)
def test_each_refusal_says_why(variant: str, activation: str, objective: Objective, message: str) -> None:
    with pytest.raises(InputError, match=message):
        refuse(objective.reasons(config_of(variant, activation)))
    with pytest.raises(InputError, match=message):  # and none is trained
        make_trainer(replace(SETTINGS, objective=objective), config_of(variant, activation))


def test_all_reasons_at_once() -> None:
    objective = Objective(l1=1, preactivation=1, prefixes=(20, 3), anchoring_distance="far")
    with pytest.raises(InputError) as caught:
        refuse(objective.reasons(config_of("cross_layer", "topk")))
    assert str(caught.value).count("; ") >= 4


# ---- norms and anchors


def test_decoder_norms_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="decoder_norm is unit or free, not 'fixed'"):
        make_trainer(replace(SETTINGS, decoder_norm="fixed"))
    with pytest.raises(InputError, match=r"initialisation\.decoder_norm other than 1 needs decoder_norm: free"):
        make_trainer(replace(SETTINGS, initialisation=Initialisation(decoder_norm=0.1)))
    make_trainer(replace(SETTINGS, decoder_norm="free", initialisation=Initialisation(decoder_norm=0.1)))
    with pytest.raises(InputError, match=r"free does not go with gated: .* decoders would shrink .*; leave it unit"):
        make_trainer(replace(SETTINGS, decoder_norm="free", objective=SPARSE["gated"]), config_of("sae", "gated"))


def test_decoders_of_no_norm_cannot_compete() -> None:
    settings = replace(SETTINGS, decoder_norm="free", initialisation=Initialisation(decoder_norm=0))
    make_trainer(settings)
    with pytest.raises(InputError, match=r"initialisation\.decoder_norm 0 does not go with batch_topk: latents"):
        make_trainer(settings, config_of("transcoder", "batch_topk"))


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5])
def test_seeds_that_cannot_be(seed: float) -> None:
    with pytest.raises(InputError, match=r"seed must be a whole number, at least 0 and below 2\^63, not"):
        make_trainer(replace(SETTINGS, seed=seed))


def with_nan(anchors: torch.Tensor) -> torch.Tensor:
    anchors[1, 2] = torch.nan
    return anchors


BAD_ANCHORS: dict[str, tuple[Callable[[], Anchors], str]] = {
    "too many": (lambda: Anchors(randn(15, 6), randn(15, 5)), "15 anchors do not fit into 14 latents"),
    "another width": (
        lambda: Anchors(randn(2, 5), randn(2, 5)),
        r"anchors of the encoder must be \[2, 6\] for these sites, not \[2, 5\]",
    ),
    "another width of the output": (
        lambda: Anchors(None, randn(2, 6)),
        r"anchors of the decoder must be \[2, 5\] for these sites, not \[2, 6\]",
    ),
    "another number": (
        lambda: Anchors(randn(2, 6), randn(3, 5)),
        r"anchors of the decoder must be \[2, 5\] for these sites, not \[3, 5\]",
    ),
    "none": (lambda: Anchors(None, None), "anchors of neither side: give those of the encoder, of the decoder, or"),
    "nan": (lambda: Anchors(with_nan(randn(2, 6)), randn(2, 5)), "anchors of the encoder hold nan or infinity"),
    "infinite": (lambda: Anchors(None, randn(2, 5) / 0), "anchors of the decoder hold nan or infinity"),
    "zero": (
        lambda: Anchors(None, torch.cat([randn(2, 5), torch.zeros(1, 5)])),
        r"anchor 2 of the decoder is zero \(1 such\), which is no direction",
    ),
}


@pytest.mark.parametrize("what", BAD_ANCHORS)
def test_anchors_that_do_not_fit(what: str) -> None:
    anchors, message = BAD_ANCHORS[what]
    norms = [Normalisation(torch.zeros(d), torch.ones(d)) for d in (6, 5)]
    with pytest.raises(InputError, match=message):
        DictionaryTrainer(Dictionary(VARIANTS["transcoder"]), SETTINGS, *norms, anchors())


def test_an_anchor_that_is_nothing_at_one_layer_of_a_cross_layer_transcoder() -> None:
    config = VARIANTS["cross_layer"]
    encoder = randn(3, config.d_in)
    encoder[2, config.input_widths[0] :] = 0
    norms = [Normalisation(torch.zeros(d), torch.ones(d)) for d in (config.d_in, config.d_out)]
    with pytest.raises(InputError, match=r"anchor 2 of the encoder is zero at the sites of one layer \(1 such\)"):
        DictionaryTrainer(Dictionary(config), SETTINGS, *norms, Anchors(encoder, None))


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_numbers_that_cannot_be(value: float) -> None:
    for name in ("steps", "batch_rows", "dead_after_rows"):
        with pytest.raises(InputError, match=f"{name} must be a whole number above 0, not {value}"):
            make_trainer(replace(SETTINGS, **{name: value}))
    for name in ("learning_rate", "clip"):
        with pytest.raises(InputError, match=f"{name} must be above 0 and finite, not {value}"):
            make_trainer(replace(SETTINGS, **{name: value}))
    with pytest.raises(InputError, match=rf"initialisation\.encoder_scale must be above 0 and finite, not {value}"):
        make_trainer(replace(SETTINGS, initialisation=Initialisation(encoder_scale=value)))
    with pytest.raises(InputError, match=rf"resampling\.encoder_scale must be above 0 and finite, not {value}"):
        make_trainer(replace(SETTINGS, resampling=Resampling(encoder_scale=value)))
    with pytest.raises(InputError, match=rf"resampling\.rows must be a whole number above 0, not {value}"):
        make_trainer(replace(SETTINGS, resampling=Resampling(rows=value)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("warmup", "decay", "message"),
    [
        (1.5, 0, "warmup must be a share, at least 0 and at most 1, not 1.5"),
        (0, -1, "decay must be a share, at least 0 and at most 1, not -1"),
        (float("nan"), 0, "warmup must be a share"),
        (0.9, 0.9, r"warmup \(0.9 of the steps\) and decay \(0.9\) overlap, so that the rate never gets to its peak"),
    ],
)
def test_schedules_that_cannot_be(warmup: float, decay: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(replace(SETTINGS, warmup_share=warmup, decay_share=decay))


def test_a_schedule_of_warm_up_and_decay_alone() -> None:
    trainer = make_trainer(replace(SETTINGS, warmup_share=0.3, decay_share=0.7))
    assert max(map(trainer.learning_rate, range(SETTINGS.steps))) <= SETTINGS.learning_rate


@pytest.mark.parametrize(
    ("initialisation", "message"),
    [
        (Initialisation("tied"), r"initialisation\.encoder is transposed or independent, not 'tied'"),
        (Initialisation(decoder_norm=-1), r"initialisation\.decoder_norm must be at least 0 and finite, not -1"),
    ],
)
def test_beginnings_that_cannot_be(initialisation: Initialisation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(replace(SETTINGS, decoder_norm="free", initialisation=initialisation))


def test_resampling_that_can_never_find_a_dead_latent() -> None:
    rows = SETTINGS.steps * SETTINGS.batch_rows
    settings = replace(SETTINGS, resampling=Resampling((0.5,), rows=1), dead_after_rows=rows // 2 + 1)
    with pytest.raises(InputError, match=r"its last event ends by row .* and a latent counts as dead after .* silent"):
        make_trainer(settings)
    make_trainer(replace(settings, dead_after_rows=rows // 2 - SETTINGS.batch_rows))
    with pytest.raises(InputError, match=r"resampling\.at has no event: leave resampling out"):
        make_trainer(replace(SETTINGS, resampling=Resampling(())))


def test_a_site_has_one_width() -> None:
    with pytest.raises(InputError, match="a is 16 wide as input and 8 as output; a site has one width"):
        DictionaryConfig(("a",), ("a",), (16,), (8,), LATENTS, TopK(4))
    with pytest.raises(InputError, match="b's width must be a whole number above 0, not 0"):
        DictionaryConfig(("a", "b"), ("a",), (16, 0), (16,), LATENTS, TopK(4))
    with pytest.raises(InputError, match="latents must be a whole number above 0, not 0"):
        DictionaryConfig(("a",), ("a",), (16,), (16,), 0, TopK(4))


def test_as_many_anchors_as_latents() -> None:
    norms = [Normalisation(torch.zeros(d), torch.ones(d)) for d in (6, 5)]
    anchors = Anchors(randn(LATENTS, 6), randn(LATENTS, 5))
    trainer = DictionaryTrainer(Dictionary(VARIANTS["transcoder"]), SETTINGS, *norms, anchors)
    assert trainer.anchor_cosine() == pytest.approx(1.0)


def test_lengths_of_anchors_do_not_matter() -> None:
    """Also where their squares vanish in float32."""
    norms = [Normalisation(torch.zeros(d), torch.ones(d)) for d in (6, 5)]
    found = []
    for length in (1.0, 1e-25, 1e25):
        anchors = Anchors(length * randn(2, 6), length * randn(2, 5))
        trainer = DictionaryTrainer(Dictionary(VARIANTS["transcoder"]), SETTINGS, *norms, anchors)
        found.append((trainer.dictionary.W_enc[:2].detach().clone(), train(trainer, range(3))[-1].loss))
    for rows, loss in found:
        torch.testing.assert_close(rows, found[0][0])
        assert loss == pytest.approx(found[0][1], rel=1e-4)


def test_anchored_latents_begin_elsewhere_if_that_is_asked_for() -> None:
    there = make_trainer().anchor_cosine()
    elsewhere = make_trainer(replace(SETTINGS, anchors_first=False)).anchor_cosine()
    assert there == pytest.approx(1.0)
    assert elsewhere is not None
    assert abs(elsewhere) < 0.9


# ---- controls


def test_random_controls_have_the_norms_alone() -> None:
    vectors = {"a": 5 * randn(4, 30), "b": randn(4, 20, seed=1)}
    found = controlled(vectors, "random", 0)
    for site, anchors in vectors.items():
        torch.testing.assert_close(found[site].norm(dim=1), anchors.norm(dim=1))
        assert torch.cosine_similarity(found[site], anchors, dim=1).abs().max() < 0.8


def test_random_controls_are_not_the_initial_weights_of_the_same_seed() -> None:
    dictionary = Dictionary(replace(VARIANTS["sae"], input_widths=(64,), output_widths=(64,)))
    dictionary.initialise(3)
    found = controlled({"resid_post.1": randn(4, 64)}, "random", 3)["resid_post.1"]
    assert torch.cosine_similarity(found, dictionary.W_dec[:4], dim=1).abs().max() < 0.6


def test_shuffled_controls_keep_norms_and_angles() -> None:
    vectors = {"a": 5 * randn(4, 30), "b": randn(4, 20, seed=1)}
    found = controlled(vectors, "shuffled", 0)
    for site, anchors in vectors.items():
        torch.testing.assert_close(found[site] @ found[site].T, anchors @ anchors.T)
        assert torch.equal(found[site].sort(1).values, anchors.sort(1).values)
        assert not torch.equal(found[site], anchors)


def test_controls_follow_the_seed() -> None:
    vectors = {"a": randn(4, 30), "b": randn(4, 30)}
    assert controlled(vectors, "none", 0).keys() == vectors.keys()
    assert torch.equal(controlled(vectors, "none", 0)["a"], vectors["a"])
    for control in ("random", "shuffled"):
        one, again, other = (controlled(vectors, control, seed) for seed in (0, 0, 1))
        assert torch.equal(one["a"], again["a"])
        assert not torch.equal(one["a"], other["a"])
        assert not torch.equal(one["a"], one["b"])  # nothing is shared between sites
    with pytest.raises(InputError, match="control is one of none, random, shuffled, not 'other'"):
        controlled(vectors, "other", 0)
