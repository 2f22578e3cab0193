"""Runs: one folder a dictionary under runs/, with what was asked, how far it got, and what came out.

run.json                 the run's identity and settings, create-only, first
curve.json               training curve up to the checkpoint
checkpoint.safetensors   everything the next step depends on; removed when the run is finished
dictionary.safetensors   the result, with normalisation.safetensors; dictionary.json is written after them, and marks
                         the run as finished
evaluation.json          measurements of the finished dictionary
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from storage.backends.place import Place
from storage.errors import StorageError, StoreMismatch
from storage.format.layout import RUN_FILES, StoreLayout
from storage.format.records import Record, differences, encode, read_record
from storage.read.reader import StoreReader

RUN, CURVE, CHECKPOINT = (RUN_FILES[name] for name in ("run", "curve", "checkpoint"))
DICTIONARY, EVALUATION = (RUN_FILES[name] for name in ("dictionary", "evaluation"))


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Place

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def was_begun(self) -> bool:
        return (self.folder / RUN).exists()

    @property
    def is_finished(self) -> bool:
        return (self.folder / DICTIONARY).exists()

    def begin(self, identity: Record, about: Record) -> None:
        """Claim the name. Raises StoreMismatch, showing both values, when a run of another identity has it."""
        record = {"identity": identity, **about}
        if (self.folder / RUN).create(encode(record)):
            return
        self.check(identity)

    def check(self, identity: Record) -> None:
        """Raise StoreMismatch if the run is there and of another identity."""
        if not self.was_begun:
            return
        found = self.record()["identity"]
        if found != identity:
            raise StoreMismatch(
                f"the run {self.name!r} is in the store, of another kind: {'; '.join(differences(found, identity))}. "
                "Give the dictionary another name, or the stored values"
            )

    def record(self) -> Record:
        """run.json: {"identity": ..., "anchors": ..., "made_with": ...}."""
        return read_record(self.folder / RUN)

    def save_checkpoint(self, curve: list[Record], checkpoint: bytes) -> None:
        """Write the curve, then the checkpoint. A curve that is ahead of its checkpoint is cut when it is read.

        The curve's record names the new checkpoint and the one before: either may be there if the process dies."""
        before = self.checkpoint_digests()[-1:]
        digests = [*before, hashlib.sha256(checkpoint).hexdigest()]
        (self.folder / CURVE).write(encode({"points": curve, "checkpoint_sha256": digests}))
        (self.folder / CHECKPOINT).write(checkpoint)

    def read_checkpoint(self) -> bytes | None:
        """The checkpoint, if there is one. Raises StorageError when it is not what was written."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        content = path.read()
        if hashlib.sha256(content).hexdigest() not in self.checkpoint_digests():
            raise StorageError(f"the checkpoint {path} is damaged; remove it, and `granary train` begins the run anew")
        return content

    def checkpoint_digests(self) -> list[str]:
        """The sha256 of each checkpoint that may be there."""
        if not (self.folder / CURVE).exists():
            return []
        digests: list[str] = read_record(self.folder / CURVE)["checkpoint_sha256"]
        return digests

    def curve(self, up_to_step: int | None = None) -> list[Record]:
        """The points of the training curve, in order of steps."""
        if not (self.folder / CURVE).exists():
            return []
        points: list[Record] = read_record(self.folder / CURVE)["points"]
        return [p for p in points if up_to_step is None or p["step"] < up_to_step]

    def finish(self, curve: list[Record], files: Mapping[str, bytes]) -> None:
        """Write the result, dictionary.json last with the sha256 of the other files, and drop the checkpoint."""
        curve_record = {"points": curve, "checkpoint_sha256": self.checkpoint_digests()}
        (self.folder / CURVE).write(encode(curve_record))
        others = {name: content for name, content in files.items() if name != DICTIONARY}
        for name, content in others.items():
            (self.folder / name).write(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
        (self.folder / DICTIONARY).write(encode({**json.loads(files[DICTIONARY]), "files": digests}))
        (self.folder / CHECKPOINT).remove()

    def write_evaluation(self, record: Record) -> None:
        (self.folder / EVALUATION).write(encode(record))

    def evaluation(self) -> Record | None:
        """evaluation.json, if the run was evaluated."""
        path = self.folder / EVALUATION
        return read_record(path) if path.exists() else None

    def dictionary_record(self) -> Record:
        """dictionary.json. Raises StorageError when the run is not finished."""
        if not self.is_finished:
            raise StorageError(f"the run {self.name!r} is not finished; `granary train` goes on with it")
        return read_record(self.folder / DICTIONARY)


def open_run(store: StoreReader, name: str) -> Run:
    return Run(StoreLayout(store.root).run(name))


def list_runs(store: StoreReader) -> list[Run]:
    """Every run that was begun, by name."""
    runs = [open_run(store, name) for name in StoreLayout(store.root).runs.names()]
    return [run for run in runs if run.was_begun]
