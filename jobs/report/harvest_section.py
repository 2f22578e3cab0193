"""The report's sections on the store itself: what was harvested, and how its subpopulations lie to each other."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jobs.progress import no_held_out_rows, size
from jobs.report.html import count, figure, listed, missing, percent, plural, section, table, text
from jobs.report.plots import heat_legend, heat_map
from jobs.report.run_view import RunView
from jobs.token_rows import chat_words, token_words
from storage.format.records import Record
from storage.read.held_out import values_without_held_out_rows
from storage.results.anchors import AnchorSet, anchor_names, read_anchors
from storage.store import Store
from storage.table.root import CorpusInfo

MAP_ENTRIES = 48
"""Entries a heat map has at most: the page's size grows with their square."""
MAPS = 6
"""Sites an anchor set is drawn for at most."""
ROWS_SHOWN = 40
"""Lines of a table that are shown without being asked for."""


def harvested_section(store: Store, status: Record) -> str:
    """`status` is the record of `granary status`."""
    info = store.info
    facts = [
        ("Rows", f"{count(info.num_rows)} token positions, each the same row of every site"),
        (
            "From",
            f"{plural(info.num_documents, 'document')} in {plural(info.num_contexts, 'context')} of at most "
            f"{plural(info.context, 'token')}; {_dropped(info.skip_first)}",
        ),
        ("Tokens", text(token_words(status["token_rows"]))),
        *([("Chats", text(chats))] if (chats := chat_words(status["token_rows"])) else []),
        (
            "Units",
            f"{plural(info.num_units, 'unit')} of {count(info.rows_per_unit)} rows, each computed and committed "
            "as a whole",
        ),
        ("Held out", _held_out(store, status["held_out_rows"])),
        ("Labels", _labels(info)),
        ("Left out", _left_out(status["left_out"])),
    ]
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return section(
        "harvest",
        "What was harvested",
        "The model read the documents, and its internal activations were kept at the sites named here. A <em>row</em> "
        "is one token of one document; every site has the same rows. The held-out rows, at the end, are kept from "
        "training and used to measure.",
        f'<dl class="facts">{lines}</dl>',
        _harvests(store, status["harvests"]),
        _versions(store),
    )


def _labels(info: CorpusInfo) -> str:
    of_rows = [f"{label} (of rows, {plural(len(values), 'value')})" for label, values in info.values_of_rows.items()]
    return text(listed([*info.labels, *of_rows])) if info.all_labels else "none"


def _dropped(skip_first: int) -> str:
    if not skip_first:
        return "no leading token is left out"
    which = "token is" if skip_first == 1 else f"{skip_first} tokens are"
    return f"the first {which} run but not kept"


def _held_out(store: Store, rows: int) -> str:
    if not rows:
        return (
            "none, so dictionaries of this store cannot be evaluated; <code>corpus.holdout</code> of the spec is the "
            "share to hold out, and is fixed when a store is made"
        )
    lacking = values_without_held_out_rows(store)
    note = f"; {text(no_held_out_rows(lacking))}, of which nothing can be measured" if lacking else ""
    return f"{count(rows)} rows ({percent(rows / store.num_rows)}){note}"


def _left_out(reasons: Record) -> str:
    if not reasons:
        return "no document"
    parts = [
        f"{plural(entry['count'], 'document')}: {text(reason)}{text(': ' + entry['said']) if 'said' in entry else ''} "
        f'<span class="muted">({"first " if entry["count"] > len(entry["first"]) else ""}'
        f"{text(', '.join(entry['first']))})</span>"
        for reason, entry in reasons.items()
    ]
    return "<br>".join(parts)


def _harvests(store: Store, harvests: Sequence[Record]) -> str:
    if not harvests:
        return missing(
            "No activations are stored yet: the rows are planned, and no site is harvested.", "granary harvest SPEC"
        )
    identities = {h.digest: h.identity for h in store.harvests}
    rows = []
    for h in harvests:
        identity = identities[h["harvest"]]
        done, of = h["units_committed"], h["units"]
        bar = "" if done == of else f'<br><progress value="{done}" max="{of}">{percent(done / of)}</progress>'
        how = identity.computed
        device = f"{how.get('device', '')}, {how.get('attention', '')} attention".strip(", ")
        rows.append(
            [
                text(h["model"]),
                text(", ".join(h["sites"])),
                f"{text(h['dtype'])} &times; {count(h['d_model'])}",
                f'{text(identity.dtype or "")}<br><span class="muted">{text(device)}</span>',
                f"{count(done)} of {count(of)}{bar}",
                size(h["bytes"]).replace(" ", "\u202f"),
            ]
        )
    head = ["Model", "Sites", "Stored as", "Computed in", "Units committed", "Bytes of all units"]
    body = table(head, rows, label="Harvests", words=4)
    behind = [h for h in harvests if h["units_committed"] < h["units"]]
    for h in behind:
        body += missing(
            f"{', '.join(h['sites'])} of {h['model']}: {h['units'] - h['units_committed']} of {h['units']} units are "
            "not harvested yet. Their rows cannot be read; the others can.",
            "granary harvest SPEC",
        )
    return body


