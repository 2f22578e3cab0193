"""A short, seeded sample of the fault campaign; all of it is `make faults`."""

from pathlib import Path

import pytest
from campaign import CAMPAIGNS
from processes import QUICK, Run, check_same, write_spec


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    spec = write_spec(tmp_path_factory.mktemp("faults") / "undisturbed", library)
    Run.start("harvest", spec).wait()
    return spec.parent / "store"


@pytest.mark.parametrize(("kind", "times"), [("harvester", 2), ("driver", 2), ("node", 1), ("hang", 1)])
def test_the_same_bytes(kind: str, times: int, tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path / kind, library, cluster=QUICK)
    assert CAMPAIGNS[kind].disturb(spec, 1, times) == times
    check_same(spec.parent / "store", undisturbed)
