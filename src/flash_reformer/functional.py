"""Which implementation runs: the only file that knows both ``ops`` and ``kernels``.

Each function has the signature of its definition in ``ops`` plus ``backend``. The choice rests on the arguments
alone, never on the environment or on import time, and an explicit backend that cannot run raises. Nothing is routed
from a kernel back to a definition behind one's back: what a backend takes, it takes with every option.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
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
#: CPU, ``"triton"`` those for a GPU.
BACKENDS = ("auto", "reference", "cpu", "triton")

#: What the kernels for CPUs take, any option of theirs included.
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: What the kernels for GPUs take, any option of theirs included: these dtypes, head sizes up to so many, and devices of
#: this compute capability or newer, whose matrix units multiply fp32 in three parts.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_HEAD_SIZE = 128
_TRITON_CAPABILITY = (8, 0)
_MISSING = "backend='triton' needs triton, which is not installed: pip install 'flash-reformer[triton]'"
#: Multiplications below which a linear map is better done by BLAS than by oneDNN's convolutions.
_FEW_MULTIPLICATIONS = 2**23

#: Up to how many tokens exact attention is faster than LSH attention, per backend, by hash rounds (the last one for
#: more). For 4 rounds measured forward and backward, chunks of 64, 4 heads of size 64, by
#: ``python -m benchmarks.run speed``; with 1 round LSH attention is ahead from the shortest length measured, 512. The
#: numbers between are interpolated. The reference takes the same ones; so do GPUs, where nothing is measured yet.
FULL_ATTENTION_BELOW = dict.fromkeys(("cpu", "reference", "triton"), (256, 512, 768, 1024))


def check_backend(backend: str, head_size: int | None = None) -> str:
    """Return ``backend``; raise ``ValueError`` unless it is one of :data:`BACKENDS` that takes heads of this size."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend == "triton":
        _refuse(_MISSING if _triton() == "missing" else _unsuited_heads(head_size))
    return backend


def backend_for(x: Tensor, backend: str = "auto", head_size: int | None = None) -> str:
    """Return what runs on a tensor like ``x``, which may come in heads: ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        ValueError: for an unknown backend, or one that cannot run on this device, dtype or head size.
    """
    check_backend(backend, head_size)
    if backend == "reference":
        return backend
    on_cpu = x.device.type == "cpu" and x.dtype in _CPU_DTYPES
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"backend='cpu' runs on CPU tensors of dtype {_names(_CPU_DTYPES)}; got {_kind(x)}")
    if backend == "triton":
        _refuse(_unsuited_device(x.device) or _unsuited_dtype(x))
        return backend
    if on_cpu:
        return "cpu"
    if x.device.type == "cuda" and not (_unsuited_device(x.device) or _unsuited_dtype(x) or _unsuited_heads(head_size)):
        return "triton"
    return "reference"


@torch.compiler.assume_constant_result
def _triton() -> str:
    """Return whether the kernels for GPUs are ``"missing"``, ``"interpreted"`` (on CPU tensors) or ``"compiled"``."""
    try:
        from flash_reformer.kernels.triton._launch import INTERPRETED
    except ImportError:
        return "missing"
    return "interpreted" if INTERPRETED else "compiled"


@torch.compiler.assume_constant_result
def _capabilities() -> tuple[tuple[int, int], ...]:
    """Return the compute capability of every CUDA device; none of AMD's, which count otherwise."""
    if torch.version.hip is not None:
        return ()
    return tuple(_capability(index) for index in range(torch.cuda.device_count()))


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


def _unsuited_heads(head_size: int | None) -> str | None:
    if head_size is None or head_size <= _TRITON_HEAD_SIZE:
        return None
    return f"backend='triton' takes head sizes up to {_TRITON_HEAD_SIZE}; got {head_size}"


def _unsuited_dtype(x: Tensor) -> str | None:
    if x.dtype in _TRITON_DTYPES:
        return None
    return f"backend='triton' takes tensors of dtype {_names(_TRITON_DTYPES)}; got {_kind(x)}"


