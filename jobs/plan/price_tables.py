"""The tables that come with Granary and that people may replace: prices, and what storage types cost.

Values only: `jobs.plan.economics` reckons with the prices.
"""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.spec.yaml_text import NotYaml, read_yaml
from pipeline.errors import InputError
from storage.backends.place import home_expanded

PRICES = Path(__file__).with_name("prices.yaml")
STORAGE_TYPES = Path(__file__).with_name("storage_types.yaml")


class Prices(BaseModel):
    """What things cost, in `currency`. See jobs/plan/prices.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    as_of: str
    currency: str
    gpu_hour: float
    """One GPU for an hour, with the machine around it."""
    cpu_hour: float
    """One CPU core for an hour, on workers without a GPU."""
    object_gib_month: float
    """A GiB in an object store for a month."""
    disk_gib_month: float
    """A GiB on a disk for a month, for stores that are a folder."""
    put_1000: float
    """1,000 requests that write or list."""
    get_1000: float
    """1,000 requests that read."""
    egress_gib: float
    """A GiB read from an object store by machines elsewhere; 0 where the trainers are beside it."""


class TypeCost(BaseModel):
    """What storing as one type cost the reference model and autoencoder. See jobs/plan/storage_types.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    relative_error: float
    fvu_change: float
    fvu_change_trained: float


class StorageCosts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    measured: str
    """When, on what, and how."""
    types: dict[str, TypeCost]


def load_prices(path: str | Path | None = None) -> Prices:
    """Read a price table; the one that comes with Granary, if not given. Raises InputError."""
    file = PRICES if path is None else home_expanded(path)
    try:
        raw: Any = read_yaml(file.read_text(encoding="utf-8"))
    except NotYaml as error:
        raise InputError(f"the prices {file} are not valid YAML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prices {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        prices = Prices.model_validate(raw)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'the table'}: {e['msg'].lower()}" for e in error.errors()]
        raise InputError(f"the prices {file}: {'; '.join(wrong)} (copy {PRICES} and change its values)") from None
    negative = [name for name, value in prices if isinstance(value, float) and not 0 <= value < float("inf")]
    if negative:
        raise InputError(f"the prices {file}: {', '.join(negative)} must be a number from 0 up")
    return prices


@cache
def storage_costs() -> StorageCosts:
    """What each storage type costs, as it was measured on the reference model."""
    return StorageCosts.model_validate(read_yaml(STORAGE_TYPES.read_text(encoding="utf-8")))
