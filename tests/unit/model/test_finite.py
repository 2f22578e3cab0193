"""Weights that are nan or infinite: the tensor is named, and no such row is ever stored."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import harvest, start_harvest
from lab import SITE
from safetensors.torch import load_file, save_file

from pipeline.capture.contexts import ContextRows
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.finite import NotFinite, tensors_not_finite
from pipeline.model.load import load_base_model, load_causal_model
from pipeline.sdl.measure.loss_recovered import loss_recovered
from storage.harvest.log import log_of


def spoiled(model: Path, folder: Path, tensor: str, value: float, at: int = 0) -> Path:
    """A copy with one weight set to a value."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[at] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "tensor", ["layers.0.input_layernorm.weight", "layers.1.mlp.down_proj.weight", "layers.1.self_attn.k_proj.weight"]
)
def test_layers_with_such_weights_are_refused(
    llama: Path, tmp_path: Path, tensor: str, value: float, dtype: str
) -> None:
    info = describe_model(str(spoiled(llama, tmp_path / "model", f"model.{tensor}", value, at=-1)))
    message = rf"model\.id: the weights of {info.id} are nan or infinite in {tensor}, and so would the activations be; "
    with pytest.raises(InputError, match=message):
        load_base_model(info, layers=2, dtype=dtype)
    with pytest.raises(InputError, match=rf"are nan or infinite in model\.{tensor}, and so"):
        load_causal_model(info, dtype=dtype)
    if "layers.1" in tensor:
        load_base_model(info, layers=1, dtype=dtype)  # what is not run may be anything


@pytest.mark.parametrize(("family", "part"), [("mixtral", "experts"), ("gemma2", "q_proj"), ("phi3", "qkv_proj")])
def test_of_other_families(make_model: Callable[..., Path], tmp_path: Path, family: str, part: str) -> None:
    tensor = next(name for name in sorted(load_file(make_model(family) / "model.safetensors")) if part in name)
    info = describe_model(str(spoiled(make_model(family), tmp_path / "model", tensor, float("nan"))))
    with pytest.raises(InputError, match=rf"are nan or infinite in layers\.0\..*{part}"):
        load_base_model(info, layers=1, dtype="float32", attention="eager")


def test_float16_that_cannot_hold_the_weights(llama: Path, tmp_path: Path) -> None:
    info = describe_model(str(spoiled(llama, tmp_path / "model", "model.layers.0.mlp.up_proj.weight", 1e6)))
    load_base_model(info, layers=1, dtype="bfloat16")
    with pytest.raises(InputError, match=r"infinite in layers\.0\.mlp\.up_proj\.weight"):
        load_base_model(info, layers=1, dtype="float16")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_an_embedding_that_no_text_uses_may_have_them(llama: Path, tmp_path: Path, corpus: Path, stored: str) -> None:
    """The rows are those of the sound model; a text that uses one gives no rows but an error that names the weights."""
    embedding = "model.embed_tokens.weight"
    plain = harvest(tmp_path / "plain", llama, corpus, [SITE], dtype=stored)
    padded = spoiled(llama, tmp_path / "padded", embedding, float("nan"), at=325 * 32)
    found = harvest(tmp_path / "store", padded, corpus, [SITE], dtype=stored)
    assert (found.read(SITE) == plain.read(SITE)).all()
    used = int(plain.context_tokens(0, 0)[0][1])
    wrong = spoiled(llama, tmp_path / "wrong", embedding, float("nan"), at=used * 32)
    harvesting = start_harvest(tmp_path / "other", wrong, corpus, [SITE], dtype=stored)
    message = rf"{SITE}: row \d+ of the unit is not finite: the weights of {wrong} are nan or infinite in embed_tokens"
    with pytest.raises(InputError, match=message):
        harvesting.run([0])
    (job,), store = harvesting.jobs, harvesting.store
    assert not len(log_of(store, job.harvest).committed())


def test_activations_that_overflow_say_where(llama: Path, tmp_path: Path, corpus: Path) -> None:
    huge = spoiled(llama, tmp_path / "model", "model.embed_tokens.weight", 60_000.0, at=0)
    harvesting = start_harvest(tmp_path / "store", huge, corpus, ["mlp_out.0"], dtype="float16", skip_first=0)
    model = harvesting.harvesters[0]._runner.model
    with torch.no_grad():
        model.get_submodule("layers.0.mlp.down_proj").weight *= 1e6
    assert tensors_not_finite(model) == []
    with pytest.raises(InputError, match=r"mlp_out\.0: row \d+ of the unit has an activation that is not a finite fl"):
        harvesting.run([0])


@pytest.mark.parametrize("offset", [0, 1])
def test_an_embedding_is_blamed_for_the_rows_of_tokens_that_were_run(
    llama: Path, tmp_path: Path, corpus: Path, offset: int
) -> None:
    """An overflow in float16 is one, whatever stands in rows that no text uses and in the norm behind the layers."""
    padded = spoiled(llama, tmp_path / "padded", "model.embed_tokens.weight", float("nan"), at=325 * 32)
    padded = spoiled(padded, tmp_path / "both", "model.norm.weight", float("nan"))
    site = f"mlp_out.{offset}"
    harvesting = start_harvest(tmp_path / "store", padded, corpus, [site], dtype="float16", skip_first=0)
    with torch.no_grad():
        harvesting.harvesters[0]._runner.model.get_submodule(f"layers.{offset}.mlp.down_proj").weight *= 1e6
    with pytest.raises(InputError, match=rf"{site}: row \d+ .* finite float16: .* store in bfloat16 or float32$") as e:
        harvesting.run([0])
    assert isinstance(e.value, NotFinite)
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.row, again.site) == (str(e.value), e.value.row, site)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_that_overflows_beside_an_embedding_that_is_nan(
    make_model: Callable[..., Path], llama: Path, tmp_path: Path, tied: bool
) -> None:
    """A head that is the embedding has a part in every loss; an embedding's row that no text uses has none."""
    name = "model.embed_tokens.weight"
    info = describe_model(str(spoiled(llama, tmp_path / "model", name, float("nan"), at=325 * 32)))
    model = load_causal_model(info, dtype="float32")
    with torch.no_grad():
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        else:
            model.lm_head.weight.sign_().mul_(3e38)
    rows = [ContextRows(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int64), 0)]
    expected = rf"its weights are nan or infinite in {name};" if tied else "it overflows in its dtype;"
    with pytest.raises(InputError, match=rf"own loss .*: {expected}"):
        loss_recovered(model, lambda x: x, [], {}, rows, 64)


def test_the_loss_of_a_model_whose_head_is_nan(llama: Path, tmp_path: Path) -> None:
    info = describe_model(str(spoiled(llama, tmp_path / "model", "lm_head.weight", float("nan"))))
    model = load_causal_model(info, dtype="float32")
    rows = [ContextRows(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int64), 0)]
    with pytest.raises(InputError, match=r"own loss .* is nan, .* its weights are nan .* in lm_head\.weight"):
        loss_recovered(model, lambda x: x, [], {}, rows, 64)
