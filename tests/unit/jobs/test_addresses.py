"""What people write for a cluster, and what Ray's variables hold: which dashboard is meant. No Ray is started."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray.dashboard.utils
import yaml
from lab import Lab

from jobs.spec.spec import load_spec, parse_spec
from jobs.submit.addresses import ADDRESS_VARIABLE, CLUSTER_VARIABLE, ClusterError, dashboard_address
from jobs.submit.submit import _write_working_dir
from pipeline.errors import InputError
from workers.cluster import connect as cluster
from workers.cluster.connect import connected


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)  # a dashboard that wants a token

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[int]:
    """The port of something that answers HTTP."""
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def own_port() -> Iterator[int]:
    """The port of something that does not, as Ray's own."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")  # HTTP/2's first frame

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ADDRESS_VARIABLE, CLUSTER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Ray itself is asked for the dashboard of."""
    found: list[str] = []

    def answer(address: str) -> str:
        found.append(address)
        return "http://10.0.0.1:8265"

    monkeypatch.setattr(ray.dashboard.utils, "ray_address_to_api_server_url", answer)
    return found


def test_a_host_and_a_port_are_a_dashboard(dashboard: int, asked: list[str]) -> None:
    for written in (f"127.0.0.1:{dashboard}", f"http://127.0.0.1:{dashboard}", f"localhost:{dashboard}/"):
        address = dashboard_address(written)
        assert address.startswith("http://")
        assert address.endswith(f":{dashboard}")
    assert asked == []


def test_what_needs_no_asking(asked: list[str]) -> None:
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    assert dashboard_address("head") == "http://head:8265"
    assert dashboard_address("https://ray.example.org/team") == "https://ray.example.org/team"
    assert dashboard_address("http://[::1]:8265") == "http://[::1]:8265"
    assert asked == []


def test_where_nothing_is_the_dashboard_is_meant(asked: list[str]) -> None:
    """So that the sentence about it names what was written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert dashboard_address(f"127.0.0.1:{port}") == f"http://127.0.0.1:{port}"
    assert asked == []


def test_rays_own_address_leads_to_the_dashboard(
    own_port: int, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS as Ray sets it inside a job, and as its own commands take it; here and there a dashboard's."""
    assert dashboard_address(f"127.0.0.1:{own_port}") == "http://10.0.0.1:8265"
    monkeypatch.setenv(CLUSTER_VARIABLE, f"127.0.0.1:{own_port}")
    assert dashboard_address(None) == "http://10.0.0.1:8265"
    monkeypatch.setenv(CLUSTER_VARIABLE, "auto")
    assert dashboard_address(None) == "http://10.0.0.1:8265"
    assert asked == [f"127.0.0.1:{own_port}", f"127.0.0.1:{own_port}", "auto"]


def test_which_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER_VARIABLE, "http://second:8265")
    assert dashboard_address(None) == "http://second:8265"
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://first:8265")
    assert dashboard_address(None) == "http://first:8265"
    assert dashboard_address("http://given:8265") == "http://given:8265"
    monkeypatch.delenv(ADDRESS_VARIABLE)
    monkeypatch.setenv(CLUSTER_VARIABLE, "local")  # asks Ray to start one
    assert dashboard_address(None) == "http://127.0.0.1:8265"


@pytest.mark.parametrize("written", ["ray://head:10001", "head:port", "head:0", "head:70000", "a b", "s3://bucket/x"])
def test_what_is_no_address(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ClusterError, match=r"^--address: expected the address .*, as head:8265 or http://head:8265, not"
    ):
        dashboard_address(written)
    monkeypatch.setenv(CLUSTER_VARIABLE, written)
    with pytest.raises(ClusterError, match=r"^RAY_ADDRESS: expected"):
        dashboard_address(None)


def test_a_cluster_that_does_not_tell(own_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> str:
        raise ConnectionError("Ray is not running.\nStart it.")

    monkeypatch.setattr(ray.dashboard.utils, "ray_address_to_api_server_url", refuse)
    with pytest.raises(ClusterError, match=r"tells where its dashboard is \(Ray is not running\): give the dashboard"):
        dashboard_address(f"127.0.0.1:{own_port}")


# ---- the address of a cluster to join is another one


def test_a_dashboard_is_no_cluster_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://head:8265", "https://head:8265"):
        with pytest.raises(InputError, match=r"cluster\.address: expected .* and found http"), connected(address):
            pass
    monkeypatch.setenv(CLUSTER_VARIABLE, "http://head:8265")
    with pytest.raises(InputError, match=r"found auto, which is RAY_ADDRESS=http://head:8265"), connected("auto"):
        pass


def test_local_is_local_where_ray_address_is_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's documentation says to set it for submitting jobs."""
    monkeypatch.setenv(CLUSTER_VARIABLE, "http://head:8265")
    started: list[dict[str, object]] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with connected("local", cpus=2):
        pass
    assert [options["address"] for options in started] == ["local"]


# ---- the spec that a job is sent


def test_a_job_gets_the_values_of_variables(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine that submits; what was written as text stays text in the job, whatever is set there."""
    monkeypatch.setenv("PLACE", str(tmp_path / "there"))
    spec = load_spec(lab.spec({"store": "${PLACE}/acts-$${LITERAL}"}))
    folder = tmp_path / "job"
    folder.mkdir()
    _write_working_dir(folder, spec)
    monkeypatch.setenv("PLACE", "/elsewhere")
    monkeypatch.setenv("LITERAL", "not this")
    sent = load_spec(folder / "spec.yaml")
    assert sent.store == spec.store == str(tmp_path / "there" / "acts-${LITERAL}")
    raw = yaml.safe_load((folder / "spec.yaml").read_text())
    assert parse_spec(raw, Path("/other")).model_dump(exclude={"cluster"}) == spec.model_dump(exclude={"cluster"})
