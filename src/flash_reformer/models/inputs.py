"""The door: what callers pass is checked here, before anything changes, and padded to whole chunks.

Checks of *values* (token ids, positions, masks, labels) run on CPU tensors only: on a GPU each would make the host
wait, and in a compiled graph there is no value yet. Checks of shapes and dtypes run everywhere.

Letters: B batch, T positions, E hidden size, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_reformer.layers.decode_step import Layout
from flash_reformer.models.configuration_reformer import ReformerConfig

if TYPE_CHECKING:
    from flash_reformer.models.cache import ReformerCache

_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Inputs:
    """One checked batch. Exactly one of ``input_ids`` and ``inputs_embeds`` is a tensor."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    mask_BT: Tensor | None
    position_ids: Tensor | None

    @property
    def given(self) -> Tensor:
        """The tensor that was given: ids ``[B, T]`` or embeddings ``[B, T, E]``."""
        given = self.input_ids if self.input_ids is not None else self.inputs_embeds
        assert given is not None
        return given

    @property
    def batch_size(self) -> int:
        return self.given.shape[0]

    @property
    def length(self) -> int:
        return self.given.shape[1]


def check_tensor(name: str, value: object, shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ``TypeError`` unless a tensor of one of ``dtypes``, ``ValueError`` unless of one of ``shapes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}; got {str(value.dtype).removeprefix('torch.')}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(value.shape)}")


