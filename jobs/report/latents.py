"""The report's section on single latents: the contexts in which they fire most, token by token."""

import re
from collections.abc import Sequence

from jobs.report.html import NO_DICTIONARY, count, missing, number, percent, section, text
from jobs.report.run_view import RunView
from storage.format.records import Record

OPEN_LATENTS = 4
"""Latents of each kind of a run that are open when the page is; the others open with a click."""
INDENT = re.compile(" {3,}")
"""Deep indentation is shown as two spaces: contexts are short, and code would be mostly gaps."""


def latents_section(runs: Sequence[RunView]) -> str:
    intro = (
        "For each latent, the held-out contexts in which it fires most, around its strongest token (underlined). The "
        "stronger the colour of a token, the stronger the activation, relative to the strongest one shown for that "
        "latent; pointing at a token gives the value. ↵ stands for a new line. If the coloured tokens have something "
        "in common, that is what the latent stands for."
    )
    parts = []
    for run in runs:
        parts.append(f'<h3 id="latents-{text(run.name)}">{text(run.name)} <small>{text(run.sites)}</small></h3>')
        if run.evaluation is None:
            parts.append(missing(*run.next_step))
        else:
            parts.append(_run(run.evaluation))
    links = " ".join(f'<a href="#latents-{text(run.name)}">{text(run.name)}</a>' for run in runs)
    jump = f'<p class="jump">{links}</p>' if len(runs) > 1 else ""
    return section("latents", "Latents", intro, jump, *(parts or [NO_DICTIONARY]))


def _run(evaluation: Record) -> str:
    """The latents of one run, those of subpopulations apart from the others."""
    named = {g.get(f"{which}_latent") for g in evaluation["subpopulations"] for which in ("anchored", "best")}
    kinds = {
        "Latents of subpopulations": [x for x in evaluation["latents"] if x["latent"] in named],
        "Selective latents: strong on few rows": [x for x in evaluation["latents"] if x["latent"] not in named],
    }
    parts = []
    for title, latents in kinds.items():
        if latents:
            parts.append(f"<h4>{title} <small>{count(len(latents))}</small></h4>")
            parts += [_latent(latent, is_open=i < OPEN_LATENTS) for i, latent in enumerate(latents)]
    if not evaluation["latents"]:
        parts.append('<p class="muted">The evaluation chose no latents to show.</p>')
    return "".join(parts)


def _latent(latent: Record, is_open: bool) -> str:
    contexts = latent["contexts"]
    strongest = max((a for context in contexts for a in context["activations"]), default=0.0)
    about = f"fires on {percent(latent['density'])} of rows" + (f", at most {number(strongest)}" if strongest else "")
    body = "".join(_context(context, strongest) for context in contexts)
    if not contexts:
        body = '<p class="muted">It does not fire on the rows that were looked at.</p>'
    return (
        f'<details class="latent"{" open" if is_open else ""}><summary><b>{latent["latent"]}</b> '
        f'<span class="why">{text("; ".join(latent["why"]))}</span> <span class="muted">{about}</span></summary>'
        f"{body}</details>"
    )


def _context(context: Record, strongest: float) -> str:
    labels = "".join(f"<span>{text(value)}</span>" for value in context["labels"].values())
    title = f"{', '.join(f'{k} = {v}' for k, v in context['labels'].items())}; row {context['row']}"
    return (
        f'<div class="context"><div class="source" title="{text(title)}">{labels}<br>{text(context["source"])}</div>'
        f"<p>{shaded(context['tokens'], context['activations'], strongest)}</p></div>"
    )


def shaded(tokens: Sequence[str], activations: Sequence[float], strongest: float) -> str:
    """Markup of tokens, each on a background as strong as its activation against `strongest`; the peak underlined."""
    peak = max(range(len(tokens)), key=lambda i: activations[i], default=-1)
    parts = []
    for i, (token, activation) in enumerate(zip(tokens, activations, strict=True)):
        shown = INDENT.sub("  ", text(token)).replace("↵", "<i>↵</i><wbr>")
        if activation > 0 and strongest > 0:
            strength = max(0.06, min(activation / strongest, 1.0))
            kind = ' class="peak"' if i == peak else ""
            parts.append(f'<mark{kind} style="--a:{strength:.2f}" title="{number(activation)}">{shown}</mark>')
        else:
            parts.append(shown)
    return "".join(parts)
