"""Files that hold something else than their names say: what a download that went wrong leaves in a file's place.

A clone without git-lfs, a saved web page, an interrupted copy: the libraries that read such files say that they are
damaged, or take them for what they are not. Looks at the first bytes of a file only.
"""

import re
from pathlib import Path

LEAD_BYTES = 1024
POINTERS = {
    "version https://git-lfs.github.com/spec/": ("a git-lfs pointer", "run `git lfs pull` in {folder}"),
    "version https://hawser.github.com/spec/": ("a git-lfs pointer", "run `git lfs pull` in {folder}"),
    "/annex/objects/": ("a git-annex pointer", "run `git annex get .` in {folder}"),
    "../.git/annex/objects/": ("a git-annex pointer", "run `git annex get .` in {folder}"),
}
"""How texts begin that version control keeps in place of large files -> what they are, and what fetches the file."""
PAGE = re.compile(r"(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|title|script)\b", re.IGNORECASE | re.DOTALL)
MARKUP = re.compile(r"<(\?xml|!doctype|error\b|message\b)", re.IGNORECASE)
ERROR = re.compile(r"""\{\s*"(error|errors|message|detail)"\s*:""")
WORDS = re.compile(
    r"(entry|repository|revision|file|page|404:?) not found|access (to|denied)|(un|not )authori[sz]ed|forbidden"
    r"|invalid (username|credentials)|too many requests|internal server error|(bad|gateway) (gateway|time-?out)"
    r"|service unavailable",
    re.IGNORECASE,
)
"""How the texts begin that servers send where they do not send the file."""
AGAIN = "download it again"


def stand_in(file: Path) -> str | None:
    """What a file holds instead of its content and what to do, as the end of a sentence that begins with its name; None
    where it may be what its name says."""
    try:
        with file.open("rb") as handle:
            lead = handle.read(LEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); make it readable, or {AGAIN}"
    if not lead:
        return f"is empty; {AGAIN}"
    if not lead.strip(b"\0"):
        return f"is filled with zeros, as an interrupted copy leaves it; {AGAIN}"
    text = lead.decode("utf-8-sig", errors="replace").lstrip()
    if (found := page_or_pointer(text, str(file.parent))) is not None:
        return found
    if MARKUP.match(text) or ERROR.match(text) or WORDS.match(text):
        return f"is what a server said in place of the file ({' '.join(text.split())[:80]}); {AGAIN}"
    return None


def page_or_pointer(text: str, folder: str) -> str | None:
    """The same of a text that was read of a file in `folder`, where that may be any other text."""
    lead = text[:LEAD_BYTES].lstrip("\ufeff \t\r\n")
    for beginning, (what, advice) in POINTERS.items():
        if lead.startswith(beginning):
            return f"is {what}, which stands for the file and is not the file; {advice.format(folder=folder)}"
    if PAGE.match(lead):
        return f"is an HTML page that was saved in its place; {AGAIN}, by the address of the file itself"
    return None
