"""Training recipes: from text to a saved model, on `transformers.Trainer`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_heads import ReformerModelWithLMHead
from flash_reformer.tokenization.bytes import EOS_ID, PAD_ID, VOCAB_SIZE
from flash_reformer.training.budget import Budget
from flash_reformer.training.curve import save_loss_curve
from flash_reformer.training.data import Document, PackedBlocks, Split, hold_out, pack
from flash_reformer.training.progress import ProgressCallback, Report, peak_memory
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.run_folder import (
    checkpoint_state,
    find_checkpoint,
    prepare_folder,
    resumed_settings,
    write_settings,
)
from flash_reformer.training.sampling import generate_text, load_language_model
from flash_reformer.training.settings import PRESETS, TrainingSettings, axial_shape
from flash_reformer.training.sources import read_dataset, read_standard_library, read_text_files
from flash_reformer.training.trainer import BytesTrainer, seconds_spent, uses_gpu

# The sample starts with so many bytes of a text that the model has never seen.
PROMPT_BYTES = 200

# What the byte scheme and the causal task dictate.
_BYTE_LM = {"vocab_size": VOCAB_SIZE, "is_decoder": True, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        metrics: the content of ``metrics.json``.
        sample: the prompt and the text that the model wrote after it; empty where none was asked for.
        paths: everything written, by what it is.
    """

    metrics: dict[str, Any]
    sample: tuple[str, str]
    paths: dict[str, Path]


