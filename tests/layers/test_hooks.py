"""Hooks on modules inside reversible layers keep working, and layers never make the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.layers.tools import MIXES, make_batch, make_call, make_mask, make_model, make_pair, relative_error, take_step

EXACT = 1e-9
#: One module of each kind, by its place in a layer of an LSH model.
INSIDE = [
    "attention",
    "attention.layer_norm",
    "attention.self_attention.query_key",
    "attention.output.dense",
    "feed_forward",
    "feed_forward.dense.dense",
    "feed_forward.output",
]


def module_in(model: nn.Module, path: str) -> nn.Module:
    return model.reformer.encoder.layers[1].get_submodule(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", INSIDE)
def test_full_backward_hooks_see_the_gradients_of_plain_autograd(path: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    for model in make_pair(torch.float64):

        def record(module: nn.Module, grad_input: tuple[Any, ...], grad_output: tuple[Any, ...]) -> None:
            seen.append((grad_input[0], grad_output[0]))

        module_in(model, path).register_full_backward_hook(record)
        take_step(model, **make_batch())
    assert len(seen) == 2
    for value, expected in zip(*seen, strict=True):
        assert expected.norm() > 0
        assert relative_error(value, expected) <= EXACT


def test_full_backward_hooks_may_change_gradients() -> None:
    grads = []
    for model in make_pair(torch.float64):
        hook = module_in(model, "feed_forward").register_full_backward_hook(lambda *a: (3 * a[1][0],))
        grads.append(take_step(model, **make_batch()).grads)
        hook.remove()
        grads.append(take_step(model, **make_batch()).grads)
    name = "reformer.encoder.layers.0.feed_forward.output.dense.weight"
    hooked, unhooked, plain_hooked, plain_unhooked = (g[name] for g in grads)
    assert relative_error(hooked, plain_hooked) <= EXACT
    assert relative_error(unhooked, plain_unhooked) <= EXACT
    assert relative_error(hooked, unhooked) > 0.1


@pytest.mark.parametrize("path", INSIDE[1:])
def test_forward_hooks_may_change_outputs(path: str) -> None:
    """They run in the forward and again in the replay, on the same numbers."""
    results = []
    for model in make_pair(torch.float64):
        outputs: list[Tensor] = []

        def double(module: nn.Module, args: Any, out: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(out.detach().clone())
            return 2 * out

        unhooked = take_step(model, **make_batch())
        module_in(model, path).register_forward_hook(double)
        hooked = take_step(model, **make_batch())
        assert not torch.equal(hooked.loss, unhooked.loss)
        results.append((outputs, hooked))
    (outputs, hooked), (plain_outputs, plain_hooked) = results
    assert len(outputs) == 2
    assert len(plain_outputs) == 1
    assert torch.equal(outputs[0], plain_outputs[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for name, grad in plain_hooked.grads.items():
        assert relative_error(hooked.grads[name], grad) <= EXACT


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_hooks_of_parameters_run_once_with_the_whole_gradient(chunk_size: int) -> None:
    """They may change it, so a second run on parts of it would be wrong in silence."""
    found = []
    for model in make_pair(torch.float64, chunk_size_feed_forward=chunk_size):
        weight = module_in(model, "feed_forward.dense.dense").weight
        unhooked = take_step(model, **make_batch()).grads
        calls: list[Tensor] = []

        def halve(grad: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(grad.clone())
            return grad / 2

        handle = weight.register_hook(halve)
        weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(p.grad.clone()))
        hooked = take_step(model, **make_batch()).grads
        assert len(calls) == 2
        name = "reformer.encoder.layers.1.feed_forward.dense.dense.weight"
        assert relative_error(2 * hooked[name], unhooked[name]) <= EXACT
        handle.remove()
        assert relative_error(take_step(model, **make_batch()).grads[name], unhooked[name]) <= EXACT
        found.append(calls[:2])
    for value, expected in zip(*found, strict=True):
        assert expected.norm() > 0
        assert relative_error(value, expected) <= EXACT


class NoSynchronisation(TorchDispatchMode):
    """Raise where a GPU would have to be waited for: a value read by the host, or a shape that depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "_unique2",
        "unique_dim",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen += 1
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in self.WAITING or by_mask:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
    ],
    ids=["item", "bool", "nonzero", "boolean index", "masked_select", "boolean write"],
)
def test_the_watch_finds_a_planted_wait(planted: Any) -> None:
    with NoSynchronisation(), pytest.raises(AssertionError, match="makes the host wait"):
        planted(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        *({"attn_layers": layers} for layers in MIXES.values()),
        {"wrap_around": False, "lsh_attend_across_buckets": False, "lsh_allow_duplicate_attention": False},
        {"chunk_size_feed_forward": 7, "hash_seed": 3},
        {"lsh_attn_chunk_length": None},
    ],
    ids=str,
)
def test_layers_never_make_the_host_wait(changes: dict[str, Any], masked: bool, reversible: bool) -> None:
    """Inside the stack, forward and backward; what is checked at the model's door runs on CPU tensors only."""
    model = make_model(reversible=reversible, **changes)
    encoder = model.reformer.encoder
    embeds = torch.randn(2, 48, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    call = make_call(mask_BT=make_mask("scattered").bool() if masked else None)
    head_masks = [torch.rand(3) for _ in encoder.layers]
    with NoSynchronisation() as watch:
        both, states, _ = encoder(embeds, call, head_masks, True, False)
        forward = watch.seen
        (both.square().sum() + states[1].sum()).backward()
    assert 0 < 1.5 * forward < watch.seen
    assert embeds.grad.norm() > 0


def test_attention_maps_never_make_the_host_wait() -> None:
    encoder = make_model().reformer.encoder
    embeds = torch.randn(2, 48, 12, generator=torch.Generator().manual_seed(1))
    with NoSynchronisation():
        _, _, probs = encoder(embeds, make_call(), [None] * 3, False, True)
        sum(p.square().sum() for p in probs).backward()
    assert len(probs) == 3
