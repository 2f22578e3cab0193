"""A cache of the Hugging Face hub as downloading lays it out, for offline use; a plugin of tests/conftest.py."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants


@dataclass(frozen=True)
class FakeHub:
    """Repositories with refs and snapshots, and no server behind them."""

    cache: Path

    def add(self, repository: str, folder: Path, ref: str = "main", leaving_out: tuple[str, ...] = ()) -> str:
        """Add a commit with the files of a folder, and let `ref` be that commit. Return it."""
        home = self.cache / f"models--{repository.replace('/', '--')}"
        commit = hashlib.sha1(f"{repository} {len(list(home.glob('snapshots/*')))}".encode()).hexdigest()
        snapshot = home / "snapshots" / commit
        (home / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name in leaving_out:
                continue
            blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        self.point(repository, ref, commit)
        return commit

    def point(self, repository: str, ref: str, commit: str) -> None:
        """Let a branch or tag be a commit."""
        path = self.cache / f"models--{repository.replace('/', '--')}" / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """An empty cache, which this process and those that it starts take for the one of this machine."""
    cache = tmp_path / "hf" / "hub"
    cache.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))  # read when the library was imported
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return FakeHub(cache)
