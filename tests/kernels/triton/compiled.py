"""Compile every kernel for real devices, without one: ``python -m tests.kernels.triton.compiled`` prints a table.

The host's code runs as it is, on CPU tensors; instead of being launched, each kernel is compiled for the arguments that
it would have got, by triton and by the assembler that comes with it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_reformer.kernels.triton import _launch, attention, decoding, hashing, loss, randomness, sorting
from flash_reformer.kernels.triton._residual import add_streams

#: Compute capabilities, as ptxas names them.
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """What one launch would have been."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def recorded(call: Callable[[], Any], capability: int) -> list[Launch]:
    """Run host code as for a device of this capability; return its launches, none of which happens."""
    launches: list[Launch] = []

    def record(
        kernel: Any, programs: int, *args: Any, like: Tensor, num_warps: int, num_stages: int = 2, **rest: Any
    ) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | rest
        launches.append(Launch(kernel, named, {"num_warps": num_warps, "num_stages": num_stages}))

    def is_hopper(device: torch.device) -> bool:
        return capability >= 90

    modules = [m for name, m in sys.modules.items() if name.startswith("flash_reformer.kernels.triton.")]
    stand_ins = {"launch": record, "is_hopper": is_hopper}
    patches = [mock.patch.object(m, name, it) for m in modules for name, it in stand_ins.items() if hasattr(m, name)]
    for patch in patches:
        patch.start()
    try:
        call()
    finally:
        for patch in patches:
            patch.stop()
    return launches