def _versions(store: Store) -> str:
    lines = [("the rows", store.info.made_with), *((f"{', '.join(h.sites)}", h.made_with) for h in store.harvests)]
    shown = [(what, ", ".join(f"{k} {v}" for k, v in made.items())) for what, made in lines if made]
    if not shown:
        return ""
    items = "".join(f"<li>{text(what)}: {text(versions)}</li>" for what, versions in shown)
    return f"<details><summary>Versions of the libraries</summary><ul>{items}</ul></details>"


def subpopulations_section(store: Store, status: Record, runs: Sequence[RunView]) -> str:
    intro = (
        "A subpopulation is the rows whose document carries one value of a label, or which lie in a span that does. "
        "Its <em>anchor</em> is the mean of its training rows minus the mean of all training rows: the direction in "
        "which its rows differ. Subpopulations may also be those of conditions (where) or the rows strongest in a "
        "direction (top), and vectors may be given. The map shows "
        "the cosine between every two anchors: 1 (full colour) for the same direction, 0 (no colour) for unrelated, "
        "&minus;1 (the other colour) for opposite directions. The diagonal is 1 by definition."
    )
    title, key = "Subpopulations", "subpopulations"
    names = anchor_names(store)
    if names:
        return section(key, title, intro, *(_anchor_set(store, read_anchors(store, n), runs) for n in names))
    if not store.info.all_labels:
        sentence = (
            "This store has no labels, so it has no subpopulations. Name the label columns of the corpus in "
            "corpus.labels of the spec and make another store."
        )
        return section(key, title, intro, missing(sentence, "granary harvest SPEC"))
    harvests = status["harvests"]
    if not harvests or any(h["units_committed"] < h["units"] for h in harvests):
        sentence = "There are no anchors yet: they are means over a finished harvest."
        return section(key, title, intro, missing(sentence, "granary harvest SPEC"))
    line = f"anchors: {{name: subpopulations, by: [{', '.join(store.info.all_labels)}]}}"
    return section(
        key,
        title,
        intro,
        missing(
            "There are no anchors yet. With this line in the spec, they are made from the harvest in seconds:",
            "granary anchors SPEC",
            line,
        ),
    )


def _anchor_set(store: Store, anchors: AnchorSet, runs: Sequence[RunView]) -> str:
    total = store.info.held_out_start
    rows = [
        [text(value), text(label), count(n), percent(n / total)]
        for label, value, n in zip(anchors.labels, anchors.values, anchors.counts, strict=True)
    ]
    listing = table(["Value", "Label", "Training rows", "Share"], rows, label=f"Anchors {anchors.name}", words=2)
    if len(rows) > ROWS_SHOWN:
        listing = f"<details><summary>All {count(len(rows))} values</summary>{listing}</details>"
    sites = _in_order(anchors, runs)
    maps = _map(anchors, sites[0])
    more = "".join(
        f"<details><summary>The same at {text(site)}</summary>{_map(anchors, site)}</details>" for site in sites[1:MAPS]
    )
    if sites[MAPS:]:
        more += f'<p class="muted">Not drawn: {text(", ".join(sites[MAPS:]))}.</p>'
    head = f"<h3>{text(anchors.name)} <small>{plural(len(rows), 'anchor')}</small></h3>"
    return f'{head}<div class="beside"><div>{listing}</div><div>{maps}{more}</div></div>'


def _in_order(anchors: AnchorSet, runs: Sequence[RunView]) -> list[str]:
    """The sites of the anchors, those of dictionaries first."""
    used = [site for run in runs for site in (*run.config["input"], *run.config["output"])]
    return list(dict.fromkeys([*(site for site in used if site in anchors.vectors), *anchors.vectors]))


def _map(anchors: AnchorSet, site: str) -> str:
    chosen = sorted(np.argsort(anchors.counts, kind="stable")[::-1][:MAP_ENTRIES].tolist())
    note = "" if len(chosen) == len(anchors.values) else f", for the {MAP_ENTRIES} with the most rows"
    drawing = heat_map(
        [anchors.labels[i] for i in chosen],
        [anchors.values[i] for i in chosen],
        cosines(anchors.vectors[site][chosen]).tolist(),
        label=f"Cosines of the anchors at {site}",
    )
    caption = f"Cosines of the anchors at <b>{text(site)}</b>{note}{heat_legend()}"
    return figure(f'<div class="wide" role="region" tabindex="0" aria-label="Heat map">{drawing}</div>', caption)


def cosines(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosines between rows [k, d] -> [k, k]; nan where a row is zero, as it has no direction."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = wide / norms[:, None]
    found: npt.NDArray[np.float64] = unit @ unit.T
    return found
