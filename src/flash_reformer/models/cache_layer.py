"""One layer of the decoding cache as ``transformers`` looks at it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from flash_reformer.layers.local_state import LocalState
from flash_reformer.layers.lsh_state import LSHState

if TYPE_CHECKING:
    from flash_reformer.models.cache import ReformerCache

State = LocalState | LSHState


class ReformerCacheLayer(CacheLayerMixin):
    """One layer as ``transformers`` looks at it. What changes the length goes through the whole cache."""

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: ReformerCache, state: State) -> None:
        # Not the base's: it would set keys and values, which are views here.
        self._cache = weakref.ref(cache)
        self.state = state

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.state.storage is not None

    @property
    def is_sliding(self) -> bool:
        return isinstance(self.state, LocalState)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """``[B, H, capacity, D]``: LSH layers' unit vectors, local layers' scaled keys of the last positions."""
        return self.state.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """``[B, H, capacity, D]``."""
        return self.state.values

    @property
    def record_past(self) -> bool:
        return isinstance(self.state, LocalState) and self.state.recorded_from is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        """Set by ``transformers`` to False when it no longer means to crop."""
        if isinstance(self.state, LocalState):
            cache = self._cache()
            self.state.recorded_from = list(cache.lengths) if value and cache is not None else None

    def get_seq_length(self) -> int:
        cache = self._cache()
        return 0 if cache is None else cache.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Return what older versions call :meth:`get_max_length`."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """What would change one layer alone: the others, and the cache's counts, would not follow."""
        raise TypeError("call this method of the ReformerCache, not of one of its layers")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a ReformerCache is filled by the model's forward")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a ReformerCache is filled by the model's forward")