def compile_for(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile and assemble one launch; return registers, bytes spilled and bytes of shared memory."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in kernel.params:
        value, place = launch.arguments[parameter.name], (parameter.num,)
        # As triton itself does: ones become constants, and what sixteen divides is known to be so.
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (free and type(value) is int and value == 1):
            signature[parameter.name], constants[place] = "constexpr", value
            continue
        if free and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            narrow = isinstance(value, int) and -(2**31) <= value < 2**31
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if narrow else "i64"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {**launch.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared, **_assemble(compiled.asm["ptx"], ARCHITECTURES[capability])}


def _assemble(ptx: str, architecture: str) -> dict[str, int]:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for name in ("ptxas", "ptxas-blackwell"):
            command = [binaries / name, "-v", f"-arch={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"ptxas: {done.stderr}")
    said = done.stdout + done.stderr
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert used is not None
    return {"registers": int(used.group(1)), "spilled": int(spilled.group(1)) if spilled else 0}


def _rows(dtype: torch.dtype, T: int, D: int, number: int = 3) -> list[Tensor]:
    return [torch.zeros(1, T, 2, D, dtype=dtype) for _ in range(number)]


def lsh(dtype: torch.dtype, C: int, D: int, R: int = 1, **options: Any) -> Callable[[], None]:
    """Forward and backward of LSH attention."""
    T = 4 * C

    def call() -> None:
        qk, v, d_out = _rows(dtype, T, D)
        order = torch.arange(T).expand(1, 2, R, T).contiguous()
        given = {"chunk_length": C, "causal": True, "buckets_BHRT": order.to(torch.int16), **options}
        out, _ = attention.lsh_attention(qk.requires_grad_(), v, order, **given)
        torch.autograd.grad(out, qk, d_out)

    return call


def local(dtype: torch.dtype, C: int, D: int, **options: Any) -> Callable[[], None]:
    """Forward and backward of local attention."""

    def call() -> None:
        q, k, v = _rows(dtype, 4 * C, D)
        out, _ = attention.local_attention(q.requires_grad_(), k, v, chunk_length=C, causal=True, **options)
        torch.autograd.grad(out, q, v)

    return call


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def attentions() -> dict[str, Callable[[], None]]:
    """What is compiled of attention, by name."""
    dropout = {"dropout_p": 0.1, "dropout_seed": torch.tensor(1)}
    every = {
        "attend_across_buckets": False,
        "allow_duplicate_attention": False,
        "wrap_around": False,
        "mask_BT": torch.ones(1, 128, dtype=torch.bool),
        **dropout,
    }
    return {
        "lsh bf16 C64 D64": lsh(BF16, 64, 64),
        "lsh bf16 C64 D64 R4": lsh(BF16, 64, 64, 4),
        "lsh bf16 C256 D128 R4": lsh(BF16, 256, 128, 4),
        "lsh bf16 C64 D64 dropout": lsh(BF16, 64, 64, **dropout),
        "lsh fp16 C32 D32, every option": lsh(FP16, 32, 32, 2, **every),
        "lsh bf16 C64 D64 R4, union": lsh(BF16, 64, 64, 4, allow_duplicate_attention=False),
        "lsh fp32 C64 D64": lsh(FP32, 64, 64),
        "local bf16 C64 D64": local(BF16, 64, 64),
        "local bf16 C128 D128": local(BF16, 128, 128),
        "local fp32 C128 D128": local(FP32, 128, 128),
    }


def others() -> dict[str, Callable[[], Any]]:
    """What is compiled besides attention, by name."""
    seed, mask = torch.tensor(1), torch.ones(1, 256, dtype=torch.bool)
    order = torch.zeros(1, 2, 4, 4096, dtype=torch.int16)
    logits, labels = torch.zeros(512, 320, dtype=BF16, requires_grad=True), torch.zeros(512, dtype=torch.int64)
    step = [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 1, 129, dtype=torch.int64)]

    def hashes(dtype: torch.dtype, D: int, factors: list[int]) -> Callable[[], Any]:
        rotations = torch.zeros(2, D, 4, sum(factors) // 2, dtype=dtype)
        return lambda: hashing.hash_vectors(_rows(dtype, 256, D, 1)[0], rotations, factors, mask)

    def streams() -> None:
        x = torch.zeros(2, 64, 64)
        add_streams(x, x, x.to(BF16), True, x, x)

    return {
        "hash bf16 D64, 64 x 128 buckets": hashes(BF16, 64, [64, 128]),
        "hash fp32 D128, 512 buckets": hashes(FP32, 128, [512]),
        "counting sort": lambda: sorting._by_counting(order),
        "cross-entropy bf16, 320 classes": lambda: loss.cross_entropy_sum(logits, labels).backward(),
        "dropout bf16": lambda: randomness.dropout(torch.zeros(64, 512, dtype=BF16), 0.1, seed),
        "residual addition": streams,
        "decoding bf16 D64": lambda: decoding.attend_at(
            torch.zeros(2, 1, 2, 64, dtype=BF16), torch.zeros(2, 2, 300, 128, dtype=BF16), *step, step[1] == 0
        ),
    }


def table(jobs: dict[str, Callable[[], None]], capabilities: list[int]) -> list[dict[str, Any]]:
    """Compile all launches of all jobs."""
    rows = []
    for (name, job), capability in itertools.product(jobs.items(), capabilities):
        launches: dict[str, Launch] = {}
        for launch in recorded(job, capability):
            flags = [flag for flag in ("AS_KEYS", "AS_QUERIES", "ADD_Q", "LAST_Q") if launch.arguments.get(flag)]
            launches[" ".join([launch.kernel.__name__, *flags])] = launch
        for kernel, launch in launches.items():
            made = compile_for(launch, capability)
            block = launch.arguments.get("BLOCK")
            row = {"job": name, "kernel": kernel, "tile": block, "arch": ARCHITECTURES[capability], **launch.options}
            rows.append({**row, **made})
            print(" | ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


if __name__ == "__main__":
    assert not _launch.INTERPRETED, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", help="some of the jobs, by name; all without any")
    parser.add_argument("--capability", type=int, choices=ARCHITECTURES, help="one of the architectures; all without")
    wanted = parser.parse_args()
    everything = {**attentions(), **others()}
    some = {name: everything[name] for name in wanted.jobs or everything}
    found = table(some, [wanted.capability] if wanted.capability else list(ARCHITECTURES))
    print(json.dumps({"triton": triton.__version__, "rows": found}))
