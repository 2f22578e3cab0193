"""Environments that benchmarks make for other projects, and processes in them that answer in JSON lines.

A peer wants other packages than we do, so each group of peers has an environment of its own under .bench-venv, made the
first time it is asked for, with our version of torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

ENVIRONMENTS = Path(__file__).parents[2] / ".bench-venv"
SAELENS = "sae-lens==6.54.12"
DICTIONARIES = ("eai-sparsify==1.3.3", "dictionary-learning==0.1.0", SAELENS)


def environment_python(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of the environment `name`, which is made with these packages if it is not there."""
    folder = ENVIRONMENTS / name
    python, installed = folder / "bin" / "python", folder / "installed"
    if not installed.is_file():
        print(f"installing {', '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
        torch_pin = folder / "constraints.txt"
        torch_pin.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        subprocess.run([*pip, "--constraint", torch_pin, "torch"], check=True)
        subprocess.run([*pip, "--constraint", torch_pin, *packages], check=True)
        # Comes with them, is not needed here, and where its build is not torch's, importing transformers fails.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        installed.write_text(" ".join(packages))
    return python


class PeerProcess:
    """A script that runs in a peer's environment: one JSON line in, one JSON line out."""

    def __init__(self, python: Path, script: str, settings: dict[str, Any], threads: int, messages: IO[str]):
        """`messages`: a file for progress bars and warnings, shown only if it fails."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        self.name = script
        self.messages = messages
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True, env=environment,
        )  # fmt: skip
        self.say(settings)

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a line and return the answer; lines that are not JSON objects are the peer's chatter."""
        with suppress(BrokenPipeError):  # it has ended, which the next lines say
            self.say(message)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        status = self.process.wait()
        self.messages.seek(0)
        raise SystemExit(f"{self.messages.read()[-4000:]}\n{self.name} ended with exit status {status}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def peer_process(python: Path, script: str, settings: dict[str, Any], threads: int) -> Iterator[PeerProcess]:
    """A PeerProcess that ends with the block."""
    with tempfile.TemporaryFile("w+") as messages:
        process = PeerProcess(python, script, settings, threads, messages)
        try:
            yield process
        finally:
            process.close()
