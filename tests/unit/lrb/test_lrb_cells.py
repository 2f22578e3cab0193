"""Cells of the bench: they are what they are asked to be, give the same figures again, and recover what is known."""

from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.lrb.cells import batches, data_of, make_trainer, train_cell
from pipeline.lrb.data import Bench, Hierarchy, recovery
from pipeline.lrb.methods import ARMS, LAYOUTS, SIZES, TRUTH, Cell, Size, methods, resolve
from pipeline.sdl.dictionary.activations import BatchTopK, JumpReLU, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation

REDUCED = Size(Bench(120, 96, 10_000, 0.95, 0.25), 480, 300, 512, 5e-3, 6, 20)
"""Six features are active on average, of 120 in 96 dimensions."""
QUICK = replace(REDUCED, bench=replace(REDUCED.bench, samples=2000), steps=20, batch_rows=128)
SEEDS = (0, 1, 2)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def trained(method: str, arm: str, seed: int, *changes: tuple[str, Any]) -> dict[str, Any]:
    return train_cell(Cell(REDUCED, method, arm, seed, changes))


# ---- what a cell is


@pytest.mark.parametrize("method", ["topk", *(pytest.param(m, marks=slow) for m in methods(QUICK) if m != "topk")])
def test_every_method_and_arm_gives_the_same_figures_again(method: str) -> None:
    records = {}
    for arm in ARMS:
        first, second = (train_cell(Cell(QUICK, method, arm, 1)) for _ in range(2))
        for record in (first, second):
            assert record.pop("minutes") > 0
            assert record.pop("cpu_minutes") > 0
        assert first == second
        assert (first["method"], first["arm"], first["seed"]) == (method, arm, 1)
        assert 0 < first["decoder"]["mcc"] <= first["decoder"]["m_ip"] <= 1
        records[arm] = first
    assert len({str(record["decoder"]) for record in records.values()}) == 3


@pytest.mark.parametrize("method", ["topk", "transcoder", "crosscoder"])
def test_arms_differ_in_their_anchors_alone(method: str) -> None:
    """The true features of each side, or random directions; the other latents begin alike."""
    size, how = resolve(Cell(QUICK, method, "plain", 1))
    data = data_of(size.bench, 2)
    plain, anchored, random = (make_trainer(size, how, Cell(QUICK, method, arm, 1), data) for arm in ARMS)
    assert plain.config == anchored.config == random.config
    assert plain.anchors is None
    true = {"topk": (0, 0), "transcoder": (0, 1), "crosscoder": (None, None)}[method]
    for trainer, like in ((anchored, True), (random, False)):
        assert trainer.anchors is not None
        for side, source in zip((trainer.anchors.encoder, trainer.anchors.decoder), true, strict=True):
            assert side is not None
            # Random directions, not the true ones' coordinates in another order.
            assert like or not torch.equal(side.sort(1).values, anchored.anchors.encoder.sort(1).values)
            wanted = torch.cat(data.features, dim=1) if source is None else data.features[source]
            assert side is not None
            assert side.shape == wanted[:20].shape
            cosine = functional.cosine_similarity(side, wanted[:20], dim=1)
            assert (cosine.min() > 0.999) if like else (cosine.max() < 0.5)
        assert torch.equal(trainer.dictionary.W_dec[20:], plain.dictionary.W_dec[20:])
        assert torch.equal(trainer.dictionary.W_enc[20:], plain.dictionary.W_enc[20:])


def test_each_side_is_scored_with_its_own_features() -> None:
    cell = Cell(QUICK, "transcoder", "plain", 1)
    size, how = resolve(cell)
    data = data_of(size.bench, 2)
    trainer = make_trainer(size, how, cell, data)
    for rows in batches(size, 1):
        trainer.step(data.sources[0][rows], data.sources[1][rows])
    result, record = trainer.result(), train_cell(cell)
    assert record["encoder"] == asdict(recovery(result.W_enc, data.features[0], 20))
    assert record["decoder"] == asdict(recovery(result.W_dec, data.features[1], 20))
    assert record["encoder"] != asdict(recovery(result.W_enc, data.features[1], 20))


def test_each_seed_has_its_own_first_weights() -> None:
    size, how = resolve(Cell(QUICK, "topk", "plain", 0))
    data = data_of(size.bench, 1)
    first, again, other = (make_trainer(size, how, Cell(QUICK, "topk", "plain", s), data) for s in (0, 0, 1))
    assert torch.equal(first.dictionary.W_enc, again.dictionary.W_enc)
    assert functional.cosine_similarity(first.dictionary.W_enc, other.dictionary.W_enc, dim=1).abs().mean() < 0.2


