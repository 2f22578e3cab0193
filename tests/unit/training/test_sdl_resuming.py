"""Training that was cut off goes on to the same bits, from every step; what it ends with is of raw activations."""

from dataclasses import replace

import pytest
import torch
from formulas import ACTIVATIONS, VARIANTS, config_of
from safetensors.torch import load, save
from small_training import ROWS, SETTINGS, SPARSE, STEPS, batch, make_trainer, train

from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.train.config import Resampling
from pipeline.sdl.train.objective import Objective

EVERYTHING = {
    "transcoder": (config_of("transcoder", "topk"), Objective()),
    "skip": (config_of("skip", "batch_topk"), Objective(prefixes=(3, 8))),
    "sae": (config_of("sae", "jumprelu"), Objective(l0=0.2, preactivation=0.1, anchoring_end=0.7)),
    "shared": (config_of("shared", "topk"), Objective(anchoring_distance="cosine")),
    "crosscoder": (config_of("crosscoder", "gated"), Objective(l1=2.0)),
    "cross-layer": (config_of("cross_layer", "relu"), Objective(p_norm=2.0)),
}


@pytest.mark.parametrize("what", EVERYTHING)
def test_resume_is_bit_identical_at_every_step(what: str) -> None:
    config, objective = EVERYTHING[what]
    options = {"clip": 3.0, "resampling": Resampling((0.3, 0.6), 2 * ROWS), "dead_after_rows": ROWS}
    settings = replace(SETTINGS, objective=objective, fused=what != "skip", **options)
    straight = make_trainer(settings, config)
    with torch.no_grad():
        straight.dictionary.each_block()[0].b_enc[4:8] = -9.0  # silent, so that they are resampled
    states, metrics = [save(straight.state())], []
    for step in range(STEPS):
        metrics += train(straight, range(step, step + 1))
        states.append(save(straight.state()))
    assert max(m.dead_share for m in metrics) > 0
    assert sum(m.resampled for m in metrics) > 0
    for step, state in enumerate(states):
        # The seed decides initial weights and what is resampled: the state must replace the former.
        resumed = make_trainer(settings, config)
        with torch.no_grad():
            for parameter in resumed.dictionary.parameters():
                parameter.fill_(1.0)
        resumed.load_state(load(state))
        assert resumed.step_number == step
        assert train(resumed, range(step, STEPS)) == metrics[step:]
        assert save(resumed.state()) == states[-1]


def test_loading_a_state_does_not_tie_the_trainer_to_it() -> None:
    trainer = make_trainer()
    train(trainer, range(3))
    state = load(save(trainer.state()))
    kept = save(state)
    resumed = make_trainer()
    resumed.load_state(state)
    train(resumed, range(3, 6))
    assert save(state) == kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_result_equals_the_trained_dictionary_on_raw_activations(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    trainer = make_trainer(replace(SETTINGS, objective=SPARSE[activation]), config)
    train(trainer, range(STEPS))
    x, _ = batch(0, config)
    raw, inputs = trainer.result(), trainer.x_norm(x)
    with torch.no_grad():
        if activation == "batch_topk":
            calibrate(raw, lambda: iter([x]), trainer.competing())
            for trained, block in zip(trainer.dictionary.each_block(), raw.each_block(), strict=True):
                block.own("threshold").mul_(1.0001)  # between two entries, as they are rounded otherwise when folded
                trained.own("threshold").copy_(block.own("threshold"))
        z = trainer.dictionary.encode(inputs)
        torch.testing.assert_close(raw.encode(x), z, rtol=1e-4, atol=1e-4)
        expected = trainer.dictionary.decode(z, inputs) / trainer.y_norm.scale + trainer.y_norm.mean
        torch.testing.assert_close(raw(x), expected, rtol=1e-4, atol=1e-4)
