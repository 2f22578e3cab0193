"""A short, seeded sample of harvests whose requests fail; all of them are in the campaign (`make faults`)."""

import re
from pathlib import Path

import pytest
from objects import check_same_objects, harvest, harvest_through_faults, objects_of
from processes import DEADLINE_S, Run, until, write_spec
from s3 import KEY_ID, SECRET, S3Server, running_proxy

from jobs.demo.corpus import write_corpus
from storage.backends.place import Place, open_place
from storage.store import open_store

ROWS = 24_000


@pytest.mark.slow
def test_one_request_in_five_fails(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    write_corpus(tmp_path / "corpus.parquet")
    undisturbed = harvest(tmp_path / "a", tmp_path / "corpus.parquet", f"{bucket}/undisturbed", s3, rows=ROWS)
    disturbed = harvest_through_faults(
        tmp_path / "b", tmp_path / "corpus.parquet", f"{bucket}/disturbed", s3, rate=0.2, seed=1, rows=ROWS
    )
    check_same_objects(disturbed.url, undisturbed)
    share = disturbed.spoiled / sum(disturbed.counts.values())
    assert 0.12 < share < 0.28, disturbed.counts
    assert all(disturbed.counts[kind] for kind in ("slowdown", "error", "reset", "cut", "stall", "swallow"))


@pytest.mark.slow
def test_credentials_that_expire_in_mid_run(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    """The run pauses, says so, and goes on when they are renewed; or ends in one sentence when they are not."""
    write_corpus(tmp_path / "corpus.parquet")
    corpus = {"rows": ROWS, "rows_per_unit": 1024}
    place = open_place(f"{bucket}/acts")
    spec = write_spec(tmp_path, tmp_path / "corpus.parquet", store=str(place), corpus=corpus)
    with running_proxy(s3) as proxy:
        for patience_s, renewed in (("4", False), ("120", True)):
            done = len(commits_of(place))
            run = Run.start("harvest", spec, environment=proxy.environment(GRANARY_PATIENCE_S=patience_s))
            try:
                assert until(lambda done=done: len(commits_of(place)) > done, run), run.log.read_text()  # type: ignore[misc]
                proxy.rules(expired=[KEY_ID])
                if renewed:
                    assert until(lambda: "waiting: s3:" in run.log.read_text(), run), run.log.read_text()  # noqa: B023
                    proxy.rules(expired=[])
                    run.wait()
                else:
                    assert run.process.wait(DEADLINE_S) == 1
                    proxy.rules(expired=[])
            finally:
                run.end()
            words = run.log.read_text()
            assert SECRET not in words
            assert "Traceback" not in words
            if renewed:
                said = [line for line in words.splitlines() if line.startswith(("waiting: s3:", "going on"))]
                assert said[1:] in ([], ["going on: the store answers again"])  # unless all is done by then
            else:
                (last,) = [line for line in words.splitlines() if line.startswith("granary: ")]
                assert "ExpiredToken (The provided token has expired); tried again for" in last
    store = open_store(str(place))
    assert len(commits_of(place)) == store.info.num_units
    for site in store.sites:
        assert len(store.read(site)) == ROWS


def commits_of(place: Place) -> list[str]:
    return [name for name in objects_of(place / "commits") if re.fullmatch(r"\w+/\d+/[\d-]+\.json", name)]
