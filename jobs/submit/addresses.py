"""Where a cluster's dashboard is, from what people write: a URL, host:port, a name, or Ray's own address of a cluster.

Ray has two addresses of one cluster: its own (head:6379), and that of its dashboard (http://head:8265), which takes
jobs. Ray's commands take either from RAY_ADDRESS, and so does this. What is written without http:// is told apart by
asking it: the dashboard answers HTTP, and Ray's own port knows where the dashboard is.
"""

import http.client
import os
import re
import socket
import urllib.error
import urllib.request

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CLUSTER_VARIABLE = "RAY_ADDRESS"
DEFAULT_PORT = 8265
DEFAULT_ADDRESS = f"http://127.0.0.1:{DEFAULT_PORT}"
ANSWER_S = 5
HOST_AND_PORT = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?/?")


class ClusterError(ValueError):
    """The cluster cannot be reached, or does not have or allow what was asked of it."""


def dashboard_address(given: str | None) -> str:
    """Return the URL of the dashboard at `given`, or where Ray's environment variables say; else on this machine.

    Raises ClusterError for what is no address, and for a cluster that does not tell where its dashboard is.
    """
    source, address = _chosen(given)
    if address.startswith(("http://", "https://")):
        return address
    if address == "auto":
        return _asked_of_ray(address)
    parts = HOST_AND_PORT.fullmatch(address)
    if parts is None or not 0 < int(parts["port"] or DEFAULT_PORT) < 2**16:
        raise ClusterError(
            f"{source}: expected the address of a cluster's dashboard, as head:8265 or http://head:8265, not "
            f"{address!r}"
        )
    url = f"http://{parts['host']}:{parts['port'] or DEFAULT_PORT}"
    if parts["port"] is None or not _is_cluster(parts["host"], int(parts["port"]), url):
        return url
    return _asked_of_ray(f"{parts['host']}:{parts['port']}")


def _chosen(given: str | None) -> tuple[str, str]:
    """Return where the address is from, and the address: what is given, then the variables in the order of Ray's own
    commands."""
    if given:
        return "--address", given
    for name in (ADDRESS_VARIABLE, CLUSTER_VARIABLE):
        if (value := os.environ.get(name)) and value != "local":  # `local` asks Ray to start, and names no cluster
            return name, value
    return "the default", DEFAULT_ADDRESS


def _is_cluster(host: str, port: int, url: str) -> bool:
    """Return whether something is there that does not speak HTTP. Where nothing is, the caller's request says so."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return False  # it answers, for instance that it wants a token
    except (OSError, http.client.HTTPException):
        try:
            socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
        except OSError:
            return False
        return True
    return False


def _asked_of_ray(address: str) -> str:
    """Ask a cluster at Ray's own address (`auto`: the one of this machine) for its dashboard. Raises ClusterError."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return str(ray_address_to_api_server_url(address))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ClusterError(
            f"no Ray cluster at {address} tells where its dashboard is ({reason}): give the dashboard itself, as "
            "--address http://head:8265"
        ) from None
