"""Make the tiny Llama that ships with Granary: `python -m jobs.demo.train_model OUTPUT_FOLDER`.

A BPE tokenizer and a LlamaForCausalLM of 1.3 M parameters, both trained from scratch on the text of Python's
standard library (`jobs.demo.corpus`). Documents are held out by hash, and the loss on them is written beside the
weights in training.json. Takes about 25 minutes on two CPU cores; seeded.
"""

import json
import math
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.demo.corpus import write_corpus

VOCABULARY = 4096
CONTEXT = 256
BATCH_CONTEXTS = 32
EPOCHS = 8
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
HELD_OUT_SHARE = 0.03
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def main(output: Path) -> None:
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.parquet"
        write_corpus(corpus)
        texts: list[str] = pq.read_table(corpus, columns=["text"]).column("text").to_pylist()
    train, held_out = [t for t in texts if not _is_held_out(t)], [t for t in texts if _is_held_out(t)]

    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(output)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    started = time.monotonic()
    train_contexts, held_out_contexts = contexts_of(tokenizer, train), contexts_of(tokenizer, held_out)
    print(f"{len(train)} documents, {int((train_contexts >= 0).sum())} tokens to train on", flush=True)
    steps, losses = train_model(model, train_contexts)
    loss = evaluate(model, held_out_contexts)
    model.to(torch.bfloat16).save_pretrained(output)  # bfloat16 keeps the download under 4 MB
    rounded_loss = evaluate(model.to(torch.float32), held_out_contexts)
    record = {
        "corpus": f"standard library of Python {platform.python_version()}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_documents": len(train),
        "held_out_documents": len(held_out),
        "train_tokens_per_epoch": int((train_contexts >= 0).sum()),
        "epochs": EPOCHS,
        "steps": steps,
        "held_out_loss_nats_per_token": loss,
        "held_out_loss_as_shipped_in_bfloat16": rounded_loss,
        "train_loss_last_100_steps": sum(losses[-100:]) / 100,
        "minutes": (time.monotonic() - started) / 60,
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (no text is out of its vocabulary) that puts BOS first, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def contexts_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return int64 [contexts, CONTEXT]: BOS, then tokens of one document; -100 behind the end."""
    contexts = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        for start in range(0, len(ids), CONTEXT - 1):
            window = [tokenizer.bos_token_id, *ids[start : start + CONTEXT - 1]]
            contexts.append(window + [-100] * (CONTEXT - len(window)))
    return torch.tensor(contexts)


def train_model(model: LlamaForCausalLM, contexts: Tensor) -> tuple[int, list[float]]:
    steps = EPOCHS * len(contexts) // BATCH_CONTEXTS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    order = torch.cat([torch.randperm(len(contexts)) for _ in range(EPOCHS)])
    losses: list[float] = []
    for step in range(steps):
        rate = PEAK_LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        loss = _loss(model, contexts[order[step * BATCH_CONTEXTS : (step + 1) * BATCH_CONTEXTS]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}/{steps} loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    return steps, losses


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, contexts: Tensor) -> float:
    """Return the mean cross-entropy in nats per predicted token."""
    total, count = 0.0, 0
    for batch in contexts.split(BATCH_CONTEXTS):
        predicted = int((batch[:, 1:] >= 0).sum())
        total += _loss(model, batch).item() * predicted
        count += predicted
    return total / count


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    loss = model(input_ids=batch.clamp(min=0), labels=batch, use_cache=False).loss
    assert isinstance(loss, Tensor)
    return loss


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) < HELD_OUT_SHARE * 2**32


if __name__ == "__main__":
    main(Path(sys.argv[1]))
