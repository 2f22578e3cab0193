"""A short, seeded sample of the fault campaign; all of it is `make faults`."""

from collections.abc import Iterator
from pathlib import Path

import campaign
import pytest
from campaign import CAMPAIGNS, Campaign
from disks import CannotMount
from processes import QUICK, Run, check_same, write_spec


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    spec = write_spec(tmp_path_factory.mktemp("faults") / "undisturbed", library)
    Run.start("harvest", spec).wait()
    return spec.parent / "store"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("harvester", 2), ("driver", 2), ("node", 1), ("hang", 1), ("disk", 2)])
def test_the_same_bytes(kind: str, times: int, tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path / kind, library, cluster=QUICK)
    try:
        assert len(list(CAMPAIGNS[kind].disturb(spec, 1, times))) == times
    except CannotMount as error:
        pytest.skip(str(error))
    check_same(spec.parent / "store", undisturbed)


@pytest.mark.slow
def test_a_case_that_fails_counts_what_was_done(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of four faults a run is the last before the run fails; the campaign goes on until it has four."""

    def fail_after_two(spec: Path, seed: int, times: int) -> Iterator[None]:
        yield
        yield
        raise AssertionError("the run failed")

    monkeypatch.setattr(campaign, "write_spec", lambda folder, corpus, **sections: folder / "spec.yaml")
    line, failures = campaign.run(Campaign("a fault", fail_after_two, 4, 4), tmp_path, "fault", 0, 4)
    assert line.startswith("| a fault | 4 | 2 | 0 of 2 |")
    assert failures == 2
    assert capsys.readouterr().out.count("FAILED after 2 times") == 2
