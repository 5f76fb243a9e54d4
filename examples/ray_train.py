"""Train on a Ray cluster: `python examples/ray_train.py book.txt runs/book --workers 2`.

Needs `pip install "flash-reformer[ray]"`. Ray starts the workers, on one machine or many, and lets them meet; the
recipe finds that done and trains as it does under torchrun: each worker has its share of every batch, and the first one
writes. Text and output must be paths that every worker can reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

MODEL = {"attn_layers": ["local", "lsh"], "hidden_size": 64, "num_attention_heads": 2, "feed_forward_size": 128}


def train_on_a_worker(asked: dict[str, Any]) -> None:
    from flash_reformer.training import train_clm

    train_clm(asked["training"], asked["model"])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU per worker")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=1024)
    given = parser.parse_args(arguments)
    output = Path(given.output).resolve()
    training = {
        "text": (str(Path(given.text).resolve()),),
        "output": str(output),
        "max_steps": given.max_steps,
        "seq_len": given.seq_len,
        "cpu": not given.gpu,
    }
    trainer = TorchTrainer(
        train_on_a_worker,
        train_loop_config={"training": training, "model": MODEL},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(storage_path=f"{output}.ray"),
    )
    trainer.fit()
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    metrics = main()
    print(f"{metrics['steps']} steps, held-out bits per byte {metrics['held_out_bits_per_byte']:.3f}")
