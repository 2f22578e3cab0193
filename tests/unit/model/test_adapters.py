"""Adapters beside a model's weights, which are never applied, and folders that are nothing but an adapter."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import FakeHub
from lab import Lab, RayStarted
from safetensors.torch import load_file, save_file
from transformers.utils.peft_utils import find_adapter_config_file

from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.model.describe import adapter_notice, describe_model
from pipeline.model.load import NO_ADAPTER, check_weights, load_base_model

RANK = 4
ADAPTED = "layers.0.mlp.down_proj"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/base",
    "r": RANK,
    "lora_alpha": RANK,
    "target_modules": ["down_proj"],
    "layers_to_transform": [0],
    "inference_mode": True,
}


def add_adapter(folder: Path) -> torch.Tensor:
    """Put an adapter of one matrix into a folder; return what it adds to that."""
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, 48, generator=generator), torch.randn(32, RANK, generator=generator)
    names = [f"base_model.model.model.{ADAPTED}.lora_{which}.weight" for which in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
    return b @ a


@pytest.fixture
def merged(llama: Path, tmp_path: Path) -> Path:
    """Weights into which an adapter was merged, and the adapter left beside them."""
    folder = tmp_path / "merged"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.{ADAPTED}.weight"] += add_adapter(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_beside_the_weights_is_not_looked_for(merged: Path, hub: FakeHub) -> None:
    commit = hub.add("a/merged", merged)
    for name in (str(merged), "a/merged"):
        assert find_adapter_config_file(name, revision=commit) is not None
        assert find_adapter_config_file(name, revision=commit, **NO_ADAPTER) is None


def test_the_weights_are_those_of_the_files(merged: Path) -> None:
    model = load_base_model(describe_model(str(merged)), layers=1, dtype="float32")
    assert torch.equal(
        model.get_submodule(ADAPTED).weight, load_file(merged / "model.safetensors")[f"model.{ADAPTED}.weight"]
    )


def test_an_adapter_that_is_not_applied_is_named(lab: Lab, merged: Path, llama: Path, no_ray: None) -> None:
    with pytest.raises(RayStarted):
        main(["harvest", str(lab.spec({"model.id": str(merged)}))])
    assert (
        f"note: {merged} has an adapter (adapter_config.json) beside its weights, which is not"
        in lab.capsys.readouterr().out
    )
    assert adapter_notice(describe_model(str(llama))) is None


APPLIED = """
import sys, torch, transformers
from pipeline.model.load import load_base_model, load_causal_model
from pipeline.model.describe import describe_model
tokens = torch.arange(8)[None]
def hidden(model):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[1]
merged, plain = sys.argv[1:]
theirs = hidden(transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
expected = hidden(transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
ours = [hidden(load(describe_model(merged), **options, dtype="float32")) for load, options in
        ((load_base_model, {"layers": 2}), (load_causal_model, {}))]
print(torch.equal(theirs, expected), *(torch.equal(found, expected) for found in ours))
"""


@pytest.mark.slow  # installs peft into a folder of its own
def test_an_adapter_is_not_applied_a_second_time_where_peft_is_installed(
    merged: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = tmp_path_factory.mktemp("peft")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), "peft"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("peft cannot be installed here")
    plain = tmp_path / "plain"
    shutil.copytree(merged, plain, ignore=shutil.ignore_patterns("adapter_*"))
    root = Path(__file__).parents[3]
    path = f"{root}:{packages}"
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", APPLIED, str(merged), str(plain)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["False", "True", "True"]  # transformers by itself applies it; we do not


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("verb", ["harvest", "plan"])
def test_a_folder_that_is_only_an_adapter(lab: Lab, llama: Path, no_ray: None, verb: str, with_config: bool) -> None:
    folder = lab.folder / "adapter"
    folder.mkdir()
    add_adapter(folder)
    if with_config:
        shutil.copy(llama / "config.json", folder)
    err = lab.refused(verb, lab.spec({"model.id": "adapter"}))
    assert f"model.id: {folder} is only an adapter (adapter_config.json) of somebody/base, without that model's" in err
    assert f"AutoPeftModelForCausalLM.from_pretrained('{folder}').merge_and_unload().save_pretrained(FOLDER)" in err


@pytest.mark.parametrize("with_config", [False, True])
def test_a_repository_that_is_only_an_adapter(hub: FakeHub, llama: Path, tmp_path: Path, with_config: bool) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    add_adapter(folder)
    if with_config:
        shutil.copy(llama / "config.json", folder)
    hub.add("a/adapter", folder)
    with pytest.raises(InputError, match=r"a/adapter is only an adapter \(adapter_config.json\) of somebody/base"):
        check_weights(describe_model("a/adapter"), 1, loaded_here=True)


def test_an_adapter_that_does_not_say_of_what(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"is only an adapter .* of its model, without that model's weights"):
        describe_model(str(tmp_path))
