"""Memory: what a training step stores, and that its peak does not grow with depth."""

from __future__ import annotations

import gc
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from benchmarks.depth_memory import measure_in_subprocess
from tests.layers.tools import BATCH, loss_of, make_batch, make_model

MB = 2**20
LENGTH, ROUNDS, HEADS, HIDDEN = 96, 2, 3, 12
#: One stream of fp32 numbers.
STREAM = BATCH * LENGTH * HIDDEN * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' peak of resident memory")
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth() -> None:
    """6 against 24 layers in fresh processes; one stream kept per layer would add 18 MB, plain autograd far more."""
    shallow, deep = (measure_in_subprocess(layers, True) for layers in (6, 24))
    allowance = deep["allowed_to_grow"] - shallow["allowed_to_grow"]
    growth = deep["peak"] - shallow["peak"]
    slack = 9 * MB  # allocator and interpreter; half of what one stream per layer would take
    assert shallow["peak"] > shallow["before"] + 20 * MB, "the step itself must set the peak"
    assert growth <= allowance + slack, f"grew by {growth / MB:.1f} MB, {allowance / MB:.1f} MB are allowed"
    shallow, deep = (measure_in_subprocess(layers, False) for layers in (6, 24))
    assert deep["peak"] - shallow["peak"] > 5 * (allowance + slack), "the bound would hold anything"


def stored_bytes(model: nn.Module, **inputs: object) -> int:
    """What one forward leaves for its backward, besides the weights and the batch."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            stored[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model, **inputs)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())


@pytest.mark.parametrize("kind", ["local", "lsh"])
def test_a_layer_stores_no_activations(kind: str) -> None:
    """An LSH layer keeps two bytes per position, head and round: its buckets. A local one keeps nothing."""

    def stored(depth: int, reversible: bool) -> int:
        model = make_model(attn_layers=[kind] * depth, num_hashes=ROUNDS, reversible=reversible)
        return stored_bytes(model, **make_batch(LENGTH))

    buckets = 2 * BATCH * HEADS * ROUNDS * LENGTH if kind == "lsh" else 0
    assert stored(12, True) - stored(4, True) == 8 * buckets
    assert buckets <= 4 * BATCH * HEADS * ROUNDS * LENGTH
    assert stored(12, False) - stored(4, False) > 8 * 10 * STREAM


def test_f11_training_keeps_no_cache() -> None:
    """``use_cache=True``, the configuration's default, stores nothing per layer."""
    sizes = {}
    for use_cache in (True, False):
        model = make_model(use_cache=use_cache, attn_layers=["lsh"] * 3)
        sizes[use_cache] = stored_bytes(model, **make_batch(LENGTH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may say so
            output = model(**make_batch(LENGTH), use_cache=use_cache)
        assert output.past_buckets_states is None
    assert sizes[True] == sizes[False] > 0


@pytest.mark.parametrize("count", [1, 3])
def test_returned_states_are_stored_and_nothing_more(count: int) -> None:
    """Asking for hidden states stores each pair and its low parts once per layer."""
    depth = 2 * count
    model = make_model(attn_layers=["lsh", "local"] * count)
    plain = stored_bytes(model, **make_batch(LENGTH))
    asked = stored_bytes(model, **make_batch(LENGTH), output_hidden_states=True)
    # The last pair is stored once more, as the concatenation that the model goes on with.
    assert 0 < asked - plain <= 4 * STREAM * depth


def live() -> dict[int, int]:
    """Bytes of every storage that a tensor holds, by address."""
    gc.collect()
    # Fake tensors that other tests have left hold nothing.
    tensors = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def live_after_backward(times: int) -> int:
    """Bytes of tensors that a graph, walked so many times and kept, has added to those of other tests."""
    before = live()
    model = make_model(attn_layers=["lsh", "local"] * 2)
    loss = loss_of(model, **make_batch(LENGTH))
    for _ in range(times):
        loss.backward(retain_graph=True)
    after = live()
    assert loss.grad_fn is not None
    return sum(after.values()) - sum(before.values())


def test_walking_a_graph_again_keeps_no_more() -> None:
    """What a backward rebuilds, it drops."""
    live_after_backward(1)
    once = live_after_backward(1)
    assert live_after_backward(4) == once > 0
