"""What is asked before work begins: a cluster with the GPUs that will be wanted, a place to write to, and room."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from jobs.progress import size
from jobs.spec.spec import Spec
from pipeline.model.describe import ModelInfo
from storage.backends.place import Place, open_place
from storage.errors import StorageError
from storage.format.layout import StoreLayout
from storage.harvest.harvest import SiteLayout
from storage.store import open_store
from workers.settings.experiment import TrainSettings


@dataclass
class Cluster:
    """Ray, connected when a stage first needs it: a run that finds everything done starts nothing."""

    spec: Spec
    stack: ExitStack
    stages: tuple[str, ...] = ()
    """The stages that are left to run, the one that connects first among them."""

    def connect(self) -> None:
        """Bring up Ray. Raises InputError when it lacks GPUs that a stage which is left will ask for: of hours of
        harvesting, the training that cannot follow is better known before than after."""
        from workers.cluster.connect import connected, require_gpus

        harvest, train = self.spec.harvest, self.spec.train
        workers = harvest.workers if isinstance(harvest.workers, int) else harvest.worker_range.minimum
        cpus = max(workers * harvest.threads_per_worker, train.threads if train else 1)
        self.stack.enter_context(connected(self.spec.cluster.address, cpus=cpus, env=self.spec.cluster.env))
        for key, gpus in self.gpus_to_come().items():
            require_gpus(gpus, key)

    def gpus_to_come(self) -> dict[str, int]:
        """Key of the spec -> GPUs of a worker, of the stages that are left."""
        train = self.spec.train
        left = [stage for stage in self.stages if train is not None or stage not in ("train", "evaluate")]
        found = {}
        if {"harvest", "evaluate"} & set(left):
            found["harvest.gpus_per_worker"] = self.spec.harvest.gpus_per_worker
        if train is not None and train.gpus and "train" in left and not _are_trained(self.spec.store, train):
            found["train.gpus"] = int(train.gpus)
        return found


def _are_trained(url: str, train: TrainSettings) -> bool:
    from storage.results.runs import open_run

    if not StoreLayout(open_place(url)).root_record.exists():
        return False
    store = open_store(url)
    return all(open_run(store, dictionary.name).is_finished for dictionary in train.dictionaries)


@contextmanager
def cluster_for(spec: Spec) -> Iterator[Cluster]:
    """Give a cluster that is left again at the end of the block."""
    with ExitStack() as stack:
        yield Cluster(spec, stack)


def unit_bytes(rows: int, sites: dict[str, SiteLayout]) -> int:
    """Return the bytes of one whole unit of `rows` rows: activations, norms and scales."""
    return sum(rows * layout.row_bytes for layout in sites.values())


def bytes_of_rows(spec: Spec, info: ModelInfo, num_rows: int) -> int:
    """Return the bytes of `num_rows` new rows at the spec's sites, in whole units."""

    per_unit = spec.corpus.unit_size(num_rows)
    types = spec.harvest.stored_types()
    sites = {site: SiteLayout.of(info.d_model, stored, per_unit) for site, stored in types.items()}
    return -(-num_rows // per_unit) * unit_bytes(per_unit, sites)


def check_place(place: Place) -> None:
    """Raise StorageError unless a store can be written at a place. Of a local store that is there it is asked when
    something is to be written: a finished one may be read-only."""
    if not (place.backend.is_local and StoreLayout(place).root_record.exists()):
        place.backend.check_writable()


def check_room(place: Place, needed: int) -> None:
    """Raise StorageError unless a local place can be written and has `needed` bytes free."""
    if not place.backend.is_local or not needed:
        return
    place.backend.check_writable()
    path = place.path
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"the disk of {path} is too full: the harvest needs {size(needed)} and {size(free)} are free; "
            "make room, ask for fewer rows or sites, or put the store elsewhere"
        )
