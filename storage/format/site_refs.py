"""How a site of a store is named."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteRef:
    """A site and, where it is named, its model: `resid_post.8`, or `<model>/resid_post.8` where a store has several.

    `site` is as it is stored, and may say its type: `resid_post.8@int8`.
    """

    site: str
    model: str | None = None
    """The model's name under activations/; None where the store, or the spec, has one model only."""

    @classmethod
    def parse(cls, text: str) -> "SiteRef":
        model, _, site = text.rpartition("/")
        return cls(site, model or None)

    def __str__(self) -> str:
        return self.site if self.model is None else f"{self.model}/{self.site}"
