"""Small pieces of HTML that the sections of the report share: numbers, tables, and boxes that say what is missing.

Invariant: whatever comes from a store (tokens, labels, names, paths) passes `text` before it is markup, so no content
can close a tag or run anything. Functions whose result is markup say so; everything else takes and gives plain text.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

THIN = "\u202f"
"""A narrow space that does not break: between the digits of a large number, and before a unit."""
MINUS = "\u2212"
NONE = "\u2013"
MARKS = {"\n": "\u21b5", "\t": "\u21e5"}
"""What a token's white space is shown as; the rest of it stays a space."""
DIRECTION_CONTROLS = frozenset(map(chr, (*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def text(value: object) -> str:
    """Markup of any value as text. Characters that HTML forbids or that turn a line around are shown by name."""
    return escape("".join(_visible(c) for c in str(value)))


def _visible(character: str) -> str:
    point = ord(character)
    if point < 0x20 and character not in MARKS:
        return chr(0x2400 + point)  # the control pictures
    if 0x7F <= point < 0xA0 or 0xD800 <= point < 0xE000:
        return "\ufffd"
    return f"[U+{point:04X}]" if character in DIRECTION_CONTROLS else MARKS.get(character, character)


def count(value: int) -> str:
    """'800 000', with thin spaces."""
    return f"{value:,}".replace(",", THIN)


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 999.5:
        shown = count(round(size)) if size < 1e9 else _power(size)
    else:
        shown = _power(size) if size < 1e-4 else f"{size:#.3g}".rstrip(".")
    return (MINUS if value < 0 else "") + shown


def _power(size: float) -> str:
    mantissa, exponent = f"{size:.2e}".split("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}{THIN}\u00d7{THIN}10{superscript}"


def decimals(value: float | None) -> str:
    """Three places after the point, for values that are compared within a column."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    return NONE if share is None or not math.isfinite(share) else f"{number(100 * share)}{THIN}%"


def plural(value: int, one: str, many: str | None = None) -> str:
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def listed(names: Iterable[str]) -> str:
    """'a, b and c'."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---- markup


def section(key: str, title: str, intro: str, *body: str) -> str:
    """A section under a heading; `intro` (markup) tells a newcomer what is shown and how to read it."""
    return f'<section id="{key}"><h2>{text(title)}</h2><p class="intro">{intro}</p>{"".join(body)}</section>'


def missing(sentence: str, command: str = "", spec: str = "") -> str:
    """A box that says what is not there yet, and the command, or the lines of a spec, that make it."""
    parts = [f"<p>{text(sentence)}</p>"]
    if spec:
        parts.append(f"<pre>{text_lines(spec)}</pre>")
    if command:
        parts.append(f"<p>Next: <code>{text(command)}</code></p>")
    return f'<div class="missing">{"".join(parts)}</div>'


NO_DICTIONARY = '<p class="muted">Nothing to show without a dictionary; see <a href="#dictionaries">above</a>.</p>'


def text_lines(value: str) -> str:
    """Markup of lines that stay lines, for <pre>."""
    return "\n".join(text(line) for line in value.split("\n"))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, words: int = 1, groups: str = "", more: str = ""
) -> str:
    """A table that scrolls sideways on a narrow screen. Cells are markup, the first of a row heads it.

    The first `words` columns hold words and are set left, the others numbers and are set right. `groups` is an
    optional first line of the head (markup), `more` a class.
    """

    def cell(tag: str, column: int, content: str, attributes: str = "") -> str:
        kind = "" if column < words else ' class="num"'
        return f"<{tag}{attributes}{kind}>{content}</{tag}>"

    top = "".join(cell("th", i, name, ' scope="col"') for i, name in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(
            cell("th", 0, content, ' scope="row"') if i == 0 else cell("td", i, content)
            for i, content in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(label)}"><table class="{more}"><thead>{groups}'
        f"<tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def figure(drawing: str, caption: str, more: str = "") -> str:
    """A drawing (markup) with its caption (markup) above it."""
    return f'<figure class="{more}"><figcaption>{caption}</figcaption>{drawing}</figure>'
