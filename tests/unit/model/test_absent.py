"""Models that cannot be had: what a cache lacks, what the hub refuses, and names that are addresses."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hub import FakeHub
from lab import Lab

from pipeline.checkpoints.repository_names import check_dataset_address, check_name
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.tokens.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
OFFLINE = "and HF_HUB_OFFLINE is set, so that nothing is downloaded; "


@pytest.fixture
def cached(hub: FakeHub, make_model: Callable[..., Path]) -> dict[str, str]:
    """The commits of a/tiny in the cache, by their names."""
    found = {ref: hub.add("a/tiny", make_model(), ref=ref) for ref in ("main", "step2000")}
    hub.point("a/tiny", "v1", found["main"])
    return found


@pytest.mark.parametrize("revision", ["v9", "0" * 40, "refs/pr/7"])
def test_a_revision_that_the_cache_lacks(hub: FakeHub, cached: dict[str, str], revision: str) -> None:
    known = f"main, v1 ({cached['main'][:12]}); step2000 ({cached['step2000'][:12]})"
    ways = f"give one that is there, or download it (hf download a/tiny --revision {revision}), or unset it"
    for load in (describe_model, load_tokenizer):
        with pytest.raises(InputError) as refused:
            load("a/tiny", revision)
        said = str(refused.value)
        assert f"the cache of this machine ({hub.cache}) has no revision {revision} of a/tiny, but " in said
        assert all(part in said for part in known.split("; "))
        assert said.endswith(f", {OFFLINE}{ways}")
        assert "\n" not in said


@pytest.mark.parametrize("spelling", [lambda commit: commit[:7], lambda commit: commit[:10].upper(), str.upper])
def test_a_commit_that_is_not_written_as_it_is(cached: dict[str, str], spelling: Callable[[str], str]) -> None:
    commit = cached["main"]
    for load in (describe_model, load_tokenizer):
        with pytest.raises(InputError, match=f"a commit is named by all of its 40 digits; write {commit} as the rev"):
            load("a/tiny", spelling(commit))


def test_a_repository_that_the_cache_lacks(hub: FakeHub, cached: dict[str, str]) -> None:
    with pytest.raises(InputError) as refused:
        describe_model("a/tinny")
    assert str(refused.value) == (
        f"model.id: a/tinny cannot be loaded: no folder is here, the cache of this machine ({hub.cache}) has nothing "
        f"of a/tinny, though of a/tiny, {OFFLINE}download it (hf download a/tinny), or unset it"
    )
    with pytest.raises(InputError, match=r"has nothing of nobody/nothing, and HF_HUB_OFFLINE is set"):
        load_tokenizer("nobody/nothing")


def test_an_empty_cache(hub: FakeHub) -> None:
    shutil.rmtree(hub.cache)
    with pytest.raises(InputError, match=r"has nothing of a/tiny, and HF_HUB_OFFLINE is set"):
        describe_model("a/tiny")


def test_a_snapshot_without_config_or_tokenizer(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    hub.add("a/tiny", make_model(), leaving_out=("config.json", "tokenizer.json", "tokenizer_config.json"))
    with pytest.raises(InputError, match=r"has the revision main of a/tiny without config\.json, and HF_HUB_OFFLINE"):
        describe_model("a/tiny")
    with pytest.raises(InputError, match=r"has the revision main of a/tiny without tokenizer\.json, and HF_HUB_OFF"):
        load_tokenizer("a/tiny")


def test_the_command_says_so_and_writes_nothing(lab: Lab, cached: dict[str, str], no_ray: None) -> None:
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, lab.spec({"model.id": "a/tiny", "model.revision": "v9"}))
        assert err.startswith("granary: model.id: a/tiny cannot be loaded: the cache of this machine (")
        given = {"model.tokenizer": "a/tiny", "model.tokenizer_revision": "v9"}
        assert "no tokenizer at a/tiny: the cache of this machine (" in lab.refused(verb, lab.spec(given))


# ---- the hub over HTTP, or no network

ASK = """
import sys
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
try:
    describe_model("a/tiny", sys.argv[1])
