"""What a person may set of an anchor set: an entry of the spec's section `anchors`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from workers.settings.section import Count, Name, Names, Settings

LEAST_ROWS = 1000
"""Rows of a subpopulation at least, if the spec does not say: the mean of fewer would be noise."""
FILE_ENDINGS = (".npy", ".safetensors")


class TopSettings(Settings):
    """Rows, or whole contexts, on which directions at one site are strongest."""

    directions: str
    """A file of directions, .npy [k, d_model] or .safetensors with a tensor named as the site; or an anchor set."""
    site: str
    """The site whose rows are multiplied with the directions. The means are taken at all sites."""
    rows: Count | None = None
    """Rows of each direction: those with the largest inner product; 1000, if contexts are not given either."""
    contexts: Count | None = None
    """Instead of rows: contexts of each direction, those with the highest peak, with all of their rows."""

    @model_validator(mode="after")
    def _one_count(self) -> "TopSettings":
        if self.rows is not None and self.contexts is not None:
            raise ValueError("rows and contexts are both given; choose one")
        return self

    @property
    def count(self) -> int:
        """Rows, or contexts, of each direction."""
        return self.contexts or self.rows or LEAST_ROWS


class AnchorSettings(Settings):
    """One set of anchors, from one source."""

    name: Name
    by: Names = ()
    """Label columns; each value with enough rows becomes an anchor."""
    where: dict[str, str] = Field(default={})
    """The name of a subpopulation -> an SQL condition over the columns of rows and documents."""
    top: TopSettings | None = None
    """The rows on which given directions are strongest; an anchor for each direction."""
    vectors: str | None = None
    """A file of the anchors themselves: .npy [k, d_model], the same at all sites; or .safetensors, a tensor a site."""
    names: Names = ()
    """With vectors: what each is called; numbers, if not given."""
    min_rows: Count | None = None
    """With by and where: training rows of a subpopulation at least; 1000, if not given. Values of a label with fewer
    give no anchor; a condition with fewer is refused."""

    @property
    def least_rows(self) -> int:
        return self.min_rows or LEAST_ROWS

    @property
    def source(self) -> str:
        """The key that says what the anchors are made of."""
        return next(key for key in ("by", "where", "top", "vectors") if getattr(self, key))

    @property
    def files(self) -> tuple[str, ...]:
        """The files of vectors that it names."""
        named = (self.vectors, self.top.directions if self.top else None)
        return tuple(file for file in named if file is not None and file.endswith(FILE_ENDINGS))

    @field_validator("where")
    @classmethod
    def _named(cls, where: dict[str, str]) -> dict[str, str]:
        if "" in where:
            raise ValueError(f"the subpopulation of {where['']!r} has no name")
        return where

    @model_validator(mode="after")
    def _one_source(self) -> "AnchorSettings":
        given = [key for key in ("by", "where", "top", "vectors") if getattr(self, key)]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"anchors are made of one of by, where, top and vectors; {found}")
        if self.min_rows is not None and given[0] in ("top", "vectors"):
            raise ValueError(f"min_rows is about by and where; with {given[0]} there is nothing to count")
        if self.names and given != ["vectors"]:
            raise ValueError("names are those of vectors")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must differ")
        if self.vectors is not None and not self.vectors.endswith(FILE_ENDINGS):
            raise ValueError(f"vectors is a file ending in {' or '.join(FILE_ENDINGS)}, not {self.vectors!r}")
        return self


def _as_sets(value: Any) -> Any:
    return [value] if isinstance(value, dict | AnchorSettings) else value


AnchorSets = Annotated[tuple[AnchorSettings, ...], BeforeValidator(_as_sets)]
"""One set, or a list of them."""
