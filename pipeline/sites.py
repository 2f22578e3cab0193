"""Sites: the places in a decoder whose activations can be taken.

With x the input of decoder layer L: resid_pre = x, resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out;
mlp_in is what the MLP receives (after its norm).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from pipeline.errors import InputError

KINDS = ("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out", "attn_out")


@dataclass(frozen=True, order=True)
class Site:
    """One place, written `kind.layer`, e.g. resid_post.8; layers count from 0."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def parse_site(text: str) -> Site:
    """Parse `kind.layer`. Raises InputError."""
    kind, _, layer = text.partition(".")
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}.{layer or 0}?" if near else f"sites are {', '.join(KINDS)}, then .layer"
        raise InputError(f"unknown site {text!r}: {hint}")
    if not layer.isdecimal():
        raise InputError(f"site {text!r} needs a layer number: for instance {kind}.0")
    return Site(int(layer), kind)


def expand_sites(texts: Iterable[str]) -> list[str]:
    """Expand lists and ranges: resid_post.{4,8,12}, mlp_in.4-12 (both ends included). Order kept, repeats dropped."""
    expanded: dict[str, None] = {}
    for text in texts:
        kind, _, layers = text.partition(".")
        parts = layers[1:-1].split(",") if layers.startswith("{") and layers.endswith("}") else [layers]
        for part in parts:
            span = re.fullmatch(r"(\d+)-(\d+)", part.strip())
            if span is None:
                expanded[str(parse_site(f"{kind}.{part.strip()}"))] = None
                continue
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise InputError(f"site {text!r}: a range of layers goes upward, not from {first} to {last}")
            expanded |= {str(parse_site(f"{kind}.{layer}")): None for layer in range(first, last + 1)}
    return list(expanded)