def _unsuited_device(device: torch.device) -> str | None:
    """Return why the kernels for GPUs cannot run on a device; None if they can."""
    state = _triton()
    if state == "missing":
        if device.type == "cuda":
            warnings.warn(
                "triton is not installed, so attention on the GPU runs plain PyTorch definitions: "
                "pip install 'flash-reformer[triton]'",
                stacklevel=2,
            )
        return _MISSING
    if device.type == "cuda" and state == "compiled":
        capabilities, index = _capabilities(), device.index or 0
        if not capabilities:
            return f"backend='triton' runs on CUDA devices of NVIDIA; {device} is none of them"
        if capabilities[index] >= _TRITON_CAPABILITY:
            return None
        needed, found = (".".join(map(str, pair)) for pair in (_TRITON_CAPABILITY, capabilities[index]))
        return f"backend='triton' needs a GPU of compute capability {needed} or newer; {device} has {found}"
    if device.type == "cpu" and state == "interpreted":
        return None
    return (
        f"backend='triton' runs on CUDA tensors, or on CPU tensors in triton's interpreter, where TRITON_INTERPRET=1 "
        f"is set before triton is imported; here kernels are {state} and the tensor is on {device}"
    )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _kind(x: Tensor) -> str:
    return f"{_names((x.dtype,))} on {x.device}"


def full_attention_below(x: Tensor, num_hashes: int, backend: str = "auto") -> int:
    """Return what ``full_attention_below="auto"`` means on tensors like ``x``; see :data:`FULL_ATTENTION_BELOW`."""
    by_rounds = FULL_ATTENTION_BELOW[backend_for(x, backend)]
    return by_rounds[min(num_hashes, len(by_rounds)) - 1]


# Not heavy, but decided by arguments alone: one definition serves every backend.
automatic_num_buckets = _hashing.automatic_num_buckets
derive_seed = _randomness.derive_seed
derive_seeds = _randomness.derive_seeds
normalize_keys = _attention.normalize_keys
lsh_probs = _attention.lsh_probs
local_probs = _attention.local_probs
exact_probs = _attention.exact_probs
scale_probs = _attention.scale_probs
binary_cross_entropy_sum = _loss.binary_cross_entropy_sum
squared_error_sum = _loss.squared_error_sum
IGNORE_INDEX = _loss.IGNORE_INDEX
bucket_dtype = _hashing.bucket_dtype
# Finding a step's windows is a few small operations on any device.
bucket_starts = _decoding.bucket_starts
windows_of_new_tokens = _decoding.windows_of_new_tokens
merge_recent = _decoding.merge_recent
drop_positions = _decoding.drop_positions
without_repeats = _decoding.without_repeats
window_bias = _decoding.window_bias
exact_bias = _decoding.exact_bias
attend_with_bias = _decoding.attend_with_bias
softmax_dtype = _attention.softmax_dtype


