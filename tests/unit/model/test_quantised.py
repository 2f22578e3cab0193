"""Quantised checkpoints: those that run here give what transformers gives, others are refused before anything is
written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import harvest
from lab import Lab
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import check_weights, load_base_model
from pipeline.model.quantised import check_quantised

BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def copied(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def as_fp8(model: Path, folder: Path, config: dict[str, Any]) -> Path:
    """A copy whose linear layers are float8 with a scale for each block of 16 x 16, as DeepSeek's are of 128 x 128."""
    copied(model, folder, **config)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scaled = (blocks / scale[:, None, :, None]).reshape(rows, columns)
        tensors[name] = scaled.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def fp8(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_fp8(make_model(), tmp_path_factory.mktemp("fp8") / "llama", {"quantization_config": FP8})


def test_float8_gives_the_activations_of_transformers(fp8: Path, llama: Path, corpus: Path, tmp_path: Path) -> None:
    store = harvest(tmp_path / "store", fp8, corpus, ["resid_post.1", "mlp_out.2"], dtype="float32", rows=500)
    model = transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    context = store.context_tokens(0, 0)[0]
    rows = store.columns(0, 500, ["context", "position"])
    stored = store.read("resid_post.1")[rows["context"] == 0]
    with torch.no_grad():
        of_model, of_plain = (
            m(torch.from_numpy(context)[None].long(), output_hidden_states=True).hidden_states[2][0].numpy()
            for m in (model, plain)
        )
    positions = rows["position"][rows["context"] == 0]
    np.testing.assert_allclose(stored, of_model[positions], rtol=0, atol=1e-4)
    assert np.abs(of_model - of_plain).max() > 1e-2  # quantising is seen, and the scales are used
    assert np.abs(of_model - of_plain).max() < 0.5 * np.abs(of_plain).max()


def test_float8_of_a_text_part(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The config of the whole says that it is quantised, its text part's does not."""
    text = make_model("gemma3_text")
    config = json.loads((text / "config.json").read_text())
    folder = as_fp8(text, tmp_path / "gemma3", {})
    whole = {"model_type": "gemma3", "text_config": config, "quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_base_model(describe_model(str(folder)), layers=2, dtype="float32")
    plain = load_base_model(describe_model(str(text)), layers=2, dtype="float32")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        ours, exact = (model(tokens).last_hidden_state for model in (found, plain))
    assert (ours - exact).abs().max() < 0.5 * exact.abs().max()


COMPUTED = """
import sys
import numpy as np, torch, transformers
from pipeline.model.load import check_weights, load_base_model
from pipeline.model.describe import describe_model
from pipeline.model.quantised import check_quantised
from pipeline.capture.contexts import ContextRows
from pipeline.sites import Site
from pipeline.capture.unit import UnitRunner
folder, plain = sys.argv[1:]
info = describe_model(folder)
check_quantised(info, "cpu")
check_weights(info, 3)
model = load_base_model(info, layers=3, dtype="float32")
sites = {Site(layer, "resid_post"): "float32" for layer in (0, 1)}
runner = UnitRunner(model, sites, d_model=32, batch_tokens=64, context=8, device="cpu")
rows = ContextRows(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int64), 0)
ours = runner.run([rows], 8).sites
for number, site in enumerate(sites, 1):
    theirs, exact = (
        transformers.AutoModel.from_pretrained(name, dtype=torch.float32)(
            torch.arange(8)[None], output_hidden_states=True
        ).hidden_states[number][0].detach()
        for name in (folder, plain)
    )
    print((ours[site].values - theirs).abs().max().item() < 1e-5, (theirs - exact).abs().max().item() > 1e-3)
"""


@pytest.mark.slow  # installs a package into a folder of its own
def test_compressed_tensors_give_the_activations_of_transformers(
    llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("compressed-tensors")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    if subprocess.run([*install, "compressed-tensors", "loguru"], capture_output=True).returncode:
        pytest.skip("compressed-tensors cannot be installed here")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "format": "int-quantized", "weights": weights}
    group |= {"input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    settings |= {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    folder = copied(llama, tmp_path / "model", quantization_config=settings)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("proj.weight"):
            tensors[f"{name}_scale"] = scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{packages}"}
    command = [sys.executable, "-c", COMPUTED, str(folder), str(llama)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["True"] * 4


@pytest.mark.parametrize("method", ["foo-4bit", None])
def test_a_method_that_transformers_does_not_know(lab: Lab, llama: Path, no_ray: None, method: str | None) -> None:
    """It would load the numbers as if they were weights, with a warning that nobody sees."""
    copied(llama, lab.folder / "model", quantization_config={"quant_method": method, "bits": 4})
    for verb in ("harvest", "plan", "run"):
        err = lab.refused(verb, lab.spec({"model.id": "model"}))
        assert f"model.id: the weights of {lab.folder / 'model'} are quantised" in err
        assert err.endswith("give the model's unquantised weights\n")


CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "hqq": {"nbits": 4, "group_size": 64},
    "quanto": {"weights": "int8"},
    "aqlm": {},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 1}}},
    "eetq": {"weights": "int8"},
    "vptq": {},
    "auto-round": {"bits": 4, "group_size": 128},
    "quark": {},
    "fbgemm_fp8": {},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_methods_that_lack_their_package(lab: Lab, llama: Path, no_ray: None, method: str) -> None:
    """Whatever the reason, one sentence, and nothing is written."""
    copied(llama, lab.folder / "model", quantization_config={"quant_method": method, **CONFIGS[method]})
    err = lab.refused("harvest", lab.spec({"model.id": "model"}))
    assert f"are quantised ({method}), which transformers cannot run on cpu here: " in err
    assert "; install what is missing here and on the workers, or give the model's unquantised weights" in err


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZER_MAPPING))
def test_every_method_is_either_run_or_refused(make_model: Callable[..., Path], tmp_path: Path, method: str) -> None:
    folder = copied(make_model(), tmp_path / "model", quantization_config={"quant_method": method})
    refused = ""
    try:
        check_quantised(describe_model(str(folder)), "cpu")
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused


def test_weights_that_are_quantised_and_a_config_that_does_not_say_so(
    lab: Lab, llama: Path, fp8: Path, no_ray: None
) -> None:
    as_fp8(llama, lab.folder / "model", {})
    for verb in ("harvest", "plan"):
        err = lab.refused(verb, lab.spec({"model.id": "model"}))
        assert ".weight is F8_E4M3) and its config.json does not say how (quantization_config)" in err
    check_weights(describe_model(str(fp8)), 3)
