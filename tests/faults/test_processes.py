"""A short, seeded sample of the fault campaign; all of it is `make faults`."""

from pathlib import Path

import pytest
from campaign import CAMPAIGNS
from processes import QUICK, Run, check_same, write_spec

from jobs.demo.corpus import write_corpus


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "corpus.parquet"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(library: Path) -> Path:
    spec = write_spec(library.parent / "undisturbed", library)
    Run.start("harvest", spec).wait()
    return spec.parent / "store"


@pytest.mark.parametrize(("kind", "times"), [("harvester", 2), ("driver", 2), ("node", 1), ("hang", 1)])
def test_the_same_bytes(kind: str, times: int, library: Path, undisturbed: Path) -> None:
    spec = write_spec(library.parent / kind, library, cluster=QUICK)
    assert CAMPAIGNS[kind].disturb(spec, 1, times) == times
    check_same(spec.parent / "store", undisturbed)
