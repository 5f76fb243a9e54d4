"""Do the tokenizers agree, and how fast are they: ours, slow and fast, and transformers' own Reformer tokenizer.

    python -m benchmarks.tokenizers [--text FILE]

Agreement counts texts whose ids differ from SentencePiece's, for models of both kinds and every normalisation that the
tests train. ``stock`` is the saved ``tokenizer.json`` read by ``tokenizers`` alone. Throughput is MB of UTF-8 a second,
median of rounds in which the tokenizers take turns, on sentences of many scripts, or on FILE, cut into texts of about
1,000 characters. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from sentencepiece import SentencePieceProcessor
from sentencepiece import __version__ as sentencepiece_version
from transformers.models.reformer.tokenization_reformer import ReformerTokenizer as TheirTokenizer

from flash_reformer import ReformerByteTokenizer, ReformerTokenizer, ReformerTokenizerFast
from flash_reformer.tokenization import train_vocabulary
from tests.tokenization.corpus import MODELS, adversarial, ordinary, train_model

ORDINARY, ADVERSARIAL = 5000, 20000
ROUNDS = 5


def differing(theirs: list[list[int]], ours: list[list[int]]) -> int:
    """Return how many rows differ."""
    return sum(a != b for a, b in zip(theirs, ours, strict=True))


def agreement(folder: Path) -> dict[str, dict[str, int]]:
    """Return, per model, on how many texts the tokenizers part from SentencePiece."""
    sets = {"ordinary": ordinary(ORDINARY, seed=101), "adversarial": adversarial(ADVERSARIAL, seed=102)}
    counts: dict[str, dict[str, int]] = {}
    for name in MODELS:
        file = str(train_model(folder, name))
        judge = SentencePieceProcessor(model_file=file)
        slow, fast = ReformerTokenizer(file), ReformerTokenizerFast(file)
        stock = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
        stock.encode_special_tokens = True
        counts[name] = {}
        for kind, texts in sets.items():
            ids = judge.Encode(texts, out_type=int)
            counts[name][f"slow_{kind}"] = differing(ids, slow(texts, split_special_tokens=True).input_ids)
            counts[name][f"fast_{kind}"] = differing(ids, fast(texts, split_special_tokens=True).input_ids)
            unaided = [row.ids for row in stock.encode_batch(texts, add_special_tokens=False)]
            counts[name][f"stock_{kind}"] = differing(ids, unaided)
            if name.startswith("bpe"):
                counts[name][f"transformers_{kind}"] = differing(
                    ids, their_tokenizer(file, folder)(texts, split_special_tokens=True).input_ids
                )
    return counts


def their_tokenizer(model_file: str, folder: Path) -> TheirTokenizer:
    """Return transformers' own tokenizer of a model; it reads BPE models only."""
    own = folder / f"{Path(model_file).stem}-theirs"
    own.mkdir(exist_ok=True)
    shutil.copy(model_file, own / "spiece.model")
    return TheirTokenizer.from_pretrained(own)


def throughput(text: str | None, folder: Path) -> dict[str, dict[str, float]]:
    """Return MB/s of every tokenizer, per model kind."""
    whole = "\n".join(ordinary(6000, seed=103)) if text is None else text
    texts = [whole[start : start + 1000] for start in range(0, len(whole), 1000)]
    megabytes = sum(len(each.encode()) for each in texts) / 1e6
    speeds: dict[str, dict[str, float]] = {}
    for kind in ("bpe", "unigram"):
        train_vocabulary([whole], folder / kind, vocab_size=480 if text is None else 2000, model_type=kind)
        file = str(folder / kind / "spiece.model")
        fast = ReformerTokenizerFast(file)
        ways: dict[str, Callable[[list[str]], object]] = {
            "slow": ReformerTokenizer(file),
            "fast": fast,
            "fast, offsets": lambda rows, fast=fast: fast(rows, return_offsets_mapping=True),
            "bytes": ReformerByteTokenizer(),
        }
        if kind == "bpe":
            ways["transformers"] = their_tokenizer(file, folder)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, encode in ways.items():
                start = time.perf_counter()
                encode(texts)
                seconds[name].append(time.perf_counter() - start)
        speeds[kind] = {name: round(megabytes / statistics.median(times), 2) for name, times in seconds.items()}
    return speeds


def main() -> None:
    """Count, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text to time on")
    path: Path | None = parser.parse_args().text
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        counts = agreement(Path(scratch))
        speeds = throughput(None if path is None else path.read_text("utf-8"), Path(scratch))
    print(f"texts whose ids differ from SentencePiece's, of {ORDINARY} ordinary and {ADVERSARIAL} adversarial")
    print(f"{'model':<22}{'slow':>12}{'fast':>12}{'stock':>14}{'transformers':>14}")
    for name, row in counts.items():
        cells = []
        for who in ("slow", "fast", "stock", "transformers"):
            cells.append(f"{row[f'{who}_ordinary']} + {row[f'{who}_adversarial']}" if f"{who}_ordinary" in row else "-")
        print(f"{name:<22}{cells[0]:>12}{cells[1]:>12}{cells[2]:>14}{cells[3]:>14}")
    for kind, row in speeds.items():
        print(f"{kind}: " + ", ".join(f"{name} {speed} MB/s" for name, speed in row.items()))
    record = {
        "benchmark": "tokenizers",
        "texts": {"ordinary": ORDINARY, "adversarial": ADVERSARIAL},
        "differing_from_sentencepiece": counts,
        "megabytes_per_second": speeds,
        "timed_on": "generated sentences" if path is None else path.name,
        "tokenizers": tokenizers.__version__,
        "sentencepiece": sentencepiece_version,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
