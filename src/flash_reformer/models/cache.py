"""The decoding cache: a ``transformers`` ``Cache`` around the states of the layers.

``generate`` speaks of *columns*: the width of ``input_ids`` and ``attention_mask``, pads included. Here every row
counts its own tokens, wherever its pads stand, and the cache translates between the two.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from flash_reformer.layers.decode_storage import ordinary_tensors
from flash_reformer.layers.local_state import LocalState
from flash_reformer.layers.lsh_state import LSHState
from flash_reformer.models.cache_layer import ReformerCacheLayer, State
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.inputs import can_cache, layout_of

#: Two models can share a cache's layout only if they agree in these.
_LAYOUT = (
    "attention_head_size",
    "attn_layers",
    "full_attention_below",
    "hash_seed",
    "hidden_size",
    "local_attn_chunk_length",
    "local_num_chunks_after",
    "local_num_chunks_before",
    "lsh_allow_duplicate_attention",
    "lsh_attend_across_buckets",
    "lsh_attn_chunk_length",
    "lsh_num_chunks_after",
    "lsh_num_chunks_before",
    "num_attention_heads",
    "num_buckets",
    "vocab_size",
    "wrap_around",
)


_READ_BY_FORWARDS = ("hash_seed", "num_buckets")


def _layout(config: ReformerConfig) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in _LAYOUT}


class ReformerCache(Cache):
    """What a causal Reformer keeps between the steps of decoding.

    A full forward with ``use_cache=True`` returns one; passed back as ``past_buckets_states`` or ``past_key_values``
    it stands for all tokens so far, and is extended in place. Per token, an LSH layer keeps
    ``H * (2 * D * element_size + R * 6)`` bytes (H heads of size D, R rounds; 8 for 6 beyond 32,766 buckets), a local
    layer keeps its last ``before + 2`` chunks only. Storage may exceed that by a quarter and 64 positions; see
    :attr:`nbytes`.

    Args:
        config: the configuration of the model that will fill it.

    Raises:
        ValueError: for a model that is not causal, or whose layers look at later chunks.
    """

    def __init__(self, config: ReformerConfig) -> None:
        if not isinstance(config, ReformerConfig):
            raise TypeError(f"config must be a ReformerConfig; got {type(config).__name__}")
        if not can_cache(config):
            raise ValueError(
                "config must be of a causal model whose layers see no chunks after their own: a cache needs "
                f"is_decoder=True (got {config.is_decoder}) and *_num_chunks_after=0"
            )
        self._agreed = _layout(config)
        limit = config.full_attention_below
        # What "auto" stands for depends on where the model runs, which its first forward says.
        self.layout = layout_of(config, limit if isinstance(limit, int) else 0)
        self._config = config
        self._model: weakref.ref[Any] | None = None
        #: What ``generate`` says of the next forward: where the prompt ends (None: where the input does), and how many
        #: of a row's tokens to take at once.
        self.prompt_columns: int | None = None
        self.chunk_size: int | None = None
        self._empty()
        super().__init__(layers=[ReformerCacheLayer(self, state) for state in self._new_states()])

    @property
    def _own_layers(self) -> list[ReformerCacheLayer]:
        return cast("list[ReformerCacheLayer]", self.layers)

    def _new_states(self) -> list[State]:
        config = self._config
        states: list[State] = []
        for index, kind in enumerate(config.attn_layers):
            if kind == "lsh":
                states.append(LSHState(index))
            else:
                limit = self.layout.exact_up_to(config.local_attn_chunk_length)
                states.append(LocalState(config.local_attn_chunk_length, config.local_num_chunks_before or 0, limit))
        return states

    def _empty(self) -> None:
        self.columns = 0
        self.lengths: list[int] = []
        #: The longest a row may get, in columns; None where nobody said, and bucket counts follow the length.
        self.reach: int | None = None
        self.seed: Tensor | None = None
        self.seeds_LX: Tensor | None = None
        self.num_hashes: int | None = None
        #: The bucket count of every layout length met so far.
        self.known_factors: dict[int, tuple[int, ...]] = {}
        self.reaches: list[int | None] = []
        #: Dtype, device and autocast of what is stored.
        self.context: tuple[Any, ...] | None = None
        #: ``[B, capacity]`` on the CPU: which columns were tokens; None as long as all were.
        self._real: Tensor | None = None
        #: From which column on, how far each row's positions are ahead of its count of tokens.
        self._offsets: list[tuple[int, list[int]]] = []

    # --- what the model asks and tells --------------------------------------------------------------------------------

    @property
    def states(self) -> list[State]:
        """What the layers keep."""
        return [layer.state for layer in self._own_layers]

    @property
    def offsets(self) -> list[int]:
        """How far each row's next position is ahead of its count of tokens."""
        return self._offsets[-1][1] if self._offsets else [0] * len(self.lengths)

    def mask_of_columns(self) -> Tensor | None:
        """Return bool ``[B, columns]`` on the CPU, or None where all columns are tokens."""
        return None if self._real is None else self._real[:, : self.columns]

    def check_model(self, model: Any, config: ReformerConfig, context: tuple[Any, ...]) -> None:
        """Raise ``ValueError`` unless this cache is (or may become) this model's, as it is now."""
        owner = None if self._model is None else self._model()
        # Of a model that has filled it, only what forwards read from the configuration can have changed.
        self._check_layout(config, _LAYOUT if owner is not model or self.columns == 0 else _READ_BY_FORWARDS)
        if self.columns == 0:
            return
        if self._model is not None and owner is not model:
            raise ValueError("past_key_values was filled by another model; a cache serves the model that filled it")
        if self.context is not None and self.context != context:
            raise ValueError(
                f"past_key_values was filled with (dtype, device, autocast) {self.context}; this call has {context}"
            )

    def _check_layout(self, config: ReformerConfig, names: Sequence[str]) -> None:
        wrong = [name for name in names if getattr(config, name) != self._agreed[name]]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"past_key_values is the cache of another configuration: {name} is {self._agreed[name]!r} there and "
                f"{getattr(config, name)!r} here"
            )

    def check_rounds(self, num_hashes: int | None) -> None:
        """Raise ``ValueError`` if a step asks for other rounds than the cache was made with."""
        if num_hashes is not None and num_hashes != self.num_hashes:
            raise ValueError(f"num_hashes must be None or that of the cache, {self.num_hashes}; got {num_hashes}")

    def own(self, model: Any) -> None:
        """Remember who fills the cache."""
        self._model = weakref.ref(model)

    def commit(self, counts: Sequence[int], mask: Tensor | None, columns: int, offsets: list[int]) -> None:
        """Count ``columns`` new columns of which each row takes ``counts``; ``mask`` says which (None: all)."""
        before = self.columns
        if not self.lengths:
            self.lengths = [0] * len(counts)
        if self._real is None and mask is not None:
            self._real = torch.ones(len(counts), before + columns, dtype=torch.bool)
        if self._real is not None:
            if self._real.shape[1] < before + columns:
                grown = torch.ones(len(counts), (before + columns) * 5 // 4 + 64, dtype=torch.bool)
                grown[:, :before] = self._real[:, :before]
                self._real = grown
            self._real[:, before : before + columns] = True if mask is None else mask.cpu()
        if offsets != self.offsets:
            self._offsets.append((before, list(offsets)))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.columns = before + columns

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Empty the cache again if what fills it fails."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    @contextlib.contextmanager
    def extending(self) -> Iterator[None]:
        """Take back tokens that a failing series of steps has added. Where windows are gone, nothing is left."""
        lengths, offsets = list(self.lengths), list(self._offsets)
        try:
            yield
        except BaseException:
            if all(state.can_crop(lengths) for state in self.states if isinstance(state, LocalState)):
                self.lengths, self._offsets = lengths, offsets
                for state in self.states:
                    state.crop(lengths)
            else:
                self.reset()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' tensors take."""
        states = (tensor for state in self.states for tensor in state.tensors())
        return sum(tensor.numel() * tensor.element_size() for tensor in states)

    # --- what transformers asks ---------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns are cached, pads included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum but the model's position table."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return what older versions of ``transformers`` call :meth:`get_max_length`."""
        return -1

    @property
    def max_cache_len(self) -> int:
        """What older versions of ``transformers`` call :meth:`get_max_length`."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 while the cache is empty."""
        return len(self.lengths) or -1

    max_batch_size = batch_size

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # Else an empty model's cache, of length 0, would be taken for none at all.
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: keys and values enter with the bucket order, by the model's forward."""
        raise TypeError("a ReformerCache is filled by the model's forward, not by update")

    def reset(self) -> None:
        """Empty the cache."""
        recording = any(layer.record_past for layer in self._own_layers)
        self._empty()
        self._renew_states(recording)

    def settle_layout(self, exact_below: int) -> None:
        """Learn, while empty, up to which length the model attends exactly."""
        if exact_below != self.layout.exact_below:
            recording = any(layer.record_past for layer in self._own_layers)
            self.layout = layout_of(self._config, exact_below)
            self._renew_states(recording)

    def _renew_states(self, recording: bool) -> None:
        for layer, state in zip(self._own_layers, self._new_states(), strict=True):
            layer.state = state
        if recording:
            self.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns.

        Args:
            tokens_to_remove: minus the number of columns to remove; 0 removes none. A positive number is the length to
                keep, as up to transformers 5.17.

        Raises:
            ValueError: if more is to be removed than there is, or local layers no longer hold the window of what
                would be the last token. They keep one chunk to spare; after :meth:`activate_past_recording` they
                keep everything until the next crop. The cache stays as it was.
        """
        try:
            # A tensor of one number, too: assisted decoding counts on the device.
            number = operator.index(tokens_to_remove)
        except TypeError:
            number = None
        if number is None or isinstance(tokens_to_remove, bool):
            raise TypeError(f"tokens_to_remove must be an integer; got {tokens_to_remove!r}")
        tokens_to_remove = number
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        if removed > self.columns:
            raise ValueError(f"tokens_to_remove asks for {removed} columns less, but the cache holds {self.columns}")
        if removed and removed == self.columns:
            self.reset()
            return
        columns = self.columns - removed
        lost = [removed] * len(self.lengths)
        if self._real is not None:
            lost = self._real[:, columns : self.columns].sum(dim=1).tolist()
        lengths = [length - gone for length, gone in zip(self.lengths, lost, strict=True)]
        for index, state in enumerate(self.states):
            if self.lengths and isinstance(state, LocalState) and not state.can_crop(lengths):
                raise ValueError(
                    f"tokens_to_remove={tokens_to_remove} goes back further than the local attention of layer {index} "
                    "remembers: it keeps its window and one chunk. Call activate_past_recording() before the tokens "
                    "that may have to be removed"
                )
        if self.lengths:
            with ordinary_tensors():
                for state in self.states:
                    state.crop(lengths)
        self.columns, self.lengths = columns, lengths
        while self._offsets and self._offsets[-1][0] >= columns:
            self._offsets.pop()

    def activate_past_recording(self) -> None:
        """From now until the next :meth:`crop`, let local layers drop nothing that it may want back."""
        for layer in self._own_layers:
            layer.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what is row ``beam_idx[i]`` now (beam search)."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, one after the other."""
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise ValueError(f"repeats must be an integer >= 1; got {repeats!r}")
        self._select(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        self._select(indices)

    def _select(self, rows: Any) -> None:
        if not self.lengths:
            return
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            if rows.shape != (len(self.lengths),):
                raise ValueError(
                    f"rows must have one entry per row, {len(self.lengths)}; got shape {tuple(rows.shape)}"
                )
            rows = rows.nonzero().flatten()
        if rows.dim() != 1 or rows.numel() == 0 or rows.is_floating_point():
            raise ValueError(f"rows must be a non-empty 1-d tensor of row numbers; got {rows!r}")
        numbers = [int(row) for row in rows.tolist()]
        if min(numbers) < 0 or max(numbers) >= len(self.lengths):
            raise ValueError(f"rows must lie in [0, {len(self.lengths)}); got {numbers}")
        if numbers == list(range(len(self.lengths))):
            return
        with ordinary_tensors():
            for state in self.states:
                state.select(rows, numbers)
        self.lengths = [self.lengths[row] for row in numbers]
        self.reaches = [self.reaches[row] for row in numbers]
        self._offsets = [(column, [offsets[row] for row in numbers]) for column, offsets in self._offsets]
        if self._real is not None:
            self._real = self._real.index_select(0, rows.cpu())

    # --- copies -------------------------------------------------------------------------------------------------------

    def __copy__(self) -> ReformerCache:
        """Return a deep copy: two caches that share storage would write into each other."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReformerCache:
        """Return a cache that goes its own way from here, for the same model."""
        other = type(self)(self._config)
        skipped = ("layers", "_config", "_model")
        for name, value in self.__dict__.items():
            if name not in skipped:
                setattr(other, name, copy.deepcopy(value, memo))
        other._model = self._model
        for mine, theirs in zip(self._own_layers, other._own_layers, strict=True):
            theirs.state = copy.deepcopy(mine.state, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Leave out references that mean nothing elsewhere; whoever loads it may use it with a model like the first."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("layers", "_model")}
        return {**kept, "states": self.states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.pop("states")
        self.__dict__.update(state)
        self._model = None
        self.layers = [ReformerCacheLayer(self, layer_state) for layer_state in states]
