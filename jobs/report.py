from pathlib import Path

from storage.store import Store


def write_report(store: Store, out: Path) -> None:
    out.write_text("todo")
