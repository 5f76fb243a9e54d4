"""A novel of half a million tokens: trained on for 25 minutes, in the end as one sequence, and judged whole.

Run ``python -m benchmarks.novel NOVEL.txt``. It makes a vocabulary of 320 entries, holds the last tenth of it out,
and trains the model of the published novel checkpoint's sizes in three stages, each starting from the one before: many
steps on short sequences, some on longer ones, and the rest on sequences of up to 262,144 tokens. Each is a run of
``flash-reformer train clm``; what it was asked for stands in ``OUTPUT/STAGE/run.json``.

Prints the held-out bits per byte before and after, in windows of 4,096 tokens and with the whole held-out text as one
context, and one JSON line last; OUTPUT gets that line with the machine's facts, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import facts
from benchmarks.shapes import NOVEL
from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training import train
from flash_reformer.training.evaluation import evaluate_text, tail_of
from flash_reformer.training.progress import Progress
from flash_reformer.training.vocabulary import Vocabulary

HELD_OUT = 0.1
CONTEXTS = (4_096, "full")
#: Name, tokens per sequence, share of the minutes, highest learning rate, what is left of it at the end.
STAGES = (
    ("short", 2_048, 0.72, 4e-3, 0.1),
    ("long", 16_384, 0.12, 1e-3, 0.3),
    ("whole", 262_144, 0.16, 5e-4, 0.3),
)
MODEL = {
    **{name: value for name, value in NOVEL.items() if name not in ("vocab_size", "is_decoder")},
    "initializer_range": 0.05,
    "axial_norm_std": 0.02,
    "hidden_dropout_prob": 0.05,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}


def judge(model: Any, text: bytes, vocabulary: Vocabulary) -> dict[str, dict[str, float]]:
    """Return how well a model predicts the held-out text, by context."""
    found = {}
    for context in CONTEXTS:
        score = evaluate_text(model, text, vocabulary=vocabulary, context=context)
        found[str(context)] = {
            "bits_per_byte": round(score.bits_per_byte, 4),
            "perplexity": round(score.perplexity, 3),
            "context": score.context,
            "windows": score.windows,
        }
        print(f"   context {score.context:>7,}: {score.bits_per_byte:.4f} bits per byte", flush=True)
    return found


def show(now: Progress) -> None:
    """Print a line per evaluation."""
    if now.event == "evaluate":
        print(
            f"   step {now.step}: {now.held_out:.4f} on held-out blocks, {now.tokens_per_second:,.0f} tokens/s",
            flush=True,
        )


def main() -> None:
    """Train and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the novel, UTF-8")
    parser.add_argument("--minutes", type=float, default=25.0, help="of training, all stages together")
    parser.add_argument("--output", type=Path, default=Path("runs/novel"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.output / "vocabulary"
    train_vocabulary([options.text], folder, vocab_size=NOVEL["vocab_size"], overwrite=folder.exists())
    vocabulary = Vocabulary.load(str(folder))
    text = tail_of(options.text, HELD_OUT)
    torch.manual_seed(0)
    print("-- before", flush=True)
    before = judge(ReformerModelWithLMHead(ReformerConfig(**{**NOVEL, **MODEL})), text, vocabulary)
    stages = []
    for place, (name, length, share, rate, left) in enumerate(STAGES):
        print(f"-- {name}: sequences of up to {length:,} tokens, {share * options.minutes:.1f} minutes", flush=True)
        start: dict[str, Any] = {"init_from": str(options.output / STAGES[place - 1][0])} if place else {}
        settings = {
            "text": (str(options.text),),
            "tokenizer": str(folder),
            "output": str(options.output / name),
            "held_out": HELD_OUT,
            "seq_len": length,
            "max_minutes": share * options.minutes,
            "learning_rate": rate,
            "final_learning_rate": left,
            "warmup_steps": 1 if length > 100_000 else 20,
            "log_interval": 1 if length > 10_000 else 20,
            "eval_sequences": 4,
            "sample_tokens": 0,
            "cpu": True,
            **start,
        }
        result = train("clm", settings, None if place else MODEL, overwrite=True, report=show)
        kept = ("steps", "tokens", "seconds", "peak_memory_bytes")
        stages.append({"stage": name, "seq_len": length, **{key: result.metrics[key] for key in kept}})
        print(f"   {stages[-1]['steps']} steps, {stages[-1]['tokens']:,} tokens", flush=True)
    print("-- after", flush=True)
    after = judge(ReformerModelWithLMHead.from_pretrained(options.output / STAGES[-1][0]), text, vocabulary)
    falls = {context: round(after[context]["bits_per_byte"] / before[context]["bits_per_byte"], 3) for context in after}
    record = {"benchmark": "novel", "minutes": options.minutes, "bytes_held_out": len(text), "stages": stages}
    record = {**record, "before": before, "after": after, "after_as_part_of_before": falls}
    path = options.output / "novel.json"
    path.write_text(json.dumps({**facts(), "result": record}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
