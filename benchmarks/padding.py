"""How many positions of a harvest are padding: python -m benchmarks.padding

Real text (Python's standard library, tokenised by the demo's tokenizer) in contexts of 128, 256 and 1,024, and
documents as short as chat turns (20 to 100 tokens) in contexts of 1,024. Compared with one context a line, padded to
eighths of the context (computed, not run).
"""

import argparse
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from jobs.demo.corpus import standard_library_documents
from jobs.demo.demo import HERE
from pipeline.capture.batches import batches_of
from pipeline.capture.contexts import ContextRows

BATCH_TOKENS, ROWS_PER_UNIT = 4096, 65536


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    texts = sorted({document.text for document in standard_library_documents()})
    real = [len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    rng = np.random.default_rng(0)
    rng.shuffle(real)
    chat = rng.integers(20, 101, 20_000).tolist()
    print("| corpus | context | padding | shapes | in batches with a mask | one context a line |")
    print("|---|---|---|---|---|---|")
    corpora = [
        ("real text", real, 128),
        ("real text", real, 256),
        ("real text", real, 1024),
        ("short chats", chat, 1024),
    ]
    for name, documents, context in corpora:
        lengths = [length for document in documents for length in cut(document, context)]
        ours, eighths, masked = np.zeros(2), np.zeros(2), 0
        used = set()
        for unit in units(lengths):
            needed = sum(unit)
            batches = batches_of(
                [ContextRows(np.zeros(n, np.int32), np.arange(1, n), 0) for n in unit], BATCH_TOKENS, context
            )
            used |= {(batch.length, batch.lines) for batch in batches}
            ours += sum(batch.positions for batch in batches), needed
            eighths += padded_to_eighths(unit, context), needed
            masked += sum(batch.positions for batch in batches if batch.is_packed)
        shares = [1 - needed / run for run, needed in (ours, eighths)]
        print(
            f"| {name} | {context:,} | {100 * shares[0]:.1f} % | {len(used)} | {100 * masked / ours[0]:.0f} % | "
            f"{100 * shares[1]:.1f} % |"
        )


def cut(tokens: int, context: int) -> list[int]:
    """The lengths of a document's contexts, BOS included."""
    whole, rest = divmod(tokens, context - 1)
    return [context] * whole + ([rest + 1] if rest else [])


def units(lengths: list[int]) -> Iterator[list[int]]:
    unit: list[int] = []
    for length in lengths:
        unit.append(length)
        if sum(unit) - len(unit) >= ROWS_PER_UNIT:
            yield unit
            unit = []
    if unit:
        yield unit


def padded_to_eighths(lengths: list[int], context: int) -> int:
    """Positions run when lengths are rounded up to eighths of the context; batches in powers of two add none."""
    step = max(1, context // 8)
    return sum(min(-(-length // step) * step, context) for length in lengths)


if __name__ == "__main__":
    main()
