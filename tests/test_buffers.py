"""Pooled memory: used again when nobody holds it, and only then."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import threading
from typing import Any

import pytest
import torch

from flash_reformer import buffers

SIZE = 3 * 2**18 + 7  # 3 MiB and a little, in fp32


@pytest.fixture(params=[True, False], ids=["huge pages", "ordinary pages"], autouse=True)
def pools(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(buffers, "_has_huge_pages", lambda: False)
    for name, limit in (("_results", 2**24), ("_streams", 0)):
        monkeypatch.setattr(buffers, name, buffers._Pool(limit))


def test_memory_is_used_again_once_nothing_holds_it() -> None:
    first = buffers.empty((SIZE,), torch.float32).fill_(1.0)
    address, view, array = first.data_ptr(), first[5:9], first.numpy()
    del first
    gc.collect()
    second = buffers.empty((SIZE,), torch.float32).fill_(2.0)
    assert second.data_ptr() != address
    assert view.tolist() == [1.0] * 4
    del view
    third = buffers.empty((SIZE,), torch.float32).fill_(3.0)
    assert third.data_ptr() != address
    assert array[0] == 1.0
    del array
    gc.collect()
    assert buffers.empty((SIZE,), torch.float32).data_ptr() == address


def test_zeros_are_zero_whatever_was_there() -> None:
    for _ in range(3):
        found = buffers.zeros((SIZE,), torch.float32)
        assert (found == 0).all()
        found.fill_(float("nan"))
        del found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2**18 + 1, 5), (7, 2**17, 3)], ids=str)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for make in (buffers.empty, buffers.zeros):
        found = make(shape, dtype)
        assert (found.shape, found.dtype) == (shape, dtype)
        assert found.is_contiguous()
    like = buffers.lasting_like(
        torch.zeros(shape, dtype=dtype).mT if len(shape) > 1 else torch.zeros(shape, dtype=dtype)
    )
    assert like.is_contiguous()


def test_the_limit_drops_the_oldest() -> None:
    tensors = [buffers.empty((SIZE + n,), torch.float32) for n in range(8)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    kept = buffers._results._kept
    while tensors:
        del tensors[0]
    gc.collect()
    assert 0 < sum(size for size, _, _ in kept.free) <= 2**24
    assert buffers.empty((SIZE + 7,), torch.float32).data_ptr() == addresses[7]
    assert all(size >= 4 * (SIZE + 2) for size, _, _ in kept.free)


def test_streams_are_kept_only_while_a_chain_is_walked() -> None:
    like = torch.zeros(SIZE)
    for walking in (False, True):
        if walking:
            buffers.begin_walk()
        tensor = buffers.lasting_like(like)
        del tensor
        gc.collect()
        assert len(buffers._streams._kept.free) == int(walking)
    held = buffers.lasting_like(like)
    buffers.end_walk()
    del held
    gc.collect()
    assert buffers._streams._kept.free == []


def test_threads_have_pools_of_their_own() -> None:
    address = []
    tensor = buffers.empty((SIZE,), torch.float32)
    mine = tensor.data_ptr()
    del tensor
    gc.collect()
    thread = threading.Thread(target=lambda: address.append(buffers.empty((SIZE,), torch.float32).data_ptr()))
    thread.start()
    thread.join()
    assert address != [mine]


def _write(queue: Any) -> None:
    held[0][:4].fill_(7.0)  # few, or the pool of threads that did not survive the fork would be waited for
    queue.put(held[0][:1].tolist())


held: list[torch.Tensor] = []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_writes_for_itself() -> None:
    held[:] = [buffers.empty((SIZE,), torch.float32).fill_(1.0)]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_write, args=(queue,))
    process.start()
    assert queue.get() == [7.0]
    process.join()
    assert (held[0] == 1.0).all()
    held.clear()


def test_tensors_copy_and_pickle_like_others() -> None:
    tensor = buffers.empty((SIZE,), torch.float32).fill_(4.0)
    data = pickle.dumps(tensor)
    assert len(data) < 5 * SIZE
    assert torch.equal(pickle.loads(data), tensor)