def train_clm(
    training: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a byte-level causal language model and save it.

    Args:
        training: settings by name, see :class:`TrainingSettings`.
        model: fields of `ReformerConfig`; what is not given has its default there, except for what bytes, causality
            and ``seq_len`` dictate.
        preset: name of a starting point in ``PRESETS`` which ``training`` and ``model`` come on top of.
        overwrite: remove an earlier run in the output folder.
        report: is told how the run goes.
        callbacks: more `transformers` callbacks.

    Seeds torch's, numpy's and Python's default generators, as the Trainer does.
    """
    given, fields = dict(training), dict(model or {})
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if given.get("init_from") is not None:
            raise ValueError(f"init_from brings its own model: it contradicts preset {preset!r}")
        given, fields = _on_top_of_preset(preset, given, fields)
    settings = TrainingSettings(**given)
    settings.check_complete()
    uses_gpu(settings)
    if settings.init_from is not None and fields:
        raise ValueError(f"init_from brings its own model: it contradicts {', '.join(sorted(fields))}")
    network = _start_from(settings) if settings.init_from is not None else build_model(settings, fields)
    limit = network.config.max_length_of_positions
    if settings.seq_len > limit:
        raise ValueError(f"seq_len must be at most {limit}, the positions of the model; got {settings.seq_len}")
    split = hold_out(read_documents(settings), settings.held_out)
    prepare_folder(settings.output, overwrite=overwrite)
    write_settings(settings)
    return _run(settings, network, split, None, report, callbacks)


def resume_clm(
    training: Mapping[str, Any],
    *,
    resume_from: str | None = None,
    report: Report | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Go on with a run from its last checkpoint, or from the one named.

    A run that is bounded by steps ends with the weights of an undisturbed one, bit for bit on a CPU.

    Args:
        training: ``output``, and whatever is to change of the settings in ``CHANGEABLE``; all others are the run's.
        resume_from: a checkpoint folder; by default the last one in ``output``.
        report: is told how the run goes.
        callbacks: more `transformers` callbacks.
    """
    checkpoint = find_checkpoint(resume_from, training.get("output", ""))
    settings = resumed_settings(checkpoint, training)
    settings.check_complete()
    uses_gpu(settings)
    if Path(settings.output).resolve() != checkpoint.parent.resolve():
        prepare_folder(settings.output, overwrite=False)
    split = hold_out(read_documents(settings), settings.held_out)
    with quiet_transformers():
        network = ReformerModelWithLMHead.from_pretrained(checkpoint)
    write_settings(settings)
    return _run(settings, network, split, checkpoint, report, callbacks)


def _on_top_of_preset(
    preset: str, training: dict[str, Any], model: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    base = dict(PRESETS[preset].training)
    if training.get("text") or training.get("dataset"):
        base.pop("standard_library", None)
    if training.get("max_steps") is not None:
        base.pop("max_minutes", None)
    return {**base, **training}, {**PRESETS[preset].model, **model}


def read_documents(settings: TrainingSettings) -> list[Document]:
    """Read the text that the settings name."""
    if settings.text:
        return read_text_files(settings.text)
    if settings.dataset is not None:
        return read_dataset(settings.dataset, column=settings.text_column, split=settings.dataset_split)
    return read_standard_library()


def build_model(settings: TrainingSettings, fields: Mapping[str, Any]) -> Any:
    """Build a fresh byte-level causal model; position tables that are not given are made to fit ``seq_len``."""
    for name, value in _BYTE_LM.items():
        if name in fields and fields[name] != value:
            raise ValueError(f"{name} must be {value!r} for a byte-level causal model, got {fields[name]!r}")
    shape = axial_shape(settings.seq_len)
    width = fields.get("hidden_size", ReformerConfig().hidden_size)
    fitting = {
        "axial_pos_shape": shape,
        "axial_pos_embds_dim": [width // 4, width - width // 4],
        "max_position_embeddings": shape[0] * shape[1],
    }
    config = ReformerConfig(**{**fitting, **fields, **_BYTE_LM})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ReformerModelWithLMHead(config)


def _start_from(settings: TrainingSettings) -> Any:
    try:
        return load_language_model(str(settings.init_from))
    except OSError as error:
        raise ValueError(f"init_from {settings.init_from} cannot be loaded: {error}") from error


def _run(
    settings: TrainingSettings,
    network: Any,
    split: Split,
    checkpoint: Path | None,
    report: Report | None,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    blocks = PackedBlocks(pack(split.train), settings.seq_len)
    held_out = PackedBlocks(pack(split.held_out), settings.seq_len).spread(settings.eval_sequences)
    before = 0.0 if checkpoint is None else seconds_spent(checkpoint_state(checkpoint))
    budget = Budget(settings.max_steps, settings.max_minutes, before)
    done = 0 if checkpoint is None else checkpoint_state(checkpoint).global_step
    if budget.fraction(done) >= 1.0:
        raise ValueError(f"{checkpoint} is already at the end of its run: raise --max-steps or --max-minutes to go on")
    tokens_per_step = settings.batch_size * settings.gradient_accumulation * blocks.length
    watchers = [] if report is None else [ProgressCallback(report, budget, tokens_per_step)]
    trainer = BytesTrainer(
        settings,
        budget,
        model=network,
        train_dataset=blocks,
        eval_dataset=held_out,
        callbacks=[*watchers, *callbacks],
    )
    trainer.args.eval_on_start = checkpoint is None
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = budget.seconds
        trainer.save_model()
        prompt = split.held_out[0].data[:PROMPT_BYTES]
        return _finish(settings, trainer, prompt, {"seconds": round(seconds, 1), "tokens_per_step": tokens_per_step})


def _finish(
    settings: TrainingSettings, trainer: BytesTrainer, prompt: bytes, facts: Mapping[str, Any]
) -> TrainingResult:
    folder = Path(settings.output)
    model: Any = trainer.model
    history = trainer.state.log_history
    judged = [entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry]
    metrics = {
        "held_out_bits_per_byte": judged[-1],
        "held_out_bits_per_byte_at_start": judged[0],
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * facts["tokens_per_step"],
        "seconds": facts["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_bytes": peak_memory(),
        "history": history,
    }
    paths = {
        "model": folder,
        "checkpoint": Path(find_checkpoint(None, settings.output)),
        "settings": folder / "run.json",
    }
    paths["metrics"] = folder / "metrics.json"
    paths["metrics"].write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    paths["loss curve (PNG)"], paths["loss curve (SVG)"] = save_loss_curve(history, folder)
    sample = ("", "")
    if settings.sample_tokens:
        # Half of a small position table for the prompt, the other half for what the model makes of it.
        room = model.config.max_length_of_positions - 1
        prompt = prompt[: max(1, room // 2)]
        wanted = max(1, min(settings.sample_tokens, room - len(prompt)))
        written = generate_text(model.eval(), prompt, max_new_tokens=wanted, temperature=0.8, seed=settings.seed)
        sample = (prompt.decode("utf-8", errors="replace"), written.decode("utf-8", errors="replace"))
        paths["sample"] = folder / "sample.txt"
        paths["sample"].write_text("".join(sample), encoding="utf-8")
    return TrainingResult(metrics, sample, paths)
