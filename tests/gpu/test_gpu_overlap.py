"""Rows that leave the GPU beside the next forward pass are the rows. Needs torch and transformers alone:
`python -m pytest tests/gpu` (pytest.ini)."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import capture
from pipeline.capture.unit import UnitRunner
from pipeline.model import placement
from pipeline.model.describe import describe_model
from pipeline.model.load import load_base_model
from pipeline.model.placement import Offload, Placement, check_dtype
from pipeline.sites import KINDS, Site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")

D_MODEL, LAYERS, VOCABULARY, CONTEXT = 512, 4, 300, 128
SITES = [Site(layer, kind) for layer in range(LAYERS) for kind in KINDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def unit(seed: int) -> tuple[list[ContextRows], int]:
    """Contexts of one length, so that the batches of the plain loop below have the same shapes."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (32, CONTEXT)).astype(np.int32)
    return [ContextRows(line, np.arange(1, CONTEXT), i * (CONTEXT - 1)) for i, line in enumerate(tokens)], 32 * (
        CONTEXT - 1
    )


def runner_of(folder: Path, where: Placement = Placement("cuda"), dtype: str = "float32") -> UnitRunner:  # noqa: B008
    model = load_base_model(describe_model(str(folder)), layers=LAYERS, dtype=dtype, placement=where)
    stored = dict.fromkeys(SITES, dtype)
    return UnitRunner(model, stored, d_model=D_MODEL, batch_tokens=4 * CONTEXT, context=CONTEXT, device="cuda")


def one_after_another(folder: Path, contexts: list[ContextRows], dtype: str) -> dict[Site, torch.Tensor]:
    """The same batches, each waited for and copied before the next begins."""
    model = load_base_model(describe_model(str(folder)), layers=LAYERS, dtype=dtype, placement=Placement("cuda"))
    found: dict[Site, list[torch.Tensor]] = {site: [] for site in SITES}
    with torch.inference_mode(), capture(model, SITES) as taken:
        for first in range(0, len(contexts), 4):
            tokens = np.stack([context.tokens for context in contexts[first : first + 4]])
            model(input_ids=torch.from_numpy(tokens).long().cuda(), use_cache=False)
            torch.cuda.synchronize()
            for site in SITES:
                found[site].append(taken[site][:, 1:].reshape(-1, D_MODEL).cpu())
    return {site: torch.cat(parts) for site, parts in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_units_one_after_another_into_the_same_buffers(folder: Path, dtype: str) -> None:
    runner = runner_of(folder, dtype=dtype)
    expected = [one_after_another(folder, unit(seed)[0], dtype) for seed in range(3)]
    buffers = runner.buffers(unit(0)[1])
    assert all(buffer.values.is_pinned() for buffer in buffers.values())
    for round_number in range(10):  # what is read too early, or memory that is given out too early, shows by chance
        for seed in range(3):
            contexts, rows = unit(seed)
            found = runner.run(contexts, rows, into=buffers)
            for site in SITES:
                assert torch.equal(found.sites[site].values, expected[seed][site]), (round_number, seed, site)
            for buffer in buffers.values():
                buffer.values.fill_(float("nan"))


def test_idle_time_is_measured(folder: Path) -> None:
    runner = runner_of(folder)
    contexts, rows = unit(0)
    runner.run(contexts, rows)
    busy = runner.run(contexts, rows).idle_share
    time.sleep(1)
    idle = runner.run(contexts, rows).idle_share
    assert busy is not None
    assert idle is not None
    assert 0 <= busy < idle <= 1
    assert idle > 0.5


@pytest.mark.parametrize("cpu_memory", [2**40, 4 * 2**20], ids=["in CPU memory", "on disk"])
def test_a_model_with_little_room_on_the_gpu(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_memory: int
) -> None:
    contexts, rows = unit(0)
    expected = runner_of(folder).run(contexts, rows).sites
    monkeypatch.setattr(placement, "GPU_SHARE", 32 * 2**20 / torch.cuda.mem_get_info(0)[0])
    runner = runner_of(folder, Placement("cuda", Offload(str(tmp_path), cpu_memory)))
    places = {str(place) for place in runner.model.hf_device_map.values()}  # type: ignore[union-attr]
    assert {"cpu", "disk"} & places
    found = runner.run(contexts, rows).sites
    for site in SITES:
        assert torch.equal(found[site].values, expected[site].values), site


def test_dtypes_of_this_gpu() -> None:
    check_dtype(torch.float32, "cuda")
    check_dtype(torch.float16, "cuda")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        check_dtype(torch.bfloat16, "cuda")
