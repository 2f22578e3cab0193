"""`granary report`: one HTML page about a store and its dictionaries, from what the store holds and nothing else.

The page is whole in itself: no script, no font, no image, nothing fetched when it is opened; its
Content-Security-Policy forbids it even if something in the store tried. A store that is still in the making gives a
page too, whose sections say what is missing and which command makes it. The sections are in the modules beside this,
their looks in report.css.
"""

import shlex
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jobs.report.anchoring import anchoring_section
from jobs.report.dictionaries import density_section, dictionaries_section
from jobs.report.harvest_section import harvested_section, subpopulations_section
from jobs.report.html import count, text
from jobs.report.latents import latents_section
from jobs.report.run_view import RunView, read_runs
from jobs.status import status_record
from storage.backends.place import Place, open_place
from storage.errors import StorageError
from storage.format.layout import StoreLayout
from storage.format.records import Record
from storage.store import Store

CONTENTS = {
    "harvest": "What was harvested",
    "subpopulations": "Subpopulations",
    "dictionaries": "Dictionaries",
    "density": "Latent density",
    "anchoring": "Anchoring",
    "latents": "Latents",
}


def write_report(store: Store, out: str | Path | None = None) -> Place:
    """Write the page to `out`, report.html inside the store if not given, at once or not at all; return its place.

    Raises StorageError when the place cannot be written.
    """
    place = StoreLayout(store.root).report if out is None else open_place(out)
    if place.backend.is_local:
        path = place.path
        if not path.parent.is_dir():
            raise StorageError(f"the folder {path.parent} does not exist: make it, or give --out another place")
        if path.is_dir():
            raise StorageError(f"{out} is a folder; --out names the page itself, such as {path / 'report.html'}")
    page = report_page(store, f"granary report {shlex.quote(store.url)} --out {shlex.quote(str(place))}")
    try:
        place.write(page.encode("utf-8"))
    except OSError as error:
        raise StorageError(f"the report cannot be written to {place}: {error.strerror or error}") from error
    return place


def report_page(store: Store, command: str) -> str:
    """The whole page; `command` is what the footer says made it."""
    status, runs = status_record(store), read_runs(store)
    body = [
        harvested_section(store, status),
        subpopulations_section(store, status, runs),
        dictionaries_section(store, status, runs),
        density_section(runs),
        anchoring_section(runs),
        latents_section(runs),
    ]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Granary: {text(store.root.name)}</title><style>{css}</style></head>\n<body>"
        f"{_header(store, status, runs)}<main>{''.join(body)}</main>{_footer(command)}</body></html>\n"
    )


def _header(store: Store, status: Record, runs: list[RunView]) -> str:
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in CONTENTS.items())
    figures = [
        (store.info.num_rows, "rows"),
        (len(store.sites), "sites"),
        (sum(status["anchors"].values()), "anchors"),
        (len(runs), "dictionaries"),
    ]
    shown = "".join(f"<li><b>{count(value)}</b> {name}</li>" for value, name in figures)
    return (
        f'<header><p class="kind">Granary report</p><h1>{text(store.root.name)}</h1>'
        f'<p class="muted">{text(store.url)}</p><ul class="figures">{shown}</ul>'
        f'<nav aria-label="Contents"><ol>{links}</ol></nav></header>'
    )


def _footer(command: str) -> str:
    try:
        release = version("granary-activations")
    except PackageNotFoundError:
        release = "(not installed)"
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"<footer><p>Made on {now} by Granary {text(release)} with <code>{text(command)}</code></p></footer>"
