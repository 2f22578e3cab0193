"""Verifying a store: every object against what was written, every fault at once.

Every record carries its own checksum, chunks carry theirs and are in the commits as well, and files of other formats
are named with their sha256 by the record that was written after them. So a store needs nothing but itself to be
checked, and what is found is a list of faults that name the object; what to do about each is in its remedy
(`workers.check.repair`). What this cannot find is a store that is consistent and false: `workers.check.recompute` runs
the model again.

Reads everything once, in the memory of a few requests; changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from storage.backends.place import Place
from storage.errors import NotAStore, StorageError, Unreachable
from storage.format.arrays import group_metadata
from storage.format.layout import GROUP, StoreLayout
from storage.harvest.harvest import Harvest, model_attributes, read_harvest
from storage.harvest.log import log_of
from storage.store import Store, open_store
from storage.verify.findings import (
    ByHand,
    Check,
    Checked,
    Fault,
    Finding,
    Note,
    Remove,
    check_record,
    read_sound,
    reason,
)
from storage.verify.names import name_notes
from storage.verify.results import anchor_checks, run_checks
from storage.verify.table import corpus_findings
from storage.verify.units import unit_checks

RESTORE = "restore it from a copy"
CHECKS_PER_THREAD = 4
"""Checks that wait for each thread: they hide the time between two of them."""

OnBytes = Callable[[int], None]
Units = Mapping[str, Sequence[int]]
"""Harvest -> some of its units."""


def verify(root: Place, on_bytes: OnBytes = lambda read: None, only: Units | None = None) -> Iterator[Finding]:
    """Yield every fault of a store, and notes. `only`: check the data of these units alone, and all records.

    `on_bytes` hears how many bytes each check has read. Raises NotAStore when there is no store, Unreachable when its
    place does not answer.
    """
    try:
        store = open_store(root)
    except (NotAStore, Unreachable):
        raise
    except StorageError as error:
        place = StoreLayout(root).root_record
        yield Fault(place, "the root record", reason(error, place), ByHand(RESTORE))
        yield Note("without the root record nothing else can be checked")
        return
    yield from corpus_findings(store, partial(_run, store, on_bytes), data=only is None)
    harvests: list[tuple[float, Harvest]] = []
    for name in StoreLayout(root).harvests.names():
        expected = "the record of a harvest"
        place = StoreLayout(root).harvest(name)
        advice = (
            f"{RESTORE}, or remove it and run `granary harvest` on the spec that made it, which writes it again; "
            "until then the harvest cannot be read, and was not checked"
        )
        try:
            harvests.append(read_harvest(root, name))
        except FileNotFoundError:
            yield Fault(place, expected, "nothing", ByHand(advice))
        except Unreachable:
            raise
        except (StorageError, OSError) as error:
            yield Fault(place, expected, reason(error, place), ByHand(advice))
    ordered = [harvest for _, harvest in sorted(harvests, key=lambda of: (of[0], of[1].digest))]
    yield from _run(store, on_bytes, _metadata_checks(store, ordered))
    for harvest in ordered:
        yield from _run(store, on_bytes, _record_checks(store, harvest))
        committed = log_of(store, harvest).committed()
        units = sorted(committed if only is None else committed & frozenset(only.get(harvest.digest, ())))
        yield from _run(store, on_bytes, unit_checks(store, harvest, units))
    yield from _run(store, on_bytes, anchor_checks(store))
    yield from _run(store, on_bytes, run_checks(store))
    yield from name_notes(store, ordered)


def stored_bytes(store: Store) -> int:
    """About how many bytes `verify` will read: those of all committed units."""
    total = 0
    for harvest in store.harvests:
        committed = log_of(store, harvest).committed()
        for site in harvest.sites:
            row_bytes = sum(array.row_bytes for array in harvest.arrays(store.root, store.num_rows, site).values())
            total += len(committed) * store.info.rows_per_unit * row_bytes
    return total


def _run(store: Store, on_bytes: OnBytes, checks: Iterable[Check]) -> Iterator[Fault]:
    """Run checks in as many threads as the place can use; yield their faults in the order of the checks."""
    threads = store.root.backend.threads
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        waiting: deque[Future[Checked]] = deque()

        def settle() -> Iterator[Fault]:
            checked = waiting.popleft().result()
            on_bytes(checked.num_bytes)
            yield from checked.faults

        for check in checks:
            waiting.append(pool.submit(check))
            if len(waiting) >= CHECKS_PER_THREAD * threads:
                yield from settle()
        while waiting:
            yield from settle()


def _metadata_checks(store: Store, harvests: Sequence[Harvest]) -> Iterator[Check]:
    """The groups and arrays of activations and norms."""
    layout, groups = StoreLayout(store.root), dict[Place, Check]()
    for harvest in harvests:  # oldest first: a model's groups were written by its first harvest
        attributes = group_metadata(model_attributes(harvest))
        for site in harvest.sites:
            for kind, array in harvest.arrays(store.root, store.num_rows, site).items():
                of_kind, of_model = layout.group(kind) / GROUP, layout.group(kind, harvest.model) / GROUP
                groups.setdefault(of_kind, partial(check_record, of_kind, group_metadata({}), "a group's metadata"))
                groups.setdefault(
                    of_model,  # of two first harvests at once either may have been faster
                    partial(check_record, of_model, attributes, "a model's metadata", but="made_with"),
                )
                yield partial(check_record, array.path / GROUP, array.metadata(), "an array's metadata")
    yield from groups.values()


def _record_checks(store: Store, harvest: Harvest) -> Iterator[Check]:
    """The small records beside a harvest's commits, none of which holds anything that is lost with it."""
    log = log_of(store, harvest)

    def bitmap() -> Checked:
        try:
            # That each of its units has a commit shows when the commits are read.
            log.bitmap()
        except Unreachable:
            raise
        except (StorageError, OSError) as error:
            place, expected = log.layout.bitmap(harvest.digest), "the bitmap of committed units"
            return Checked((Fault(place, expected, reason(error, place), Remove()),))
        return Checked()

    def sealed(place: Place, what: str) -> Checked:
        found = read_sound(place, what, Remove())
        gone = isinstance(found, Fault) and found.found == "nothing"  # its driver ended since we listed it
        return Checked((found,) if isinstance(found, Fault) and not gone else ())

    yield bitmap
    folders = (("a driver", log.layout.drivers(harvest.digest)), ("a failed unit", log.layout.failures(harvest.digest)))
    for kind, place in folders:
        for name in place.names():
            if not name.startswith("."):
                yield partial(sealed, place / name, f"the record of {kind}")