def has_values(x: Tensor) -> bool:
    """Whether values may be looked at: nothing has to be waited for, and no graph is being made."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_values(name: str, value: Tensor, low: int, high: int, *, also: int | None = None) -> None:
    """Raise ``ValueError`` unless every entry of a CPU tensor lies in ``[low, high)`` or equals ``also``."""
    if not has_values(value) or value.numel() == 0:
        return
    wrong = (value < low) | (value >= high)
    if also is not None:
        wrong &= value != also
    if wrong.any():
        extra = f" or {also}" if also is not None else ""
        raise ValueError(f"{name} must lie in [{low}, {high}){extra}; got {value[wrong][0].item()}")


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is None or an integer >= 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an integer >= 1 or None; got {type(value).__name__}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be an integer >= 1 or None; got {value}")


def check_flags(**flags: object) -> None:
    """Raise ``TypeError`` unless every value is True, False or None."""
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None; got {value!r}")


def _check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    try:
        check_values("input_ids", input_ids, 0, vocab_size)
    except ValueError as error:
        largest = int(input_ids.max())
        if largest < vocab_size:
            raise
        raise ValueError(
            f"{error}. The model's vocab_size is {vocab_size}, and id {largest} is of a vocabulary of at least "
            f"{largest + 1}: the tokenizer is another one, or model.resize_token_embeddings(len(tokenizer)) is due"
        ) from None


def _check_given(config: ReformerConfig, input_ids: object, inputs_embeds: object) -> tuple[int, int]:
    if (input_ids is None) == (inputs_embeds is None):
        number = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds; got {number}")
    name, given = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(given).__name__}")
    dims = 2 if name == "input_ids" else 3
    if given.dim() != dims:
        wanted = "[batch, length]" if dims == 2 else "[batch, length, hidden_size]"
        raise ValueError(f"{name} must have shape {wanted}; got {list(given.shape)}")
    B, T = given.shape[:2]
    if B == 0 or T == 0:
        raise ValueError(f"{name} must hold at least one row and one token; got shape {list(given.shape)}")
    if name == "input_ids":
        check_tensor(name, given, [(B, T)], _INTEGERS)
        _check_vocabulary(given, config.vocab_size)
    else:
        check_tensor(name, given, [(B, T, config.hidden_size)], _FLOATS)
    return B, T


def check_inputs(
    config: ReformerConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    num_hashes: int | None,
    *,
    alone: bool = False,
    cache: ReformerCache | None = None,
) -> Inputs:
    """Check what was passed to a model and return it with the mask as bool.

    Rows that will run ``alone`` take positions by their own lengths, so the whole batch may be longer than the table.
    After a filled ``cache`` the mask covers what is cached too; the one returned covers the new tokens only.

    Raises:
        TypeError, ValueError: naming the parameter, what was received and what is allowed.
    """
    B, T = _check_given(config, input_ids, inputs_embeds)
    limit = config.max_length_of_positions
    past = 0 if cache is None else cache.columns
    if cache is not None and past and cache.batch_size != B:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise ValueError(f"{name} has {B} rows, but past_key_values is the cache of {cache.batch_size}")
    if limit < T and position_ids is None and not alone and not past:
        table = f"axial_pos_shape {config.axial_pos_shape}" if config.axial_pos_embds else "max_position_embeddings"
        raise ValueError(f"the input has {T} tokens, but the position table ({table}) holds {limit}")
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, [(B, past + T)], (*_MASKS, *_FLOATS))
        if attention_mask.dtype != torch.bool:
            if attention_mask.is_floating_point() and has_values(attention_mask):
                between = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
                if between.numel():
                    raise ValueError(f"attention_mask must hold 0 and 1 only; got {between[0].item()}")
            check_values("attention_mask", attention_mask, 0, 2)
            attention_mask = attention_mask != 0
        if cache is not None and past:
            _check_past(attention_mask[:, :past], cache)
            attention_mask = attention_mask[:, past:]
    if position_ids is not None:
        check_tensor("position_ids", position_ids, [(B, T), (1, T)], _INTEGERS)
        check_values("position_ids", position_ids, 0, limit)
    check_count("num_hashes", num_hashes)
    return Inputs(input_ids, inputs_embeds, attention_mask, position_ids)


def _check_past(mask_BT: Tensor, cache: ReformerCache) -> None:
    """Raise ``ValueError`` unless a mask says of cached columns what it said when they were cached (CPU only)."""
    if not has_values(mask_BT):
        return
    known = cache.mask_of_columns()
    if not (mask_BT.all() if known is None else torch.equal(mask_BT, known)):
        raise ValueError("attention_mask differs from the one that past_key_values was made with at cached tokens")


def split_head_mask(config: ReformerConfig, head_mask: Tensor | None) -> list[Tensor | None]:
    """Return one head mask ``[H]`` per layer from ``[H]`` or ``[layers, H]``."""
    depth = config.num_hidden_layers
    if head_mask is None:
        return [None] * depth
    heads = config.num_attention_heads
    check_tensor("head_mask", head_mask, [(heads,), (depth, heads)], (*_FLOATS, *_MASKS))
    if not head_mask.is_floating_point():
        head_mask = head_mask.float()
    return list(head_mask.expand(depth, heads).unbind(0))


def layout_of(config: ReformerConfig, exact_below: int) -> Layout:
    """Return how rows are laid out: whole chunks of every kind of layer, unless all attend exactly.

    ``exact_below`` is what ``full_attention_below`` stands for.
    """
    by_kind = {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
    chunks = [chunk for kind, chunk in by_kind.items() if kind in config.attn_layers and chunk is not None]
    return Layout(exact_below, min(chunks, default=None), math.lcm(*chunks))


def can_cache(config: ReformerConfig) -> bool:
    """Whether decoding can be cached: the model is causal, and no window reaches beyond its own chunk."""
    after = [getattr(config, f"{kind}_num_chunks_after") for kind in set(config.attn_layers)]
    return bool(config.is_decoder) and not any(after)


def pad(inputs: Inputs, length: int, pad_embeds: Tensor | None, pad_token_id: int) -> Inputs:
    """Return the batch lengthened to ``length`` by masked tokens.

    ``pad_embeds`` ``[E]`` is the pad token's embedding, read where embeddings were given.
    """
    missing = length - inputs.length
    # An exported graph serves any length: it always pads, if only by nothing.
    if not torch.compiler.is_exporting() and missing == 0:
        return inputs
    B, T = inputs.batch_size, inputs.length
    mask_BT = inputs.mask_BT
    if mask_BT is None:
        mask_BT = torch.ones(B, T, dtype=torch.bool, device=inputs.given.device)
    padded = replace(inputs, mask_BT=torch.nn.functional.pad(mask_BT, (0, missing), value=False))
    if inputs.input_ids is not None:
        return replace(padded, input_ids=torch.nn.functional.pad(inputs.input_ids, (0, missing), value=pad_token_id))
    assert inputs.inputs_embeds is not None and pad_embeds is not None
    tail = pad_embeds.to(inputs.inputs_embeds.dtype).expand(B, missing, -1)
    return replace(padded, inputs_embeds=torch.cat([inputs.inputs_embeds, tail], dim=1))


def positions(inputs: Inputs, length: int, limit: int) -> Tensor:
    """Return positions ``[B or 1, length]``: the caller's, or 0, 1, 2, ...; pads go on counting, 0 beyond the table."""
    counted = torch.arange(length, device=inputs.given.device).unsqueeze(0)
    counted = torch.where(counted < limit, counted, 0)
    given = inputs.position_ids
    if given is None:
        return counted
    return torch.cat([given, counted[:, given.shape[1] :].expand(given.shape[0], -1)], dim=1)
