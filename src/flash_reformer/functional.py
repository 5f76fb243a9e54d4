"""Which implementation runs: the only file that knows both ``ops`` and ``kernels``.

Each function has the signature of its definition in ``ops`` plus ``backend``. The choice rests on the arguments
alone, never on the environment or on import time, and an explicit backend that cannot run raises.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_reformer.ops import attention as _attention
from flash_reformer.ops import decoding as _decoding
from flash_reformer.ops import hashing as _hashing
from flash_reformer.ops import loss as _loss
from flash_reformer.ops import sorting as _sorting

#: ``"auto"`` takes the fastest that can run, ``"reference"`` the definition in ``ops``. Faster ones join this list
#: as they are built.
BACKENDS = ("auto", "reference")


def check_backend(backend: str) -> str:
    """Return ``backend``; raise ``ValueError`` unless it is one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    return backend


# Not heavy, but decided by arguments alone: one definition serves every backend.
automatic_num_buckets = _hashing.automatic_num_buckets
derive_seed = _hashing.derive_seed
draw_rotations = _hashing.draw_rotations
normalize_keys = _attention.normalize_keys
lsh_probs = _attention.lsh_probs
local_probs = _attention.local_probs
exact_probs = _attention.exact_probs
scale_probs = _attention.scale_probs
binary_cross_entropy_sum = _loss.binary_cross_entropy_sum
cross_entropy_sum = _loss.cross_entropy_sum
squared_error_sum = _loss.squared_error_sum
IGNORE_INDEX = _loss.IGNORE_INDEX
bucket_dtype = _hashing.bucket_dtype
# A step of decoding is a few small operations on any device.
bucket_starts = _decoding.bucket_starts
windows_of_new_tokens = _decoding.windows_of_new_tokens
merge_recent = _decoding.merge_recent
drop_positions = _decoding.drop_positions
without_repeats = _decoding.without_repeats
window_bias = _decoding.window_bias
exact_bias = _decoding.exact_bias
attend_with_bias = _decoding.attend_with_bias
attend_to_windows = _decoding.attend_to_windows
softmax_dtype = _attention.softmax_dtype


def hash_vectors(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.hashing.hash_vectors`."""
    check_backend(backend)
    return _hashing.hash_vectors(*args, **kwargs)


def sort_positions(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.sorting.sort_positions`."""
    check_backend(backend)
    return _sorting.sort_positions(*args, **kwargs)


def lsh_attention(*args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.lsh_attention`."""
    check_backend(backend)
    return _attention.lsh_attention(*args, **kwargs)


def local_attention(*args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.local_attention`."""
    check_backend(backend)
    return _attention.local_attention(*args, **kwargs)


def exact_attention(*args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.exact_attention`."""
    check_backend(backend)
    return _attention.exact_attention(*args, **kwargs)
