"""Runs small enough for tests, and ways to break one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from flash_reformer.models.modeling_language import ReformerModelWithLMHead

TINY: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "axial_norm_std": 0.02,
}
QUICK: dict[str, Any] = {
    "seq_len": 64,
    "max_steps": 6,
    "eval_sequences": 2,
    "sample_tokens": 0,
    "learning_rate": 1e-2,
    "cpu": True,
}


def write_text(folder: Path, lines: int = 40) -> str:
    path = folder / "text.txt"
    path.write_text("".join(f"line {index} of a text that repeats itself\n" for index in range(lines)))
    return str(path)


class Interrupt(TrainerCallback):
    """Ends a run before a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ReformerModelWithLMHead.from_pretrained(folder).state_dict()
