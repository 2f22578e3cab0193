"""Models on a hub that is asked over HTTP: what is downloaded is of one commit, and a commit is not asked for again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, serving

pytestmark = pytest.mark.slow  # each in a process of its own, which imports everything: the address is read then

ROOT = Path(__file__).parents[3]
DESCRIBED = """
import dataclasses, json, sys
from pipeline.model.describe import describe_model
print(json.dumps(dataclasses.asdict(describe_model("a/tiny"))))
"""
LOADED = """
import json, sys
from pipeline.model.load import load_base_model
from pipeline.tokens.tokenizer import load_tokenizer
from pipeline.model.describe import ModelInfo
info = ModelInfo(**json.loads(sys.argv[1]))
model = load_base_model(info, layers=1, dtype="float32")
print(model.layers[0].mlp.down_proj.weight.double().sum().item(), len(load_tokenizer(info.id, info.revision)))
"""
REFUSED = """
from pipeline.errors import InputError
from pipeline.model.load import check_weights
from pipeline.model.describe import describe_model
try:
    check_weights(describe_model("a/adapter"), 1)
except InputError as error:
    print(error)
"""


@pytest.fixture
def served() -> Iterator[HubServer]:
    with serving() as hub:
        yield hub


def run(served: HubServer, cache: Path, code: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_ENDPOINT": served.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_driver_and_workers_of_several_machines(
    served: HubServer, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Each with an empty cache of its own; the branch moves after the driver has asked."""
    commit = served.add("a/tiny", make_model(seed=0))
    described = run(served, tmp_path / "driver", DESCRIBED)
    assert f'"revision": "{commit}"' in described
    assert not any(path.endswith("model.safetensors") for path in served.requests)  # the driver needs no weights
    served.add("a/tiny", make_model(seed=1))
    served.requests.clear()
    loaded = run(served, tmp_path / "worker", LOADED, described)
    files = [path.split("/")[3] for path in served.requests if "/resolve/" in path]
    assert set(files) == {commit}, served.requests
    snapshots = tmp_path / "worker" / "hub" / "models--a--tiny" / "snapshots"
    assert [folder.name for folder in snapshots.iterdir()] == [commit]
    assert (snapshots / commit / "model.safetensors").is_file()
    served.refs["a/tiny", "main"] = commit
    assert run(served, tmp_path / "another", LOADED, run(served, tmp_path / "another", DESCRIBED)) == loaded


def test_a_repository_that_is_only_an_adapter(served: HubServer, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    served.add("a/adapter", folder)
    assert "a/adapter is only an adapter (adapter_config.json) of somebody/base" in run(served, tmp_path / "c", REFUSED)
