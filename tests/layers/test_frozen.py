"""Whatever is frozen, the rest trains (FAULTS F9): embeddings, inputs, single layers, all but the head, adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.layers.tools import assert_gradients_match, assert_pair_agrees, make_batch, make_mask, make_pair, take_step

EXACT = 1e-9


def freeze_embeddings(model: nn.Module) -> None:
    model.reformer.embeddings.requires_grad_(False)


def freeze_layers(*indices: int) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for index in indices:
            model.reformer.encoder.layers[index].requires_grad_(False)

    return freeze


def freeze_bottom(model: nn.Module) -> None:
    """Embeddings and two layers: the chain begins above them."""
    freeze_embeddings(model)
    freeze_layers(0, 1)(model)


def freeze_all_but_head(model: nn.Module) -> None:
    model.reformer.requires_grad_(False)


def freeze_all_but_one_matrix(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.reformer.encoder.layers[1].attention.self_attention.value.requires_grad_(True)


def freeze_half_of_each_layer(model: nn.Module) -> None:
    for index, layer in enumerate(model.reformer.encoder.layers):
        (layer.attention if index % 2 else layer.feed_forward).requires_grad_(False)


FREEZES: dict[str, Callable[[nn.Module], None]] = {
    "embeddings": freeze_embeddings,
    "bottom layer": freeze_layers(0),
    "middle layers": freeze_layers(1, 2),
    "top layer": freeze_layers(3),
    "every layer": freeze_layers(0, 1, 2, 3),
    "embeddings and bottom layers": freeze_bottom,
    "embeddings and every layer": freeze_all_but_head,
    "all but one matrix": freeze_all_but_one_matrix,
    "half of each layer": freeze_half_of_each_layer,
}


def make_deep_pair() -> tuple[nn.Module, nn.Module]:
    return make_pair(torch.float64, attn_layers=["local", "lsh", "local", "lsh"])


@pytest.mark.parametrize("what", FREEZES)
def test_f9_frozen_parts_stop_nothing_else(what: str) -> None:
    pair = make_deep_pair()
    everything = take_step(pair[1], **make_batch(43))
    for model in pair:
        FREEZES[what](model)
    step = assert_pair_agrees(pair, EXACT, **make_batch(43), attention_mask=make_mask("left", 43))
    assert 0 < len(step.grads) < len(everything.grads)


def test_frozen_for_a_while() -> None:
    """Freezing between two forwards concerns the second one only."""
    pair = make_deep_pair()
    layer = "reformer.encoder.layers.1."
    grads = []
    for model in pair:
        torch.manual_seed(7)
        first = model(**make_batch()).loss
        model.get_submodule(layer[:-1]).requires_grad_(False)
        second = model(**make_batch(seed=2)).loss
        second.backward()
        assert not any(name.startswith(layer) and p.grad is not None for name, p in model.named_parameters())
        model.get_submodule(layer[:-1]).requires_grad_(True)
        first.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_gradients_match(*grads, EXACT)


@pytest.mark.parametrize("length", [48, 43])
def test_inputs_embeds_without_a_gradient(length: int) -> None:
    """Every parameter of the encoder gets its gradient although nothing below asks for one."""
    pair = make_deep_pair()
    embeds = torch.randn(2, length, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = {"inputs_embeds": embeds, "labels": make_batch(length)["labels"]}
    reversible, plain = (take_step(model, **inputs) for model in pair)
    assert torch.equal(reversible.loss, plain.loss)
    expected = {name for name, _ in pair[0].named_parameters() if "word_embeddings" not in name}
    # A padded batch takes the pad token's embedding, which nobody reads: its gradient is zero.
    for step in (reversible, plain):
        unread = step.grads.pop("reformer.embeddings.word_embeddings.weight", None)
        assert unread is None or length == 43
    assert_gradients_match(reversible.grads, plain.grads, EXACT, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_embeds_with_a_gradient(frozen: bool) -> None:
    """Also where they are all that wants one."""
    grads = []
    for model in make_deep_pair():
        model.requires_grad_(not frozen)
        embeds = torch.randn(2, 48, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        embeds.requires_grad_()
        take_step(model, inputs_embeds=embeds, labels=make_batch()["labels"])
        grads.append({"embeds": embeds.grad})
    # Nobody judges what the last token predicts, and in a causal model nobody else reads it.
    assert grads[0]["embeds"][:, :-1].norm(dim=-1).min() > 0
    assert_gradients_match(*grads, EXACT)


class Adapter(nn.Module):
    """LoRA around a linear layer: ``W x + B A dropout(x)``."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


def add_adapters(model: nn.Module) -> int:
    generator = torch.Generator().manual_seed(5)
    model.requires_grad_(False)
    linear = [(name, module) for name, module in model.reformer.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linear:
        parent, _, child = name.rpartition(".")
        setattr(model.reformer.get_submodule(parent), child, Adapter(module, generator))
    return len(linear)


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_f9_adapters_train(chunk_size: int) -> None:
    """Layers call their sub-modules, so whatever stands in their place runs, with a dropout of its own."""
    pair = make_pair(torch.float64, chunk_size_feed_forward=chunk_size)
    numbers = [add_adapters(model) for model in pair]
    step = assert_pair_agrees(pair, EXACT, **make_batch())
    # Two matrices for each of the projections: 4, 3 and 4 of attention, 2 of each feed-forward.
    assert numbers == [17, 17]
    assert len(step.grads) == 2 * 17


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_f9_peft_trains() -> None:
    import peft  # here, since the oldest supported environment does without

    grads = []
    for model in make_pair(torch.float64):
        torch.manual_seed(3)
        # A pattern, since containers are called "dense" as well.
        targets = r".*\.(query_key|query|key|value|dense\.dense|output\.dense)"
        lora = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora).double()
        grads.append(take_step(adapted, **make_batch()).grads)
    assert len(grads[0]) == 2 * 17
    assert_gradients_match(*grads, EXACT)
