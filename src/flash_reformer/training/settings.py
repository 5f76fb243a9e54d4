"""What a training run is asked for: every setting once, with its default, its help and its limits."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")


def option(default: Any, help: str, panel: str, **more: Any) -> Any:
    """Declare a setting; command-line flags are made from what is said here."""
    return dataclasses.field(default=default, metadata={"help": help, "panel": panel, **more})


@dataclass(frozen=True)
class TrainingSettings:
    """Everything about a run but the model's own sizes. ``None`` means "not asked for" where it is the default."""

    output: str = option("", "Folder for checkpoints, the final model, the loss curve and the metrics.", "Run")
    text: tuple[str, ...] = option((), "Text file to train on; repeat it, or list several files.", "Text")
    dataset: str | None = option(None, "Dataset to train on: a name on the hub, a file, or a folder.", "Text")
    dataset_split: str = option("train", "Part of the dataset to read.", "Text")
    text_column: str = option("text", "Column of the dataset that holds the text.", "Text")
    standard_library: bool = option(False, "Train on the source of this Python's standard library.", "Text")
    held_out: float = option(0.05, "Fraction of the text set aside for evaluation.", "Text")
    seq_len: int = option(4096, "Tokens per sequence.", "Text")
    init_from: str | None = option(None, "Saved model folder to start from, in place of fresh weights.", "Run")
    seed: int = option(0, "Seed of the weights, the data order, the dropout and the hashing.", "Run")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.", "Run")
    precision: str = option("fp32", "Precision of the arithmetic: fp32, bf16 or fp16.", "Run")
    max_steps: int | None = option(None, "Stop after so many optimizer steps (reproducible).", "Run")
    max_minutes: float | None = option(
        None, "Stop after so many minutes of training; the schedule follows the clock, so runs differ.", "Run"
    )
    batch_size: int = option(1, "Sequences per step and device.", "Optimizer")
    gradient_accumulation: int = option(1, "Batches whose gradients are summed into one step.", "Optimizer")
    learning_rate: float = option(3e-3, "Highest learning rate of AdamW.", "Optimizer")
    final_learning_rate: float = option(0.1, "Fraction of it left at the end of the cosine decay.", "Optimizer")
    warmup_steps: int = option(20, "Steps over which the learning rate rises from 0.", "Optimizer")
    weight_decay: float = option(0.1, "Weight decay of AdamW.", "Optimizer")
    adam_beta2: float = option(0.98, "Second moment decay of AdamW.", "Optimizer")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "Optimizer")
    eval_interval: int | None = option(None, "Steps between evaluations; by default 6 per run.", "Reports")
    eval_sequences: int = option(8, "Held-out sequences per evaluation.", "Reports")
    save_interval: int | None = option(None, "Steps between checkpoints; by default with each evaluation.", "Reports")
    save_total_limit: int = option(2, "Checkpoints to keep.", "Reports")
    log_interval: int = option(5, "Steps between points of the loss curve.", "Reports")
    sample_tokens: int = option(300, "Bytes to generate at the end as a sample; 0 for none.", "Reports")

    def __post_init__(self) -> None:
        """Refuse what makes no sense, by the name of the setting."""
        at_least_one = (
            "batch_size gradient_accumulation eval_sequences save_total_limit log_interval max_steps "
            "eval_interval save_interval"
        )
        for name in at_least_one.split():
            self._require(name, lambda value: value >= 1, "at least 1")
        for name in ("warmup_steps", "sample_tokens", "seed"):
            self._require(name, lambda value: value >= 0, "at least 0")
        for name in ("learning_rate", "max_minutes", "max_grad_norm"):
            self._require(name, lambda value: value > 0 and math.isfinite(value), "a positive number")
        self._require("seq_len", lambda value: value >= 2, "at least 2")
        self._require("weight_decay", lambda value: value >= 0 and math.isfinite(value), "a number, at least 0")
        self._require("final_learning_rate", lambda value: 0 <= value <= 1, "between 0 and 1")
        self._require("adam_beta2", lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._require("held_out", lambda value: 0 < value < 1, "strictly between 0 and 1")
        self._require("precision", lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def _require(self, name: str, holds: Any, allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    def check_complete(self) -> None:
        """Refuse settings from which no run can start: no output, no text, no end, or two sources of text."""
        if not self.output:
            raise ValueError("output is missing: name a folder with --output")
        sources = {"--text": self.text, "--dataset": self.dataset, "--standard-library": self.standard_library}
        given = [flag for flag, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one source of text")
        if not given:
            raise ValueError(f"no text to train on: give one of {', '.join(sources)}, or --preset demo")
        plain = TrainingSettings(output=self.output)
        for name in ("text_column", "dataset_split"):
            if self.dataset is None and getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} {getattr(self, name)!r} is about --dataset, which is not given")
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("no end is set: give --max-steps or --max-minutes")


# Model sizes by the names of their flags: flag -> (field of ReformerConfig, kind of value, help).
MODEL_OPTIONS: dict[str, tuple[str, str, str]] = {
    "layers": ("attn_layers", "names", "Kinds of the layers in order, such as local,lsh,local,lsh."),
    "hidden_size": ("hidden_size", "int", "Width of each residual stream."),
    "num_heads": ("num_attention_heads", "int", "Attention heads per layer."),
    "head_size": ("attention_head_size", "int", "Width of a head."),
    "feed_forward_size": ("feed_forward_size", "int", "Width inside the feed-forward layers."),
    "hidden_act": ("hidden_act", "str", "Activation of the feed-forward layers."),
    "local_chunk_length": ("local_attn_chunk_length", "int", "Chunk length of local attention."),
    "local_chunks_before": ("local_num_chunks_before", "int", "Chunks before its own that a local chunk sees."),
    "lsh_chunk_length": ("lsh_attn_chunk_length", "int", "Chunk length of LSH attention."),
    "lsh_chunks_before": ("lsh_num_chunks_before", "int", "Chunks before its own that a sorted chunk sees."),
    "num_hashes": ("num_hashes", "int", "Rounds of hashing."),
    "num_buckets": ("num_buckets", "buckets", "Buckets, one even number or factors such as 64,128; else automatic."),
    "hash_seed": ("hash_seed", "int", "Fixes the rotations of the hashing; else they are drawn anew."),
    "axial_pos_shape": ("axial_pos_shape", "integers", "Factors of the position table; else made from --seq-len."),
    "axial_pos_dims": ("axial_pos_embds_dim", "integers", "Widths of its factors; else a quarter and the rest."),
    "axial_norm_std": ("axial_norm_std", "float", "Spread of its initial values."),
    "initializer_range": ("initializer_range", "float", "Spread of the other initial weights."),
    "hidden_dropout": ("hidden_dropout_prob", "float", "Dropout on embeddings and layer outputs."),
    "local_attention_dropout": ("local_attention_probs_dropout_prob", "float", "Dropout on local attention."),
    "lsh_attention_dropout": ("lsh_attention_probs_dropout_prob", "float", "Dropout on LSH attention."),
}


@dataclass(frozen=True)
class Preset:
    """A named starting point; whatever is asked for explicitly comes on top."""

    training: Mapping[str, Any]
    model: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    # Small, so that three minutes on two CPU cores hold many steps: of the sizes tried, larger ones did not learn
    # clearly more per step.
    "demo": Preset(
        training={"standard_library": True, "seq_len": 4096, "max_minutes": 3.2, "learning_rate": 5e-3},
        model={
            "attn_layers": ["local", "lsh"],
            "hidden_size": 128,
            "num_attention_heads": 4,
            "attention_head_size": 32,
            "feed_forward_size": 256,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 32,
            "initializer_range": 0.07,
            "axial_norm_std": 0.07,
        },
    )
}


def parse_model_option(flag: str, value: Any) -> Any:
    """Turn the command-line text of a model flag into the value of its config field.

    >>> parse_model_option("layers", "local,lsh")
    ['local', 'lsh']
    >>> parse_model_option("num_buckets", "64,128")
    [64, 128]
    """
    kind = MODEL_OPTIONS[flag][1]
    if kind == "names":
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind in ("integers", "buckets"):
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            raise ValueError(f"{flag} must be whole numbers separated by commas, got {value!r}") from None
        return numbers[0] if kind == "buckets" and len(numbers) == 1 else numbers
    return value


def axial_shape(seq_len: int) -> list[int]:
    """Factor a length into two axes of about the same size, the product being the length or a little more.

    >>> axial_shape(4096), axial_shape(5000)
    ([64, 64], [79, 64])
    """
    columns = 2 ** max(0, round(math.log2(math.sqrt(seq_len))))
    return [math.ceil(seq_len / columns), columns]
