"""`granary verify`: check a store, audit units against the model, repair what can be repaired."""

import argparse
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs.progress import ProgressLine, counted, size
from storage.backends.place import Place, open_place
from storage.errors import StorageError
from storage.format.records import Record
from storage.store import open_store
from storage.verify.findings import Fault, Note, Remake
from storage.verify.verify import Units, stored_bytes, verify

if TYPE_CHECKING:  # torch takes seconds to import, and a plain `verify` needs none
    from pipeline.model.placement import Placement

MIB = 2**20


@dataclass
class Report:
    """What was found and done, told as it happens (`--json`: at the end)."""

    root: Place
    is_json: bool
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    audited: list[Record] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)
    objects: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def say(self, text: str) -> None:
        if not self.is_json:
            print(text, flush=True)

    def fault(self, fault: Fault) -> None:
        self.faults.append(fault)
        self.say(f"fault     {fault_text(fault, self.root)}")

    def to_record(self, remaining: int) -> Record:
        return {
            "store": str(self.root),
            "objects": self.objects,
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "faults": [fault.to_record(self.root) for fault in self.faults],
            "notes": self.notes,
            "audited": self.audited,
            "repaired": self.repaired,
            "refused": self.refused,
            "faults_left": remaining,
        }


def fault_text(fault: Fault, root: Place) -> str:
    record = fault.to_record(root)
    where = f" (unit {record['unit']} of harvest {record['harvest']})" if "unit" in record else ""
    return f"{record['object']}{where}: expected {fault.expected}; found {fault.found}"


def run_verify(arguments: argparse.Namespace) -> int:
    """Run the command; return 1 if a fault is left."""
    root, models, placement = _asked(arguments)
    report = Report(root, arguments.json)
    if arguments.audit:
        _require_models(root, models)  # before hours of reading
    started = time.monotonic()
    for finding in _verify(report, None):
        if isinstance(finding, Fault):
            report.fault(finding)
        else:
            report.notes.append(finding.text)
    report.seconds = time.monotonic() - started
    for note in report.notes:
        report.say(f"note      {note}")
    report.say(
        f"verified  {counted(report.objects, 'object')}, {size(report.num_bytes)} at "
        f"{size(report.num_bytes / max(report.seconds, 1e-9))}/s: {counted(len(report.faults), 'fault')}"
    )
    if arguments.audit:
        _audit(report, models, placement, arguments.audit, arguments.seed)
    remaining = len(report.faults)
    if arguments.repair and report.faults:
        remaining = _repair(report, models, placement)
    elif report.faults:
        report.say(f"`granary verify {arguments.store} --repair` puts right what the store or the model determines")
    if arguments.json:
        print(json.dumps(report.to_record(remaining), indent=2))
    return 1 if remaining else 0


def _verify(report: Report, only: Units | None) -> Iterable[Fault | Note]:
    total = 0
    if only is None:
        with suppress(StorageError):  # it is for the time left; what is wrong is told by `verify`
            total = stored_bytes(open_store(report.root))
    with ProgressLine("verifying", "MiB", total // MIB) as line:

        def on_bytes(read: int) -> None:
            report.objects += 1
            report.num_bytes += read
            line.update(report.num_bytes // MIB)

        line.update(0)
        yield from verify(report.root, on_bytes if only is None else lambda read: None, only)


def _audit(
    report: Report, models: list[tuple[str, str]], placement: "Placement | None", number: int, seed: int
) -> None:
    from workers.check.recompute import Recomputer, find_model, sample_units

    faulty = {(f.remedy.harvest, f.remedy.unit) for f in report.faults if isinstance(f.remedy, Remake)}
    store = open_store(report.root)
    harvests = {harvest.digest: harvest for harvest in store.harvests}
    chosen = sample_units(store, list(harvests.values()), number, seed)
    total = sum(map(len, chosen.values()))
    outcomes: dict[str, int] = {}
    with ProgressLine("auditing", "units", total) as line:
        line.update(0)
        for digest, units in chosen.items():
            rerunner = Recomputer(store, harvests[digest], find_model(harvests[digest], models), placement)
            for unit in units:
                outcome = "damaged"
                if (digest, unit) not in faulty:
                    outcome = "false"
                    for found in rerunner.audit(unit):
                        if isinstance(found, Fault):
                            report.fault(found)
                        else:
                            outcome = found
                report.audited.append({"harvest": digest, "unit": unit, "outcome": outcome})
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                line.update(len(report.audited))
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    report.say(f"audited   {counted(total, 'unit')} of {len(chosen)} harvest(s), run again with the model: {told}")


def _repair(report: Report, models: list[tuple[str, str]], placement: "Placement | None") -> int:
    """Repair, look again at what was repaired, and return how many faults are left."""
    from workers.check.repair import repair

    def on_repair(what: str) -> None:
        report.repaired.append(what)
        report.say(f"repaired  {what}")

    for refused in repair(report.root, report.faults, models, on_repair, placement):
        objects = [fault.to_record(report.root)["object"] for fault in refused.faults]
        report.refused.append({"objects": objects, "reason": refused.reason})
        report.say(f"refused   {', '.join(objects)}: {refused.reason}")
    refused_objects = {name for refused in report.refused for name in refused["objects"]}
    if not report.repaired:
        report.say(f"repaired  nothing: {counted(len(refused_objects), 'fault')} left")
        return len(refused_objects)
    units: dict[str, list[int]] = {}
    for fault in report.faults:
        if isinstance(fault.remedy, Remake):
            units.setdefault(fault.remedy.harvest, []).append(fault.remedy.unit)
    left = [finding for finding in _verify(report, units) if isinstance(finding, Fault)]
    again = {fault.to_record(report.root)["object"] for fault in left}
    report.say(f"verified  what was repaired: {counted(len(again | refused_objects), 'fault')} left")
    return len(again | refused_objects)


def _asked(arguments: argparse.Namespace) -> tuple[Place, list[tuple[str, str]], "Placement | None"]:
    """The store's place, the models that the caller names (by --model, or in a spec), and where a spec has them run."""
    models = [_model(name) for name in arguments.model]
    if not arguments.store.endswith((".yaml", ".yml")):
        return open_place(arguments.store), models, None
    from jobs.spec.spec import load_spec

    spec = load_spec(arguments.store)
    return open_place(spec.store), [*models, (spec.model.id, spec.model.revision)], spec.harvest.placement


def _model(name: str) -> tuple[str, str]:
    """`id` or `id@revision`."""
    head, at, revision = name.rpartition("@")
    return (head, revision) if at and "/" not in revision else (name, "main")


def _require_models(root: Place, models: list[tuple[str, str]]) -> None:
    from workers.check.recompute import find_model

    for harvest in open_store(root).harvests:
        find_model(harvest, models)
