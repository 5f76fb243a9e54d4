"""Weights from elsewhere: checkpoints of trax's ReformerLM become folders that ``from_pretrained`` loads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_language import ReformerModelWithLMHead
from flash_reformer.models.safe_pickle import MAX_BYTES, load_pickle
from flash_reformer.models.trax_layout import read_weights

#: What no array tells: which values a model gives depends on it, so it has to be said.
_UNTOLD = {"lsh": ("lsh_attn_chunk_length", "num_buckets", "num_hashes"), "local": ("local_attn_chunk_length",)}


def load_trax_checkpoint(
    checkpoint: str | os.PathLike[str], config: ReformerConfig | Mapping[str, Any], *, max_bytes: int = MAX_BYTES
) -> ReformerModelWithLMHead:
    """Read the weights of trax's ReformerLM, as ``trax_layout`` describes them, into a model in evaluation mode.

    Args:
        checkpoint: the ``.pkl.gz`` or ``.pkl`` file. Nothing in it is run; see ``safe_pickle``.
        config: a configuration that agrees with the arrays, or some fields of one. Sizes that are not among them are
            read off the arrays. What no array tells must be there: ``hidden_act``; for LSH layers
            ``lsh_attn_chunk_length``, ``num_buckets`` (None derives it) and ``num_hashes``; for local layers
            ``local_attn_chunk_length``. Every other field has ReformerConfig's default.
        max_bytes: limit on the decompressed size.

    Returns:
        the causal language model, in float32.

    Raises:
        ValueError: for a file that is refused, another layout, a missing field, or a field that contradicts an array.
        TypeError: for another kind of ``config``.
    """
    if not isinstance(config, (ReformerConfig, Mapping)):
        raise TypeError(f"config must be a ReformerConfig or a mapping of its fields; got {type(config).__name__}")
    found = read_weights(load_pickle(checkpoint, max_bytes=max_bytes))
    given = config.to_dict() if isinstance(config, ReformerConfig) else dict(config)
    _check_fields(given, found.sizes)
    fields = {"is_decoder": True, **given, **found.sizes}
    # It counts attn_layers, and a file may say so without naming them.
    fields.pop("num_hidden_layers", None)
    # Without memory of its own, the model takes the tensors that were read, and draws no random number.
    with torch.device("meta"):
        model = ReformerModelWithLMHead(ReformerConfig(**fields))
    model.load_state_dict(found.state, strict=True, assign=True)
    return model.eval()


def convert_trax_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: ReformerConfig | Mapping[str, Any],
    *,
    max_bytes: int = MAX_BYTES,
) -> ReformerModelWithLMHead:
    """Write a trax checkpoint as a folder with ``config.json`` and safetensors, and return the model.

    Args:
        output: the folder to write; it must not hold anything yet.

    The other arguments and errors are those of :func:`load_trax_checkpoint`.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output must be a new or empty folder; {folder} is there already")
    model = load_trax_checkpoint(checkpoint, config, max_bytes=max_bytes)
    model.save_pretrained(folder)
    return model


def _check_fields(given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what is missing and for what contradicts the arrays."""
    if given.get("is_decoder", True) is not True:
        raise ValueError(f"is_decoder must be True: trax's ReformerLM is causal; got {given['is_decoder']!r}")
    depth = len(sizes["attn_layers"])
    if given.get("num_hidden_layers", depth) != depth:
        raise ValueError(f"num_hidden_layers is {given['num_hidden_layers']}, but the checkpoint has {depth} layers")
    for name, size in sizes.items():
        wanted = given.get(name, size)
        if isinstance(wanted, Sequence) and not isinstance(wanted, str):
            wanted = list(wanted)
        if wanted != size:
            raise ValueError(f"{name} must be {size!r}, as in the checkpoint; got {given[name]!r}")
    needed = ["hidden_act", *(name for kind in sorted(set(sizes["attn_layers"])) for name in _UNTOLD[kind])]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"config must say {', '.join(missing)}: no array of the checkpoint tells")
