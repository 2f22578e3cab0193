"""How many positions of a harvest are padding: python -m benchmarks.padding

Real text (Python's standard library, tokenised by the demo's tokenizer) in contexts of 128 and 1,024, and documents as
short as chat turns (20 to 100 tokens) in contexts of 1,024. Compared with padding to eighths of the context, as before,
and with what packing several contexts into a line of `context` positions would have wasted (first fit by falling
length, lines of a unit together; computed, not run).
"""

import argparse
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from jobs.demo.corpus import standard_library_documents
from jobs.demo.demo import HERE
from pipeline.batches import batches_of
from pipeline.rows import ContextRows

BATCH_TOKENS, ROWS_PER_UNIT = 4096, 65536


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    texts = sorted({document.text for document in standard_library_documents()})
    real = [len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    rng = np.random.default_rng(0)
    rng.shuffle(real)
    chat = rng.integers(20, 101, 20_000).tolist()
    print("| corpus | context | padding | shapes | eighths of the context | packed |\n|---|---|---|---|---|---|")
    for name, documents, context in (("real text", real, 128), ("real text", real, 1024), ("short chats", chat, 1024)):
        lengths = [length for document in documents for length in cut(document, context)]
        ours, eighths, packed = np.zeros(2), np.zeros(2), np.zeros(2)
        used = set()
        for unit in units(lengths):
            needed = sum(unit)
            batches = batches_of(
                [ContextRows(np.zeros(n, np.int32), np.arange(1, n), 0) for n in unit], BATCH_TOKENS, context
            )
            used |= {(batch.length, batch.lines) for batch in batches}
            ours += sum(batch.positions for batch in batches), needed
            eighths += padded_to_eighths(unit, context), needed
            packed += context * lines_packed(unit, context), needed
        shares = [1 - needed / run for run, needed in (ours, eighths, packed)]
        print(
            f"| {name} | {context:,} | {100 * shares[0]:.1f} % | {len(used)} | "
            + " | ".join(f"{100 * s:.1f} %" for s in shares[1:])
            + " |"
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


def lines_packed(lengths: list[int], context: int) -> int:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        line = next((i for i, free in enumerate(room) if free >= length), None)
        if line is None:
            room.append(context - length)
        else:
            room[line] -= length
    return len(room)


if __name__ == "__main__":
    main()
