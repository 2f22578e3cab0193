"""What a spec says of a dictionary becomes the values of pipeline.sdl: the same defaults, and nothing gets lost."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.sdl.dictionary.activations import ACTIVATIONS, BatchTopK, Gated, JumpReLU, Products, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import Resampling, TrainingConfig
from pipeline.sdl.train.objective import Objective
from workers.settings.dictionaries import (
    ActivationSettings,
    AnchoringSettings,
    DictionarySettings,
    InitialisationSettings,
    LossSettings,
    ResamplingSettings,
)

SECTION = type(BaseModel)
LEAST = {"name": "sae", "input": "resid_post.1", "latents": 64}


def parse(**keys: Any) -> DictionarySettings:
    return DictionarySettings.model_validate({**LEAST, **keys})


def trained(settings: DictionarySettings) -> TrainingConfig:
    return settings.training(steps=1000, batch_rows=4096, seed=0)


def defaults_of(value: type) -> dict[str, Any]:
    return {
        f.name: f.default if f.default is not MISSING else f.default_factory()
        for f in fields(value)
        if f.default is not MISSING or f.default_factory is not MISSING
    }


def defaults_of_section(section: type[BaseModel]) -> dict[str, Any]:
    return {name: field.default for name, field in section.model_fields.items() if not field.is_required()}


# ---- defaults


@pytest.mark.parametrize(
    ("section", "value"), [(ResamplingSettings, Resampling), (InitialisationSettings, Initialisation)]
)
def test_sections_have_the_defaults_of_their_values(section: type[BaseModel], value: type) -> None:
    assert defaults_of_section(section) == defaults_of(value)


def test_loss_and_anchoring_have_the_defaults_of_the_objective() -> None:
    names = {"anchoring": "weight", "anchoring_distance": "distance", "anchoring_end": "end"}
    anchoring = defaults_of_section(AnchoringSettings)
    of_anchoring = {name: anchoring[key] for name, key in names.items()}
    assert {**defaults_of_section(LossSettings), **of_anchoring} == defaults_of(Objective)
    assert AnchoringSettings(name="a").first == defaults_of(TrainingConfig)["anchors_first"]


def test_the_shortest_dictionary_is_the_default_one() -> None:
    settings = parse()
    assert settings.config({"resid_post.1": 8}) == DictionaryConfig(
        ("resid_post.1",), ("resid_post.1",), (8,), (8,), 64, TopK()
    )
    expected = defaults_of(TrainingConfig)
    assert settings.objective() == expected["objective"] == Objective()
    assert settings.warmup == expected["warmup_share"]
    assert settings.decay == expected["decay_share"]
    assert settings.decoder_norm == expected["decoder_norm"]
    assert settings.clip == expected["clip"]
    assert settings.tied == expected["tied"]
    assert trained(settings).resampling == expected["resampling"]
    assert trained(settings).initialisation == expected["initialisation"]
    assert trained(settings).products == expected["products"]
    assert settings.problems() == []


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_have_their_own_defaults(kind: str) -> None:
    assert ActivationSettings(kind=kind).activation() == ACTIVATIONS[kind]()


# ---- every key reaches its value


def other(value: Any) -> Any:
    """A value of the same kind that is not the default."""
    return {True: False, False: True}.get(value, 0.75 if value is None else value + 0.125) if value != () else (3, 9)


@pytest.mark.parametrize("name", LossSettings.model_fields)
def test_each_key_of_the_loss_reaches_the_objective(name: str) -> None:
    changed = 7 if name == "auxk_k" else other(LossSettings.model_fields[name].default)
    objective = parse(loss={name: changed}).objective()
    assert objective != Objective()
    assert objective == Objective(**{name: changed})


@pytest.mark.parametrize(
    ("section", "activation"),
    [
        ({"kind": "topk", "k": 5}, TopK(5)),
        ({"k": 5}, TopK(5)),
        ({"kind": "batch_topk", "k": 5}, BatchTopK(5)),
        ({"kind": "relu"}, ReLU()),
        ({"kind": "jumprelu", "threshold": 0.5, "bandwidth": 0.25}, JumpReLU(0.5, 0.25)),
        ({"kind": "jumprelu", "threshold": 0}, JumpReLU(threshold=0)),
        ({"kind": "gated"}, Gated()),
    ],
)
def test_each_key_of_the_activation_reaches_it(section: dict[str, Any], activation: TopK) -> None:
    assert parse(activation=section).config({"resid_post.1": 8}).activation == activation


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "relu", "k": 5}, "relu has no k"),
        ({"kind": "gated", "threshold": 1, "k": 5}, "gated has no k and no threshold"),
        ({"kind": "topk", "bandwidth": 1}, "topk has no bandwidth"),
        ({"kind": "jumprelu", "k": 1}, "jumprelu has no k"),
    ],
)
def test_what_an_activation_does_not_have(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(activation=section)


def test_anchoring_reaches_the_objective() -> None:
    settings = parse(anchors={"name": "languages", "weight": 0.5, "distance": "cosine", "end": 0.25, "first": False})
    assert settings.objective() == Objective(anchoring=0.5, anchoring_distance="cosine", anchoring_end=0.25)
    assert settings.anchors is not None
    assert not settings.anchors.first


def test_the_name_of_an_anchor_set_is_a_section_of_defaults() -> None:
    assert parse(anchors="languages").anchors == AnchoringSettings(name="languages")


def test_resampling_and_initialisation() -> None:
    settings = parse(
        resampling={"at": [0.5], "rows": 10, "encoder_scale": 0.5},
        initialisation={"encoder": "independent", "encoder_scale": 2, "decoder_norm": 0.1},
        decoder_norm="free",
    )
    assert trained(settings).resampling == Resampling((0.5,), 10, 0.5)
    assert trained(settings).initialisation == Initialisation("independent", 2, 0.1)
    assert settings.problems() == []
    assert trained(parse(resampling={})).resampling == Resampling()


def test_every_key_of_the_training_reaches_it() -> None:
    settings = parse(
        loss={"auxk": 0.25},
        learning_rate=0.5,
        warmup=0.1,
        decay=0.3,
        decoder_norm="free",
        clip=7,
        tied=True,
        dead_after_rows=123,
        anchors={"name": "a", "weight": 0.75, "first": False},
        resampling={"at": [0.4]},
        initialisation={"decoder_norm": 0.2},
        precision="bfloat16",
    )
    assert settings.training(steps=10, batch_rows=20, seed=30) == TrainingConfig(
        steps=10,
        batch_rows=20,
        learning_rate=0.5,
        objective=Objective(auxk=0.25, anchoring=0.75),
        warmup_share=0.1,
        decay_share=0.3,
        dead_after_rows=123,
        decoder_norm="free",
        clip=7,
        resampling=Resampling((0.4,)),
        initialisation=Initialisation(decoder_norm=0.2),
        tied=True,
        anchors_first=False,
        products=Products(selection="bfloat16", dense="bfloat16"),
        seed=30,
    )


@pytest.mark.parametrize("keys", [{"loss": {"p_norm": 1, "p_end": 1.5}}, {"anchors": {"name": "a", "end": 3}}])
def test_shares_above_one(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        parse(**keys)


def test_sites_that_are_anchored() -> None:
    transcoder = parse(input="mlp_in.1", output="mlp_out.1").config({"mlp_in.1": 4, "mlp_out.1": 4})
    sites = {side: AnchoringSettings(name="a", sides=side).sites(transcoder) for side in ("both", "encoder", "decoder")}
    assert sites == {"both": ("mlp_in.1", "mlp_out.1"), "encoder": ("mlp_in.1",), "decoder": ("mlp_out.1",)}


def test_exact_is_the_plain_formula() -> None:
    assert trained(parse(exact=True)).products == Products(sparse=False, selection="float32")
    assert [trained(parse(exact=exact)).fused for exact in (False, True)] == [True, False]


def test_the_precision_of_products() -> None:
    assert trained(parse()).products == trained(parse(precision="auto")).products == Products()
    for kind in ("float32", "bfloat16"):
        assert trained(parse(precision=kind)).products == Products(selection=kind, dense=kind)
    with pytest.raises(ValidationError, match="precision"):
        parse(precision="float16")


def test_the_shape_reaches_the_config() -> None:
    layers = parse(input="mlp_in.{1,2}", output="mlp_out.{1,2}", cross_layer=True, skip=True)
    widths = {"mlp_in.1": 4, "mlp_in.2": 4, "mlp_out.1": 5, "mlp_out.2": 5}
    config = layers.config(widths)
    assert (config.input, config.output) == (("mlp_in.1", "mlp_in.2"), ("mlp_out.1", "mlp_out.2"))
    assert (config.input_widths, config.output_widths) == ((4, 4), (5, 5))
    assert (config.cross_layer, config.skip, config.latents) == (True, True, 64)
    models = parse(input=["base/resid_post.{4,8}", "tuned/resid_post.4"], shared_latents=9)
    assert models.input == ("base/resid_post.4", "base/resid_post.8", "tuned/resid_post.4")
    assert models.config(dict.fromkeys(models.input, 8)).shared_latents == 9


# ---- what does not go together is found in the spec


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"activation": {"k": 65}}, "activation.k must be a whole number between 1 and latents = 64, not 65"),
        ({"activation": {"kind": "relu"}}, "nothing makes a relu dictionary sparse"),
        ({"loss": {"prefixes": [9, 3]}}, "prefixes must ascend from 1, unlike 9, 3"),
        ({"loss": {"l1": 5}}, "topk fixes how many latents are active with k; l1 would only shrink them"),
        ({"loss": {"tanh_scale": 2}}, r"loss\.tanh_scale has no effect without loss\.tanh: give"),
        (
            {"loss": {"sparsity_warmup": 0.5}},
            r"loss\.sparsity_warmup has no effect without loss\.l1 or",
        ),
        ({"loss": {"auxk": 0, "auxk_k": 9}}, r"loss\.auxk_k has no effect without loss\.auxk:"),
        ({"skip": True}, "skip: resid_post.1 is input and output, so the skip alone would reconstruct it"),
        (
            {"input": "resid_post.{1,2}", "output": "resid_post.{2,3}", "skip": True},
            "skip: resid_post.2 is input and output",
        ),
        (
            {"input": ["mlp_in.2", "mlp_in.1"], "output": ["mlp_out.2", "mlp_out.1"], "cross_layer": True},
            "of the same layers, ascending, one site of each: .* not mlp_in.2, mlp_in.1 and mlp_out.2, mlp_out.1",
        ),
        (
            {"input": "mlp_in.{1,2}", "output": ["mlp_out.2", "mlp_out.1"], "cross_layer": True},
            "of the same layers, ascending",
        ),
        ({"cross_layer": True}, "not 1 in and 1 out"),
        ({"shared_latents": 3}, "shared_latents are those of a crosscoder"),
        (
            {"initialisation": {"decoder_norm": 0.1}},
            "initialisation.decoder_norm other than 1 needs decoder_norm: free",
        ),
        (
            {"activation": {"kind": "gated"}, "loss": {"l1": 2}, "decoder_norm": "free"},
            "decoder_norm: free does not go with gated",
        ),
        ({"resampling": {"at": [0.5, 0.25]}}, "resampling.at must be shares of the steps"),
        ({"resampling": {"at": []}}, "resampling.at has no event: leave resampling out"),
        (
            {"resampling": {}, "dead_after_rows": 10**12},
            "none ever begins anew: lower dead_after_rows",
        ),
        ({"warmup": 0.5, "decay": 0.75}, r"warmup \(0.5 of the steps\) and decay \(0.75\) overlap"),
        ({"anchors": {"name": "a", "weight": 0, "end": 0.5}}, r"anchors\.end has no effect with weight 0"),
        (
            {"anchors": {"name": "a", "weight": 0, "distance": "cosine"}},
            "anchors.distance has no effect with",
        ),
        ({"tied": True, "output": "mlp_out.1"}, "only be its decoder's transpose where the output is the input"),
        ({"tied": True, "initialisation": {"encoder_scale": 0.5}}, "initialisation.encoder and encoder_scale have no"),
        ({"exact": True, "precision": "bfloat16"}, "exact means float32 throughout, and precision is bfloat16"),
        ({"input": ["resid_post.1", "resid_post.1"]}, "a site is given twice: resid_post.1, resid_post.1"),
    ],
)
def test_problems_are_told_before_anything_runs(keys: dict[str, Any], problem: str) -> None:
    (found,) = parse(**keys).problems()
    assert re.search(problem, found)


def test_the_documentation_names_every_key() -> None:
    text = (Path(__file__).parents[3] / "docs" / "spec.md").read_text()
    table = text[text.index("train.dictionaries[]") : text.index("**evaluate**")]
    for name, field in DictionarySettings.model_fields.items():
        section = next((s for s in (field.annotation, *get_args(field.annotation)) if isinstance(s, SECTION)), None)
        for key in [name] if section is None else [f"{name}.{inner}" for inner in section.model_fields]:
            assert f"`{key}`" in table or key == "anchors.name", key


def test_a_control_does_not_go_by_the_name_of_the_anchors() -> None:
    """Reports and evaluations take a run of that name for one whose first latents are the subpopulations'."""
    assert AnchoringSettings(name="languages").shown == "languages"
    assert AnchoringSettings(name="languages", control="random").shown == "languages (random)"