def draw_rotations(
    seed: Tensor,
    num_heads: int,
    head_size: int,
    num_hashes: int,
    bucket_factors: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """See :func:`flash_reformer.ops.hashing.draw_rotations`, which serves seeds on the CPU.

    A seed on a device stays there: the rotations are a function of it by arithmetic, without a generator, so that
    nothing waits, and a captured graph draws new ones whenever its seed is new.
    """
    if seed.device.type == "cpu":
        return _hashing.draw_rotations(seed, num_heads, head_size, num_hashes, bucket_factors, dtype, device)
    shape = (num_heads, head_size, num_hashes, sum(bucket_factors) // 2)
    # Layers of one model may stand on several devices.
    return _randomness.normal(seed.to(device, non_blocking=True), shape, dtype)


def stream_addition(x: Tensor, backend: str = "auto") -> Callable[..., None] | None:
    """Return a kernel that does what ``residual.add_in_pieces`` does, to the bit; None where there is none."""
    if x.dtype != torch.float32 or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cuda":
        return None
    if backend_for(x, backend) != "triton":
        return None
    from flash_reformer.kernels.triton._residual import add_streams

    return add_streams


def hash_vectors(vectors_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.hashing.hash_vectors`."""
    chosen = backend_for(vectors_BTHD, backend, vectors_BTHD.shape[-1])
    if chosen == "triton":
        from flash_reformer.kernels.triton import hashing as _triton_hashing

        return _triton_hashing.hash_vectors(vectors_BTHD, *args, **kwargs)
    if chosen == "cpu":
        return _cpu_hashing.hash_vectors(vectors_BTHD, *args, **kwargs)
    return _hashing.hash_vectors(vectors_BTHD, *args, **kwargs)


def sort_positions(buckets_BHRT: Tensor, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.sorting.sort_positions`."""
    check_backend(backend)
    narrow = buckets_BHRT.dtype in (torch.int16, torch.int32)
    if backend in ("cpu", "triton"):
        suits = buckets_BHRT.device.type == "cpu" if backend == "cpu" else not _unsuited_device(buckets_BHRT.device)
        if not (suits and narrow):
            where = "a CPU" if backend == "cpu" else "a GPU"
            raise ValueError(f"backend={backend!r} sorts int16 and int32 on {where}; got {_kind(buckets_BHRT)}")
    if backend == "triton" or (backend == "auto" and narrow and _on_triton(buckets_BHRT.device)):
        from flash_reformer.kernels.triton import sorting as _triton_sorting

        return _triton_sorting.sort_positions(buckets_BHRT)
    if backend != "reference" and narrow and buckets_BHRT.device.type == "cpu":
        return _cpu_sorting.sort_positions(buckets_BHRT)
    return _sorting.sort_positions(buckets_BHRT)


def _on_triton(device: torch.device) -> bool:
    return device.type == "cuda" and not _unsuited_device(device)


def lsh_attention(qk_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.lsh_attention`. Gradients flow through the output, not the lse."""
    chosen = _attention_room(qk_BTHD, backend)
    return chosen.lsh_attention(qk_BTHD, *args, **kwargs)


def local_attention(query_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.local_attention`. Gradients flow through the output, not the lse."""
    return _attention_room(query_BTHD, backend).local_attention(query_BTHD, *args, **kwargs)


def exact_attention(query_BTHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`flash_reformer.ops.attention.exact_attention`. Gradients flow through the output, not the lse."""
    return _attention_room(query_BTHD, backend).exact_attention(query_BTHD, *args, **kwargs)


def _attention_room(x_BTHD: Tensor, backend: str) -> Any:
    """Return the file whose attention runs on a tensor like ``x``."""
    chosen = backend_for(x_BTHD, backend, x_BTHD.shape[-1])
    if chosen == "triton":
        from flash_reformer.kernels.triton import attention as _triton_attention

        return _triton_attention
    return _cpu_attention if chosen == "cpu" else _attention


def attend_at(query_BMHD: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.decoding.attend_at`."""
    if backend_for(query_BMHD, backend, query_BMHD.shape[-1]) == "triton":
        from flash_reformer.kernels.triton import decoding as _triton_decoding

        return _triton_decoding.attend_at(query_BMHD, *args, **kwargs)
    return _decoding.attend_at(query_BMHD, *args, **kwargs)


def cross_entropy_sum(logits_XV: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """See :func:`flash_reformer.ops.loss.cross_entropy_sum`."""
    if backend_for(logits_XV, backend) == "triton":
        from flash_reformer.kernels.triton import loss as _triton_loss

        return _triton_loss.cross_entropy_sum(logits_XV, *args, **kwargs)
    return _loss.cross_entropy_sum(logits_XV, *args, **kwargs)


def dropout(x_XW: Tensor, p: float, seed: Tensor, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.randomness.dropout`."""
    chosen = backend_for(x_XW, backend)
    if chosen == "triton":
        from flash_reformer.kernels.triton import randomness as _triton_randomness

        return _triton_randomness.dropout(x_XW, p, seed)
    if chosen == "cpu":
        return _cpu_randomness.dropout(x_XW, p, seed)
    return _randomness.dropout(x_XW, p, seed)


def linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """See :func:`flash_reformer.ops.linear.linear`.

    The kernel takes plain fp32 weights and enough rows to be worth it. Quantised or sharded weights, autocast, other
    dtypes and compilers, which choose for themselves, get torch's own.
    """
    check_backend(backend)
    if backend in ("auto", "cpu") and backend_for(x_XI, backend) == "cpu" and _suits_convolution(x_XI, weight_OI):
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
