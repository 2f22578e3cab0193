"""Runs: one folder a dictionary under runs/, with what was asked, how far it got, and what came out.

run.json                 the run's identity and settings, create-only, first
curve.json               training curve up to the checkpoint
checkpoint.safetensors   everything the next step depends on; removed when the run is finished
dictionary.safetensors   the result; dictionary.json is written after it, and marks the run as finished
evaluation.json          measurements of the finished dictionary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StorageError, StoreMismatch
from storage.files import create_file, write_file
from storage.records import Record, differences, encode, read_record
from storage.store import Store


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / "dictionary.json").exists()

    def begin(self, identity: Record, about: Record) -> None:
        """Claim the name. Raises StoreMismatch, showing both values, when a run of another identity has it."""
        record = {"identity": identity, **about}
        if create_file(self.folder / "run.json", encode(record)):
            return
        self.check(identity)

    def check(self, identity: Record) -> None:
        """Raise StoreMismatch if the run is there and of another identity."""
        if not (self.folder / "run.json").exists():
            return
        found = self.record()["identity"]
        if found != identity:
            raise StoreMismatch(
                f"the run {self.name!r} is in the store, of another kind: {'; '.join(differences(found, identity))}. "
                "Give the dictionary another name, or the stored values"
            )

    def record(self) -> Record:
        """run.json: {"identity": ..., "anchors": ..., "made_with": ...}."""
        return read_record(self.folder / "run.json")

    def save_checkpoint(self, curve: list[Record], checkpoint: bytes) -> None:
        """Write the curve, then the checkpoint. A curve that is ahead of its checkpoint is cut when it is read."""
        write_file(self.folder / "curve.json", [encode({"points": curve})])
        write_file(self.folder / "checkpoint.safetensors", [checkpoint])

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors"
        return path if path.exists() else None

    def curve(self, up_to_step: int | None = None) -> list[Record]:
        """The points of the training curve, in order of steps."""
        if not (self.folder / "curve.json").exists():
            return []
        points: list[Record] = read_record(self.folder / "curve.json")["points"]
        return [p for p in points if up_to_step is None or p["step"] < up_to_step]

    def finish(self, curve: list[Record], files: Mapping[str, bytes]) -> None:
        """Write the result, dictionary.json last, and drop the checkpoint."""
        write_file(self.folder / "curve.json", [encode({"points": curve})])
        for name, content in sorted(files.items(), key=lambda item: item[0] == "dictionary.json"):
            write_file(self.folder / name, [content])
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def write_evaluation(self, record: Record) -> None:
        write_file(self.folder / "evaluation.json", [encode(record)])

    def evaluation(self) -> Record | None:
        """evaluation.json, if the run was evaluated."""
        path = self.folder / "evaluation.json"
        return read_record(path) if path.exists() else None

    def dictionary_record(self) -> Record:
        """dictionary.json. Raises StorageError when the run is not finished."""
        if not self.is_finished:
            raise StorageError(f"the run {self.name!r} is not finished; `granary train` goes on with it")
        return read_record(self.folder / "dictionary.json")


def open_run(store: Store, name: str) -> Run:
    return Run(store.path / "runs" / name)


def list_runs(store: Store) -> list[Run]:
    """Every run that was begun, by name."""
    return [Run(path.parent) for path in sorted((store.path / "runs").glob("*/run.json"))]
