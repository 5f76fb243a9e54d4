"""Which implementation runs: the only file that knows both ``ops`` and ``kernels``.

Each function has the signature of its definition in ``ops`` plus ``backend``. The choice rests on the arguments
alone, never on the environment or on import time, and an explicit backend that cannot run raises. Nothing is routed
from a kernel back to a definition behind one's back: what a backend takes, it takes with every option.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_reformer.kernels.cpu import attention as _cpu_attention
from flash_reformer.kernels.cpu import hashing as _cpu_hashing
from flash_reformer.kernels.cpu import linear as _cpu_linear
from flash_reformer.kernels.cpu import randomness as _cpu_randomness
from flash_reformer.kernels.cpu import sorting as _cpu_sorting
from flash_reformer.ops import attention as _attention
from flash_reformer.ops import decoding as _decoding
from flash_reformer.ops import hashing as _hashing
from flash_reformer.ops import linear as _linear
from flash_reformer.ops import loss as _loss
from flash_reformer.ops import randomness as _randomness
from flash_reformer.ops import sorting as _sorting

#: ``"auto"`` takes the fastest that can run, ``"reference"`` the definitions in ``ops``, ``"cpu"`` the kernels for a
#: CPU. Faster ones join this list as they are built.
BACKENDS = ("auto", "reference", "cpu")

#: What the kernels for CPUs take, any option of theirs included.
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Multiplications below which a linear map is better done by BLAS than by oneDNN's convolutions.
_FEW_MULTIPLICATIONS = 2**23

#: Up to how many tokens exact attention is faster than LSH attention, per backend, by hash rounds (the last one for
#: more). For 4 rounds measured forward and backward, chunks of 64, 4 heads of size 64, by
#: ``python -m benchmarks.run speed``; with 1 round LSH attention is ahead from the shortest length measured, 512. The
#: numbers between are interpolated, and the reference takes the same ones.
FULL_ATTENTION_BELOW = {"cpu": (256, 512, 768, 1024), "reference": (256, 512, 768, 1024)}


def check_backend(backend: str) -> str:
    """Return ``backend``; raise ``ValueError`` unless it is one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    return backend


def backend_for(x: Tensor, backend: str = "auto") -> str:
    """Return what runs on a tensor like ``x``: ``"reference"`` or ``"cpu"``.

    Raises:
        ValueError: for an unknown backend, or one that cannot run on this device or dtype.
    """
    check_backend(backend)
    if backend == "reference":
        return backend
    runs = x.device.type == "cpu" and x.dtype in _CPU_DTYPES
    if backend == "cpu" and not runs:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CPU_DTYPES)
        raise ValueError(
            f"backend='cpu' runs on CPU tensors of dtype {dtypes}; got {str(x.dtype).removeprefix('torch.')} on "
            f"{x.device}"
        )
    return "cpu" if runs else "reference"


def full_attention_below(x: Tensor, num_hashes: int, backend: str = "auto") -> int:
    """Return what ``full_attention_below="auto"`` means on tensors like ``x``; see :data:`FULL_ATTENTION_BELOW`."""
    by_rounds = FULL_ATTENTION_BELOW[backend_for(x, backend)]
    return by_rounds[min(num_hashes, len(by_rounds)) - 1]


# Not heavy, but decided by arguments alone: one definition serves every backend.
automatic_num_buckets = _hashing.automatic_num_buckets
derive_seed = _randomness.derive_seed
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


def hash_vectors(vectors_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.hashing.hash_vectors`."""
    if backend_for(vectors_BTHD, backend) == "cpu":
        return _cpu_hashing.hash_vectors(vectors_BTHD, *args, **kwargs)
    return _hashing.hash_vectors(vectors_BTHD, *args, **kwargs)


def sort_positions(buckets_BHRT: Tensor, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.sorting.sort_positions`."""
    check_backend(backend)
    runs = buckets_BHRT.device.type == "cpu" and buckets_BHRT.dtype in (torch.int16, torch.int32)
    if backend == "cpu" and not runs:
        kind = str(buckets_BHRT.dtype).removeprefix("torch.")
        raise ValueError(f"backend='cpu' sorts int16 and int32 on a CPU; got {kind} on {buckets_BHRT.device}")
    if backend != "reference" and runs:
        return _cpu_sorting.sort_positions(buckets_BHRT)
    return _sorting.sort_positions(buckets_BHRT)


def lsh_attention(qk_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.lsh_attention`. Gradients flow through the output, not the lse."""
    if backend_for(qk_BTHD, backend) == "cpu":
        return _cpu_attention.lsh_attention(qk_BTHD, *args, **kwargs)
    return _attention.lsh_attention(qk_BTHD, *args, **kwargs)


def local_attention(query_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.local_attention`. Gradients flow through the output, not the lse."""
    if backend_for(query_BTHD, backend) == "cpu":
        return _cpu_attention.local_attention(query_BTHD, *args, **kwargs)
    return _attention.local_attention(query_BTHD, *args, **kwargs)


def exact_attention(query_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.exact_attention`. Gradients flow through the output, not the lse."""
    if backend_for(query_BTHD, backend) == "cpu":
        return _cpu_attention.exact_attention(query_BTHD, *args, **kwargs)
    return _attention.exact_attention(query_BTHD, *args, **kwargs)


def dropout(x_XW: Tensor, p: float, seed: Tensor, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.randomness.dropout`."""
    if backend_for(x_XW, backend) == "cpu":
        return _cpu_randomness.dropout(x_XW, p, seed)
    return _randomness.dropout(x_XW, p, seed)


def linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.linear.linear`.

    The kernel takes plain fp32 weights and enough rows to be worth it. Quantised or sharded weights, autocast, other
    dtypes and compilers, which choose for themselves, get torch's own.
    """
    chosen = backend_for(x_XI, backend)
    if chosen == "cpu" and _suits_convolution(x_XI, weight_OI):
        return _cpu_linear.linear(x_XI, weight_OI, bias_O)
    return _linear.linear(x_XI, weight_OI, bias_O)


def _suits_convolution(x_XI: Tensor, weight_OI: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(weight_OI) in (Tensor, torch.nn.Parameter)
        and x_XI.dtype == weight_OI.dtype == torch.float32
        and x_XI.shape[-1] == weight_OI.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and math.prod(x_XI.shape[:-1]) * weight_OI.numel() >= _FEW_MULTIPLICATIONS
    )
