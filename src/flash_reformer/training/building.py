"""What a run starts from: the tokenizer and the model, made or loaded as settings ask for."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training import ranks
from flash_reformer.training.lengths import fitting_shape, grow_positions
from flash_reformer.training.presets import PRESETS, axial_shape
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.sharding import has_shards
from flash_reformer.training.sources import is_missing_folder
from flash_reformer.training.tasks import TASKS, Task
from flash_reformer.training.vocabulary import Vocabulary


def task_class(name: str) -> type[Task]:
    """Return a task by its name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def prepare(kind: type[Task], settings: TrainingSettings, fields: Mapping[str, Any]) -> tuple[Task, Any]:
    """Read the data and make the model of a new run, or refuse; nothing is written."""
    settings.check_complete()
    check_processes(settings)
    if settings.init_from is not None and fields:
        raise ValueError(f"init_from brings its own model: it contradicts {', '.join(sorted(fields))}")
    if settings.init_from is None:
        _check_limit(settings, fields)
    task = kind(settings, find_vocabulary(settings))
    if settings.init_from is not None:
        network = load_model(task, settings.init_from, "init_from")
        task.check_model(network)
    else:
        network = build_model(task, fields)
    task.settings = _settle(settings, network)
    return task, network


def find_vocabulary(settings: TrainingSettings) -> Vocabulary:
    """Return the tokenizer asked for, or that of the model to start from, or plain bytes."""
    if settings.tokenizer not in (None, "bytes"):
        return Vocabulary.load(str(settings.tokenizer))
    if settings.tokenizer is None and settings.init_from is not None and Vocabulary.stands_in(settings.init_from):
        return Vocabulary.load(settings.init_from)
    return Vocabulary.of_bytes()


def build_model(task: Task, fields: Mapping[str, Any]) -> Any:
    """Build a fresh model for a task; position tables that are not given are made to fit ``seq_len``."""
    dictated = task.dictated_fields()
    for name, value in dictated.items():
        if name in fields and fields[name] != value:
            raise ValueError(f"{name} must be {value!r} for this vocabulary and task, got {fields[name]!r}")
    sizes = {**task.model_defaults, **fields}
    shape = axial_shape(task.settings.seq_len)
    width = sizes.get("hidden_size", ReformerConfig().hidden_size)
    fitting = {
        "axial_pos_shape": shape,
        "axial_pos_embds_dim": [width // 4, width - width // 4],
        "max_position_embeddings": shape[0] * shape[1],
    }
    config = ReformerConfig(**{**fitting, **sizes, **dictated})
    if getattr(task.settings, "grow_positions", False):
        # The trailing axes are those of the longest length, so that only the first one grows.
        first = task.settings.length_at(0)
        if not config.axial_pos_embds:
            config.max_position_embeddings = first
        elif config.max_length_of_positions > first:
            config.axial_pos_shape = fitting_shape(config.axial_pos_shape, first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.settings.seed)
        return task.model_class(config)


def on_top_of_preset(
    task: str, preset: str, training: dict[str, Any], model: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings and model fields with those of a preset below them."""
    names = [name for name, each in PRESETS.items() if each.task == task]
    if preset not in names:
        raise ValueError(f"preset must be one of {', '.join(names) or 'none'} for {task}, got {preset!r}")
    if training.get("init_from") is not None:
        raise ValueError(f"init_from brings its own model: it contradicts preset {preset!r}")
    base = dict(PRESETS[preset].training)
    if training.get("text") or training.get("dataset"):
        base.pop("standard_library", None)
    if training.get("max_steps") is not None or training.get("max_epochs") is not None:
        base.pop("max_minutes", None)
    if training.get("seq_len_schedule") is not None:
        base.pop("seq_len", None)
    return {**base, **training}, {**PRESETS[preset].model, **model}


def _check_limit(settings: TrainingSettings, fields: Mapping[str, Any]) -> None:
    """Refuse a position table that is too small before reading data that may take long."""
    limit = math.prod(fields.get("axial_pos_shape", [settings.seq_len]))
    grows = getattr(settings, "grow_positions", False)
    if fields.get("axial_pos_embds", True) and settings.seq_len > limit and not grows:
        raise ValueError(f"seq_len must be at most {limit}, the positions of the model; got {settings.seq_len}")


def load_model(task: Task, folder: str, name: str) -> Any:
    """Load a saved model for a task; ``name`` says in messages what the folder is."""
    if is_missing_folder(folder):
        raise ValueError(f"{name} {folder} cannot be loaded: there is no such folder")
    if not (Path(folder) / "config.json").is_file() and Path(folder).exists():
        raise ValueError(f"{name} {folder} is no saved model: there is no config.json in it")
    try:
        with quiet_transformers():
            saved, _ = PreTrainedConfig.get_config_dict(folder)
            if saved.get("model_type") != ReformerConfig.model_type:
                raise ValueError(f"its model_type is {saved.get('model_type')!r}, not 'reformer'")
            if name == "checkpoint" and has_shards(folder):
                # The Trainer fills it from the shards.
                return task.model_class(ReformerConfig.from_dict(saved))
            architecture = (saved.get("architectures") or [""])[0]
            model = task.model_class.from_pretrained(folder, **task.loading_fields(architecture))
            return _with_automatic_buckets(model)
    except Exception as error:
        # Loaders raise dozens of kinds; what was to be loaded must be said with each.
        raise ValueError(f"{name} {folder} cannot be loaded: {error}") from error


def _with_automatic_buckets(model: Any) -> Any:
    """Let evaluations in training derive buckets from each length, as those before a resumption did."""
    config = model.config
    if config.num_buckets_automatic and config.num_buckets is not None:
        trained = [config.num_buckets] if isinstance(config.num_buckets, int) else list(config.num_buckets)
        config.num_buckets = None
        config.trained_num_buckets = trained
    return model


def check_processes(settings: Any) -> None:
    """Refuse what works in one process only."""
    if getattr(settings, "grow_positions", False) and ranks.world_size() > 1:
        # Engines of several processes know their parameters from the start.
        raise ValueError("grow_positions works in one process: leave it out, and all positions are there at once")


def _settle(settings: Any, network: Any) -> Any:
    """Return the settings of a new run as its model makes them; refuse what does not fit the model."""
    limit = network.config.max_length_of_positions
    if getattr(settings, "grow_positions", False):
        grow_positions(network, settings.length_at(0), settings.seed)
    elif settings.seq_len > limit:
        hint = "; or let them grow with grow_positions" if hasattr(settings, "grow_positions") else ""
        raise ValueError(f"seq_len must be at most {limit}, the positions of the model; got {settings.seq_len}{hint}")
    if settings.rounds is None and settings.eval_num_hashes is None:
        return settings
    if "lsh" not in network.config.attn_layers:
        name = "eval_num_hashes" if settings.rounds is None else "num_hashes_schedule"
        raise ValueError(f"{name} would have no effect: attn_layers has no 'lsh' layer")
    if settings.rounds is None:
        # Written down, since the config of every checkpoint will say how many rounds evaluation takes.
        settings = dataclasses.replace(settings, num_hashes_schedule=f"0:{network.config.num_hashes}")
    network.config.num_hashes = settings.eval_num_hashes or settings.rounds.values[-1]
    return settings
