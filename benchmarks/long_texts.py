"""Time and memory of encoding one long text: whole, and in windows: python -m benchmarks.long_texts

Every kind of tokenizer (trained on Python's standard library) times every kind of text, in a process of its own, which
says its seconds, its peak memory above what it had before, and a checksum of the ids: those of
`pipeline.tokens.long_texts` must be those of the tokenizer by itself (but for ties of Unigram's, which the rounding of
a long sum decides).
"""

import argparse
import base64
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jobs.demo.corpus import standard_library_documents
from pipeline.tokens import long_texts
from workers.machine import machine

TRAINED_ON_CHARS = 400_000
VOCABULARY = 4000
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
KINDS = ("bytes", "gpt4", "llama2", "metaspace", "unigram", "unigram_whole", "wordpiece", "bare")
TEXTS = ("words", "letter", "letters", "digits", "cjk", "base64", "spaces")
TIMEOUT_S = 300


def make_tokenizer(kind: str, vocabulary: int = VOCABULARY, chars: int = TRAINED_ON_CHARS) -> Tokenizer:
    """A tokenizer as a family of models has it: `bytes` GPT-2's, `gpt4` Llama 3's and Qwen's, `llama2` without any
    pre-tokenizer, `metaspace` and `unigram` SentencePiece's with one, `unigram_whole` without, `wordpiece` BERT's,
    `bare` BPE of characters alone."""
    specials = ["<unk>", "<s>", "</s>"]
    bytes_as_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    replace = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials + (bytes_as_tokens if kind in ("llama2", "metaspace") else []),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind in ("bytes", "gpt4") else [],
        max_token_length=16,
        show_progress=False,
    )
    if kind in ("bytes", "gpt4"):
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        tokenizer.pre_tokenizer = level if kind == "bytes" else pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
    elif kind in ("llama2", "metaspace", "bare"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind != "bare"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind in ("unigram", "unigram_whole"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_training_texts(chars), trainer)
    if kind == "llama2":
        tokenizer.normalizer, tokenizer.pre_tokenizer = replace, None
    elif kind == "bare":
        tokenizer.pre_tokenizer = None
    elif kind == "unigram_whole":
        tokenizer.normalizer, tokenizer.pre_tokenizer = replace, None
    return tokenizer


def _training_texts(chars: int) -> Iterator[str]:
    """Text of the standard library, with runs and other scripts, so that there are tokens of them too."""
    rng = random.Random(0)
    yield from (make_text(kind, chars // 20, rng.randrange(2**30)) for kind in TEXTS if kind != "words")
    for document in standard_library_documents():
        if chars <= 0:
            return
        yield document.text
        chars -= len(document.text)


def make_text(kind: str, chars: int, seed: int = 1) -> str:
    rng = random.Random(seed)
    if kind == "words":
        documents = (document.text for document in standard_library_documents())
        found = "\n\n".join(islice(documents, 1 + chars // 200))
        return (found * (1 + chars // max(1, len(found))))[:chars]
    if kind == "base64":
        return base64.b64encode(rng.randbytes(chars)).decode()[:chars]
    alphabet = {
        "letter": "a",
        "letters": "abcdefghijklmnopqrstuvwxyz",
        "digits": "0123456789",
        "cjk": "".join(map(chr, range(0x4E00, 0x4E00 + 800))),
        "spaces": " ",
    }[kind]
    return "".join(rng.choices(alphabet, k=chars))


WAYS: dict[str, Callable[[Tokenizer, str], list[int]]] = {
    "whole": lambda tokenizer, text: list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids),
    "windows": lambda tokenizer, text: long_texts.encode(tokenizer, [text])[0],
}


def measure(file: str, kind: str, chars: int, way: str) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(file)
    text = make_text(kind, chars)
    tokenizer.encode_batch_fast([text[:1000]], add_special_tokens=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    ids = WAYS[way](tokenizer, text)
    seconds = time.monotonic() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    checksum = zlib.crc32(np.array(ids, dtype=np.int32).tobytes())
    return {"seconds": round(seconds, 2), "peak_mib": round(peak), "tokens": len(ids), "checksum": checksum}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[1, 4], help="characters of the text, in millions"
    )
    parser.add_argument("--tokenizer", choices=KINDS, action="append", help="again for more (default: all)")
    parser.add_argument("--text", choices=TEXTS, action="append", help="again for more (default: all)")
    parser.add_argument("--way", choices=WAYS, action="append", help="again for both (default)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        file, kind, chars, way = arguments.measure
        print(json.dumps(measure(file, kind, int(chars), way)))
        return
    print(json.dumps({"machine": machine()}))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for kind in arguments.tokenizer or KINDS:
            file = Path(folder) / f"{kind}.json"
            make_tokenizer(kind).save(str(file))
            for text in arguments.text or TEXTS:
                for megabytes in arguments.megabytes:
                    size = str(int(megabytes * 1e6))
                    found = {way: _run([str(file), text, size, way]) for way in arguments.way or WAYS}
                    print(json.dumps({"tokenizer": kind, "text": text, "megabytes": megabytes, **found}), flush=True)
                    checksums = {result["checksum"] for result in found.values() if "checksum" in result}
                    assert len(checksums) <= 1 or kind.startswith("unigram"), "the ways disagree"


def _run(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.long_texts", "--measure", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"seconds": f"more than {TIMEOUT_S}"}
    except subprocess.CalledProcessError as error:
        return {"seconds": "ended", "status": error.returncode, "said": error.stderr[-200:]}
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
