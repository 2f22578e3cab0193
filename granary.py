"""Granary's public names in one place.

    import granary
    store = granary.open_store("/data/acts")
    acts = store.read("resid_post.8", [3, 1, 4])
    dictionary = granary.load_dictionary("/data/acts/runs/sae")

Names are loaded when they are first used: importing this module costs no torch and no Ray, and reading a store never
loads them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.report import write_report as write_report
    from jobs.spec.spec import Spec as Spec
    from jobs.spec.spec import load_spec as load_spec
    from pipeline.sdl.dictionary.dictionary import Dictionary as Dictionary
    from pipeline.sdl.dictionary.files import load_dictionary as load_dictionary
    from storage.errors import StorageError as StorageError
    from storage.store import Store as Store
    from storage.store import open_store as open_store

_HOMES = {
    "Dictionary": "pipeline.sdl.dictionary.dictionary",
    "Spec": "jobs.spec.spec",
    "StorageError": "storage.errors",
    "Store": "storage.store",
    "load_dictionary": "pipeline.sdl.dictionary.files",
    "load_spec": "jobs.spec.spec",
    "open_store": "storage.store",
    "write_report": "jobs.report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"granary has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