except InputError as error:
    print(error)
"""


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that gives every request one status and one error code."""
    status, code = request.param

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def asked(endpoint: str, home: Path, revision: str) -> str:
    """What a process of its own says of a model on the hub at an address."""
    there = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    there.pop("HF_HUB_CACHE", None)
    there |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    found = subprocess.run(
        [sys.executable, "-c", ASK, revision], env=there, capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.slow  # imports everything anew
@pytest.mark.parametrize(
    ("answering", "expected"),
    [
        ((404, "RepoNotFound"), "has no a/tiny, or one that without a token (HF_TOKEN) nobody may see; mend the name"),
        ((401, ""), "has no a/tiny, or one that without a token (HF_TOKEN) nobody may see; mend the name, or set HF"),
        ((403, "GatedRepo"), "gives it to those only who asked for access: ask at {0}/a/tiny, and set HF_TOKEN"),
        ((404, "RevisionNotFound"), "{0}/a/tiny has no branch, tag or commit v9; mend the revision"),
        ((404, "EntryNotFound"), "{0}/a/tiny has no config.json at v9; give a repository with a model of transf"),
        ((500, ""), "has nothing of a/tiny, and {0} answered HTTP 500; try again, or download it (hf download a/tiny"),
    ],
    indirect=["answering"],
)
def test_what_the_hub_refuses(answering: str, tmp_path: Path, expected: str) -> None:
    said = asked(answering, tmp_path, "v9")
    assert said.startswith("model.id: a/tiny cannot be loaded: ")
    assert expected.replace("{0}", answering) in said


@pytest.mark.slow
def test_no_network(tmp_path: Path, hub: FakeHub, cached: dict[str, str]) -> None:
    said = asked("http://127.0.0.1:9", hub.cache.parent, "v9")
    assert f"({hub.cache}) has no revision v9 of a/tiny, but " in said
    assert "and http://127.0.0.1:9 cannot be reached; give one that is there, or try again, or download it (hf" in said


# ---- names

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("https://huggingface.co/x/y", "x/y", None),
        ("https://huggingface.co/x/y/", "x/y", None),
        ("http://www.huggingface.co/x/y", "x/y", None),
        ("huggingface.co/x/y", "x/y", None),
        ("https://hf.co/x/y/tree/v1.5", "x/y", "v1.5"),
        ("hf.co/x/y/tree/main", "x/y", None),
        (f"https://huggingface.co/x/y/commit/{COMMIT}", "x/y", COMMIT),
        ("https://huggingface.co/x/y/tree/refs%2Fpr%2F3", "x/y", "refs/pr/3"),
        ("https://huggingface.co/x/y/tree/refs/pr/3/sub", "x/y", "refs/pr/3"),
        ("https://huggingface.co/x/y/blob/step10/config.json", "x/y", "step10"),
        ("https://huggingface.co/x/y/resolve/main/model.safetensors?download=true", "x/y", None),
        ("https://huggingface.co/x/y?library=transformers#use", "x/y", None),
        ("https://huggingface.co/x/y/discussions/4", "x/y", None),
        ("https://huggingface.co/gpt2", "gpt2", None),
        ("https://huggingface.co/gpt2/tree/v2", "gpt2", "v2"),
        ("https://hf-mirror.com/x/y", "x/y", None),
        ("https://huggingface.co/x/y.git", "x/y", None),
        ("git@hf.co:x/y", "x/y", None),
        ("hf://x/y@v2", "x/y", "v2"),
        ("hf://models/x/y", "x/y", None),
        ("x/y@v2", "x/y", "v2"),
        ("x/y/", "x/y", None),
        ("x/y/tree/v2", "x/y", "v2"),
        (" x/y ", "x/y", None),
        ("gpt2/", "gpt2", None),
    ],
)
def test_addresses_are_told_the_name_to_write(name: str, repository: str, revision: str | None) -> None:
    at = f", and model.revision: {revision}" if revision else ""
    with pytest.raises(InputError) as refused:
        describe_model(name)
    expected = f"model.id: {name} is no folder here and no name of a repository; write model.id: {repository}{at}"
    assert str(refused.value) == expected
    with pytest.raises(InputError) as refused:
        load_tokenizer(name)
    assert str(refused.value) == expected.replace("model.id", "model.tokenizer").replace(
        "model.revision", "model.tokenizer_revision"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://huggingface.co/datasets/x/y", "is a dataset, not a model; give a model's OWNER/NAME"),
        ("hf.co/spaces/x/y", "is a space, not a model"),
        ("https://huggingface.co/", "names no repository; write a model's OWNER/NAME"),
        ("s3://bucket/model", "a s3:// URL is no model that can be loaded; give a folder, or a name on the hub"),
        ("https://example.com/x/y", "a https:// URL is no model that can be loaded"),
        ("file:///models/x", "a file:// URL is no model that can be loaded"),
    ],
)
def test_addresses_of_other_things(name: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        describe_model(name)
    assert f"model.id: {name} {expected}" in str(refused.value) or f"model.id: {expected}" in str(refused.value)


@pytest.mark.parametrize(
    ("path", "is_named", "expected"),
    [
        (
            "https://huggingface.co/datasets/x/y",
            False,
            "is a page about a dataset; write corpus.path: x/y, and",
        ),
        (
            "https://huggingface.co/datasets/x/y/tree/main/data",
            False,
            "write corpus.path: x/y, and corpus.format",
        ),
        (
            "https://hf.co/datasets/x/y/viewer/default/train?row=3",
            False,
            "write corpus.path: x/y, and corpus.format",
        ),
        ("https://huggingface.co/datasets/squad", True, "write corpus.path: squad, and corpus.format: datasets with"),
        ("huggingface.co/datasets/x/y/resolve/main/a.parquet", True, "write corpus.path: x/y, and corpus.format"),
        (
            "https://huggingface.co/datasets/x/y/blob/main/a.parquet",
            False,
            "is a page about the file; write https://huggingface.co/datasets/x/y/resolve/main/a.parquet",
        ),
    ],
)
def test_pages_about_datasets(path: str, is_named: bool, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        check_dataset_address(path, is_named=is_named)
    assert str(refused.value).startswith(f"corpus.path: {path} ")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("path", "is_named"),
    [
        ("https://huggingface.co/datasets/x/y/resolve/main/a.parquet", False),
        ("hf://datasets/x/y/data/*.parquet", False),
        ("https://example.com/datasets/x/y", False),
        ("x/y", True),
        ("datasets/y", True),
        ("/data/datasets/x", False),
    ],
)
def test_places_of_files_are_left_alone(path: str, is_named: bool) -> None:
    check_dataset_address(path, is_named=is_named)


@pytest.mark.parametrize(
    "name", ["x/y", "gpt2", "meta-llama/Llama-3.1-8B", "models/llama/8b", "a/b/c/d", "datasets/x", "x/tree/main"]
)
def test_names_and_paths_are_left_alone(name: str) -> None:
    check_name(name, "model.id", "model.revision")


def test_the_command_refuses_an_address(lab: Lab, no_ray: None) -> None:
    for verb in ("plan", "harvest", "run"):
        err = lab.refused(verb, lab.spec({"model.id": "https://huggingface.co/x/y/tree/v2"}))
        assert err.endswith("write model.id: x/y, and model.revision: v2\n")
        err = lab.refused(verb, lab.spec({"corpus.path": "https://huggingface.co/datasets/x/y"}))
        assert "is a page about a dataset; write corpus.path: x/y" in err
        err = lab.refused(verb, lab.spec({"model.tokenizer": "hf.co/x/y"}))
        assert err.endswith("write model.tokenizer: x/y\n")


def test_a_folder_of_such_a_name_is_a_folder(lab: Lab, llama: Path) -> None:
    shutil.copytree(llama, lab.folder / "hf.co" / "x" / "y")
    assert "rows" in lab.run("plan", lab.spec({"model.id": "hf.co/x/y"}))