def test_random_anchors_differ_from_seed_to_seed_and_between_sources() -> None:
    found = []
    for seed in (0, 1):
        size, how = resolve(Cell(QUICK, "crosscoder", "random", seed))
        trainer = make_trainer(size, how, Cell(QUICK, "crosscoder", "random", seed), data_of(size.bench, 2))
        assert trainer.anchors is not None
        found += list(trainer.anchors.decoder.chunk(2, dim=1))
    for i in range(4):
        for j in range(i):
            assert functional.cosine_similarity(found[i], found[j], dim=1).abs().max() < 0.5


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_anchors_of_one_side(side: str) -> None:
    cell = Cell(QUICK, "topk", "anchored", 0, (("sides", side),))
    size, how = resolve(cell)
    anchors = make_trainer(size, how, cell, data_of(size.bench, 1)).anchors
    assert anchors is not None
    assert (anchors.encoder is None, anchors.decoder is None) == (side == "decoder", side == "encoder")


@pytest.mark.parametrize(("samples", "rows", "steps"), [(10, 4, 25), (7, 7, 5), (3, 8, 9)])
def test_batches_are_epochs(samples: int, rows: int, steps: int) -> None:
    size = replace(QUICK, bench=replace(QUICK.bench, samples=samples), batch_rows=rows, steps=steps)
    found = list(batches(size, 5))
    assert [len(batch) for batch in found] == [rows] * steps
    order = torch.cat(found)
    epochs = [order[start : start + samples] for start in range(0, len(order) - samples + 1, samples)]
    assert all(Counter(epoch.tolist()) == Counter(range(samples)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    assert torch.equal(order, torch.cat(list(batches(size, 5))))
    assert not torch.equal(order, torch.cat(list(batches(size, 6))))


def test_the_seed_of_a_cell_is_that_of_its_data_too() -> None:
    one, other = (resolve(Cell(QUICK, "topk", "plain", seed, (("seed", 40),)))[0].bench.seed for seed in (0, 3))
    assert (one, other) == (40, 43)


# ---- changes


@pytest.mark.parametrize(
    ("method", "name", "value", "where"),
    [
        ("topk", "k", 3, lambda size, how: (size.k, how.activation) == (3, TopK(3))),
        ("batch_topk", "activation.k", 3, lambda size, how: (size.k, how.activation) == (6, BatchTopK(3))),
        ("topk", "steps", 7, lambda size, how: size.steps == 7),
        ("topk", "learning_rate", 1, lambda size, how: size.learning_rate == 1),
        ("topk", "noise", 0.1, lambda size, how: size.bench.noise == 0.1),
        ("topk", "variant", "negative", lambda size, how: size.bench.variant == "negative"),
        ("topk", "parents", 5, lambda size, how: size.bench.hierarchy == Hierarchy(parents=5)),
        ("topk", "parents", 20, lambda size, how: size.bench.hierarchy == Hierarchy()),
        ("topk", "hierarchy", {}, lambda size, how: size.bench.hierarchy == Hierarchy()),
        ("topk", "hierarchy", {"children": 2}, lambda size, how: size.bench.hierarchy == Hierarchy(children=2)),
        ("topk", "tied", True, lambda size, how: how.tied),
        ("topk", "decoder_norm", "free", lambda size, how: how.decoder_norm == "free"),
        ("relu", "l1", 3, lambda size, how: how.objective.l1 == 3),
        ("relu", "activation.nothing", None, None),
        ("jumprelu", "threshold", 0.5, lambda size, how: how.activation == JumpReLU(0.5, 1.0)),
        ("jumprelu", "l0_target", 6, lambda size, how: how.objective.l0_target == 6),
        ("matryoshka", "prefixes", (4, 9), lambda size, how: how.objective.prefixes == (4, 9)),
        ("relu", "encoder", "independent", lambda size, how: how.initialisation.encoder == "independent"),
        ("topk", "dense", "float32", lambda size, how: how.products.dense == "float32"),
    ],
)
def test_a_change_reaches_its_field(method: str, name: str, value: Any, where: Any) -> None:
    cell = Cell(QUICK, method, "plain", 0, ((name, value),))
    if where is None:
        with pytest.raises(InputError, match="no such thing to change"):
            resolve(cell)
        return
    assert where(*resolve(cell))
    assert resolve(cell) != resolve(replace(cell, changes=()))


def test_a_change_with_the_name_of_its_part() -> None:
    changes = (("decoder_norm", "free"), ("initialisation.decoder_norm", 0.1))
    _, how = resolve(Cell(QUICK, "relu", "plain", 0, changes))
    assert (how.decoder_norm, how.initialisation.decoder_norm) == ("free", 0.1)


def test_what_may_be_none() -> None:
    _, how = resolve(Cell(QUICK, "topk", "plain", 0, (("clip", None), ("auxk_k", 7))))
    assert (how.clip, how.objective.auxk_k) == (None, 7)


def test_tied_weights_begin_alike() -> None:
    """The kinds with a quiet encoder otherwise are refused none of this."""
    size, how = resolve(Cell(QUICK, "relu", "plain", 0, (("tied", True),)))
    trainer = make_trainer(size, how, Cell(QUICK, "relu", "plain", 0), data_of(size.bench, 1))
    assert trainer.config.initialisation == Initialisation()
    assert trainer.dictionary.W_enc is trainer.dictionary.W_dec


@pytest.mark.parametrize(
    ("method", "arm", "changes", "message"),
    [
        ("topk", "plane", {}, "no arm plane; there are plain, anchored, random, truth"),
        ("topkk", "plain", {}, "no method 'topkk'; there are relu, jumprelu"),
        ("topk", "plain", {"lerning_rate": 1}, "no such thing to change: lerning_rate; the nearest is learning_rate"),
        ("topk", "plain", {"zzz": 1}, "no such thing to change: zzz; there are latents, steps"),
        ("topk", "plain", {"kind": "relu"}, "no such thing to change: kind"),
        ("topk", "plain", {"check": 1}, "no such thing to change: check"),
        ("topk", "plain", {"k": "ten"}, "k is a whole number, not 'ten'"),
        ("topk", "plain", {"k": 1.5}, "k is a whole number, not 1.5"),
        ("topk", "plain", {"tied": 1}, "tied is true or false, not 1"),
        ("topk", "plain", {"noise": True}, "noise is a number, not True"),
        ("matryoshka", "plain", {"prefixes": 3}, "prefixes is a list of numbers, not 3"),
        ("topk", "plain", {"k": 481}, "activation.k must be a whole number between 1 and latents = 480, not 481"),
        ("topk", "plain", {"l1": 1}, "topk fixes how many latents are active with k; l1"),
        ("transcoder", "plain", {"tied": True}, "tied: an encoder can only be"),
        ("topk", "plain", {"hierarchy": {"child": 2}}, "a hierarchy has parents, children, child_share, and no child"),
        ("topk", "plain", {"hierarchy": 2}, "hierarchy is a section, as .* not 2"),
        ("topk", "plain", {"sides": "left"}, "sides is both, encoder or decoder, not 'left'"),
        ("topk", "plain", {"layout": "clt"}, "layout is one of sae, transcoder, crosscoder, not 'clt'"),
        ("topk", "plain", {"steps": 0, "batch_rows": -1}, "steps must be a whole .*; batch_rows must be .*, not -1"),
        ("topk", "plain", {"k": None}, "k is a whole number, not None"),
        ("topk", "plain", {"clip": -1}, "clip must be above 0 and finite, not -1"),
        ("topk", "anchored", {"anchors": 120}, "120 anchors are too many for 120 features"),
        ("topk", "anchored", {"latents": 10}, "20 anchors are too many for 120 features, .* and 10 latents"),
        ("topk", "plain", {"sparsity": 1}, "sparsity must be at least 0 and below 1, not 1"),
        ("topk", "plain", {"dense": "bf16"}, "products are computed in auto, float32 or bfloat16, not bf16"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    method: str, arm: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve(Cell(QUICK, method, arm, 0, tuple(changes.items())))


@pytest.mark.parametrize("size", SIZES)
def test_every_method_of_every_size_can_be_trained(size: str) -> None:
    for method in methods(SIZES[size]()):
        for arm in ARMS:
            resolve(Cell(SIZES[size](), method, arm, 0))
    assert isinstance(methods(SIZES[size]())["relu"].activation, ReLU)


# ---- recovery: the reduced bench


@pytest.mark.parametrize(
    ("arm", "seed"),
    [pytest.param(arm, seed, marks=[slow] * bool(seed)) for seed in SEEDS for arm in ARMS],
)
def test_topk_recovers_the_features(arm: str, seed: int) -> None:
    """With the right k, in every arm: anchoring has nothing to give, and takes nothing. Encoder rows are others."""
    record = trained("topk", arm, seed)
    assert record["decoder"]["m_gt"] >= 0.95
    assert record["decoder"]["mcc"] >= 0.95
    assert record["encoder"]["m_ip"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("batch_topk", {}),
        ("relu", {"steps": 500}),
        ("gated", {"steps": 500, "learning_rate": 0.01}),
        ("jumprelu", {}),
        ("transcoder", {"steps": 500}),
        ("crosscoder", {}),
    ],
)
def test_others_recover_them_too(method: str, changes: dict[str, Any]) -> None:
    assert trained(method, "plain", 0, *changes.items())["decoder"]["m_gt"] >= 0.95


def test_anchored_latents_lie_at_their_features() -> None:
    """Though random ones beside them go elsewhere: nothing in the data holds those."""
    cosines = {}
    for arm in ("anchored", "random"):
        cell = Cell(REDUCED, "topk", arm, 0, (("steps", 100),))
        size, how = resolve(cell)
        data = data_of(size.bench, 1)
        trainer = make_trainer(size, how, cell, data)
        for rows in batches(size, 0):
            trainer.step(data.sources[0][rows], data.sources[0][rows])
        result = trainer.result()
        cosines[arm] = functional.cosine_similarity(result.W_dec[:20], data.features[0][:20], dim=1)
    assert cosines["anchored"].min() > 0.97
    assert cosines["random"].abs().max() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_loose_k_and_many_anchors(seed: int) -> None:
    """k is 48 for 6 active features: what latents have in common is not told apart. With 90 of the 120 features given,
    the other 30 lose as gradients are clipped by default, and would gain without; random directions give nothing.
    """
    loose = (("k", 48), ("anchors", 90))
    clipped, free = (
        {arm: trained("topk", arm, seed, *loose, ("clip", clip))["decoder"]["m_ip"] for arm in ARMS}
        for clip in (1.0, None)
    )
    assert clipped["anchored"] < clipped["plain"]
    assert free["anchored"] > max(free["plain"] + 0.02, free["random"] + 0.04)
    assert free["random"] < free["plain"]


@pytest.mark.parametrize("method", ["topk", "relu", "transcoder", "crosscoder"])
def test_the_arm_of_the_truth_begins_at_all_features_and_is_held_by_none(method: str) -> None:
    size, how = resolve(Cell(QUICK, method, TRUTH, 1))
    data = data_of(size.bench, 2)
    trainer = make_trainer(size, how, Cell(QUICK, method, TRUTH, 1), data)
    for W, scale, sites in (
        (trainer.dictionary.W_enc, trainer.x_norm.scale, LAYOUTS[how.layout][0]),
        (trainer.dictionary.W_dec, trainer.y_norm.scale, LAYOUTS[how.layout][1]),
    ):
        expected = torch.cat([data.features[i] for i in sites], dim=1) * scale
        torch.testing.assert_close(W[: size.bench.features], functional.normalize(expected, dim=1))
    assert trainer.config.objective.anchoring == 0
    assert replace(trainer.config.objective, anchoring=0.1) == how.objective


@pytest.mark.slow
def test_a_minimum_that_misses_features_is_above_that_of_the_truth() -> None:
    """With k = 48 for 6 active features runs from random weights recover few of them; from the truth, they stay."""
    plain, truth = (trained("topk", arm, 0, ("k", 48)) for arm in ("plain", TRUTH))
    assert plain["decoder"]["m_gt"] < 0.5 < 0.9 < truth["decoder"]["m_gt"]
    assert plain["loss"] > truth["loss"]
    assert truth["fvu_at_truth"] > 5 * truth["fvu"]  # where features interfere that configuration is no minimum


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_anchors_and_prefixes_reduce_absorption(seed: int) -> None:
    """12 parents with 4 children each. Plain training absorbs a third; anchors reduce it for the 6 parents that are
    given and leave it to the others, and the features that are not anchored gain; prefixes nearly end it."""
    changes = (("hierarchy", {"parents": 12, "children": 4, "child_share": 0.2}), ("k", 4), ("anchors", 6))
    plain, anchored, random = (train_cell(Cell(REDUCED, "topk", arm, seed, changes)) for arm in ARMS)
    prefixes = train_cell(Cell(REDUCED, "matryoshka", "plain", seed, changes))
    groups = ("absorption", "absorption_of_anchored")
    for record in (plain, random):
        assert min(record[group]["rate"] for group in groups) > 0.25
    assert anchored["absorption_of_anchored"]["rate"] < 0.2
    assert anchored["absorption"]["rate"] > 0.25
    assert max(prefixes[group]["rate"] for group in groups) < 0.15
    assert anchored["decoder"]["m_gt"] > max(plain["decoder"]["m_gt"], random["decoder"]["m_gt"]) + 0.05


@pytest.mark.parametrize("method", ["batch_topk", "crosscoder"])
def test_absorption_is_scored_where_there_are_families(method: str) -> None:
    families = (("hierarchy", {"parents": 25, "children": 2, "child_share": 0.5}),)
    assert 0 <= train_cell(Cell(QUICK, method, "anchored", 0, families))["absorption"]["rate"] < 1
    assert "absorption" not in train_cell(Cell(QUICK, method, "anchored", 0))
