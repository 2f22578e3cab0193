"""Sites: the places in a decoder whose activations can be taken.

With x the input of decoder layer L: resid_pre = x, resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out;
mlp_in is what the MLP (or the sparse block of a mixture of experts) receives, after its norm where it has one. What is
added is taken after everything that a family does to it (norms in Gemma 2 and 3 and OLMo 2, a factor in Granite).

A site may be stored in more than one type: `resid_post.8@int8` is resid_post.8 stored as int8, whatever the type of the
harvest's other sites is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from pipeline.errors import InputError

KINDS = ("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out", "attn_out")
STORED_TYPES = ("bfloat16", "float16", "float32", "int8")
"""What activations may be stored as; see pipeline.capture.rounding."""


@dataclass(frozen=True, order=True)
class Site:
    """One place, written `kind.layer`, e.g. resid_post.8, or `kind.layer@type`; layers count from 0."""

    layer: int
    kind: str
    stored: str = ""
    """The type it is stored in, where the name says so."""

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + (f"@{self.stored}" if self.stored else "")


def parse_site(text: str) -> Site:
    """Parse `kind.layer` or `kind.layer@type`. Raises InputError."""
    place, at, stored = text.partition("@")
    kind, _, layer = place.partition(".")
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}.{layer or 0}?" if near else f"sites are {', '.join(KINDS)}, then .layer"
        raise InputError(f"unknown site {text!r}: {hint}")
    if not layer.isdecimal():
        raise InputError(f"site {text!r} needs a layer number: for instance {kind}.0")
    if at and stored not in STORED_TYPES:
        raise InputError(f"site {text!r}: what follows @ is the type to store it as, one of {', '.join(STORED_TYPES)}")
    return Site(int(layer), kind, stored)


def layers_up_to(sites: Iterable[Site]) -> int:
    """How many decoder layers have to run for these sites."""
    return 1 + max(site.layer for site in sites)


def expand_sites(texts: Iterable[str]) -> list[str]:
    """Expand lists and ranges: resid_post.{4,8,12}, mlp_in.4-12 (both ends included), each perhaps with @type. Order
    kept, repeats dropped."""
    expanded: dict[str, None] = {}
    for text in texts:
        place, at, stored = text.partition("@")
        kind, _, layers = place.partition(".")
        parts = layers[1:-1].split(",") if layers.startswith("{") and layers.endswith("}") else [layers]
        for part in parts:
            span = re.fullmatch(r"(\d+)-(\d+)", part.strip())
            if span is None:
                expanded[str(parse_site(f"{kind}.{part.strip()}{at}{stored}"))] = None
                continue
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise InputError(f"site {text!r}: a range of layers goes upward, not from {first} to {last}")
            expanded |= {str(parse_site(f"{kind}.{layer}{at}{stored}")): None for layer in range(first, last + 1)}
    return list(expanded)
