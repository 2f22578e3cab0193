"""A model of which only a part is in memory computes what the whole model does; what a device cannot do is refused."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import KINDS, start_harvest
from pydantic import ValidationError
from test_families import ALL_SITES, MODELS, TOKENS, harvested, some_contexts

from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import load_base_model, load_causal_model
from pipeline.model.placement import Offload, Placement, check_dtype
from pipeline.sdl.measure.loss_recovered import loss_recovered
from pipeline.sites import Site
from workers.settings.experiment import HarvestSettings, OffloadSettings, compile_layers

LAYER_BYTES = 40_000
"""About one of three layers of the test models in float32: the rest of the weights go to disk."""


def offloaded(folder: Path, cpu_memory: int = LAYER_BYTES) -> Placement:
    return Placement("cpu", Offload(str(folder), cpu_memory))


def share_on_disk(model: Any) -> float:
    on_disk = [p.device.type == "meta" for p in model.parameters()]
    return sum(on_disk) / len(on_disk)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text", "granite", "olmo2"])
def test_rows_of_an_offloaded_model_are_the_same_bits(
    tmp_path: Path, make_model: Callable[..., Path], family: str
) -> None:
    folder = make_model(family, **MODELS[family])
    expected = harvested(folder, "sdpa")
    found = harvested(folder, "sdpa", placement=offloaded(tmp_path))
    assert found.keys() == set(ALL_SITES)
    for site, acts in found.items():
        assert torch.equal(acts, expected[site]), site


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_most_weights_are_on_disk_and_the_folder_is_emptied(
    tmp_path: Path, make_model: Callable[..., Path], family: str, dtype: str
) -> None:
    """Llama's weights are read from the checkpoint; Mixtral's experts are stacked, which are other files."""
    info = describe_model(str(make_model(family, **MODELS[family])))
    memory = LAYER_BYTES // (1 if dtype == "float32" else 2)
    model = load_base_model(info, layers=3, dtype=dtype, placement=offloaded(tmp_path / "made", memory))
    assert share_on_disk(model) > 0.5
    (folder,) = (tmp_path / "made").iterdir()
    assert bool(list(folder.glob("*.safetensors"))) == (family == "mixtral")
    whole = load_base_model(info, layers=3, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state)
    del model
    gc.collect()
    assert not folder.exists()


def test_a_model_with_all_weights_on_disk(tmp_path: Path, llama: Path) -> None:
    model = load_base_model(describe_model(str(llama)), layers=3, dtype="float32", placement=offloaded(tmp_path, 1))
    assert share_on_disk(model) == 1
    expected = harvested(llama, "sdpa")
    found = harvested(llama, "sdpa", placement=offloaded(tmp_path, 1))
    assert all(torch.equal(found[site], expected[site]) for site in ALL_SITES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_offloaded_model_is_the_same(tmp_path: Path, llama: Path, kind: str) -> None:
    info, site = describe_model(str(llama)), Site(1, kind)
    measured = [
        loss_recovered(model, torch.relu, [site], {site: torch.full((32,), 0.5)}, some_contexts(), 200)
        for model in (
            load_causal_model(info, dtype="float32"),
            load_causal_model(info, dtype="float32", placement=offloaded(tmp_path)),
        )
    ]
    assert measured[0] == measured[1]
    assert measured[0].spliced != measured[0].clean


def test_a_harvester_with_an_offloaded_model_writes_the_same_bytes(tmp_path: Path, llama: Path, corpus: Path) -> None:
    """Also the same harvest: where the weights are is no part of its identity, so a run may go on elsewhere."""
    sites = [str(site) for site in ALL_SITES]
    options = {"offload": OffloadSettings(folder=str(tmp_path / "weights"), cpu_memory_gib=LAYER_BYTES / 2**30)}
    plain = start_harvest(tmp_path / "plain", llama, corpus, sites)
    placed = start_harvest(tmp_path / "placed", llama, corpus, sites, **options)
    assert placed.jobs[0].harvest.digest == plain.jobs[0].harvest.digest
    assert share_on_disk(placed.harvesters[0]._runner.model) > 0.5
    plain.run([0, 1])
    placed.run([0, 1])
    for site in sites:
        np.testing.assert_array_equal(placed.store.read(site, slice(0, 2048)), plain.store.read(site, slice(0, 2048)))


def test_layers_that_move_are_not_compiled(llama: Path) -> None:
    offload = OffloadSettings(folder="x")
    for moved in ({"offload": offload}, {"gpus_per_worker": 2}):
        with pytest.raises(ValidationError, match="compile: true needs the model on one device"):
            HarvestSettings(sites=("resid_post.0",), compile=True, **moved)
        settings = HarvestSettings(sites=("resid_post.0",), **moved)
        assert not compile_layers(settings, describe_model(str(llama)), 10**15, 3)
    assert compile_layers(HarvestSettings(sites=("resid_post.0",)), describe_model(str(llama)), 10**15, 3)


@pytest.mark.parametrize("where", ["whole", "offloaded"])
def test_loading_says_nothing(
    tmp_path: Path, llama: Path, where: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No bar, and no table of the layers that are left out, which reads like a fault; also in a process that has not
    silenced transformers itself."""
    placement = Placement() if where == "whole" else offloaded(tmp_path)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    transformers.logging.enable_propagation()
    try:
        load_base_model(describe_model(str(llama)), layers=1, dtype="float32", placement=placement)
        assert transformers.logging.get_verbosity() == transformers.logging.WARNING
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.disable_propagation()
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_that_this_cpu_has(dtype: torch.dtype) -> None:
    check_dtype(dtype, "cpu")


def test_a_dtype_that_this_cpu_lacks() -> None:
    with pytest.raises(InputError, match=r"model\.dtype: cpu cannot compute in float8_e4m3fn \(.*\); set model\.dtype"):
        check_dtype(torch.float8_e4m3fn, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(InputError, match="this worker runs on a GPU and torch finds none"):
        check_dtype(torch.float32, "cuda")
