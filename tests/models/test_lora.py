"""LoRA through ``peft``: adapters train, merge, and come back from disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import flash_reformer as ours
from tests.models.builders import assert_close, build, ids
from tests.models.test_trainer import arguments, rows_for

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name

TARGETS = ["query_key", "query", "key", "value", "dense"]
TASKS = {"ReformerModelWithLMHead": "CAUSAL_LM", "ReformerForSequenceClassification": "SEQ_CLS"}
#: Local: query, key, value, output; LSH: query_key, value, output; two of each feed-forward.
ADAPTERS = 4 + 3 + 2 * 2


def adapt(name: str, *, dropout: float = 0.0, seed: int = 0, targets: Any = TARGETS, **changes: Any) -> Any:
    import peft  # here, since the oldest supported environment does without

    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=dropout, target_modules=targets, task_type=TASKS[name])
    return peft.get_peft_model(build(name, num_labels=2, **changes), lora)


def batch(name: str) -> dict[str, Tensor]:
    tokens = ids(3, 37)
    labels = tokens if name == "ReformerModelWithLMHead" else torch.tensor([0, 1, 1])
    return {"input_ids": tokens, "labels": labels}


def adapter_weights(model: Any) -> dict[str, Tensor]:
    found = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    assert len(found) >= 2 * ADAPTERS
    assert all(value.requires_grad for value in found.values())
    return found


def take_steps(model: Any, steps: int, lr: float = 0.1) -> list[dict[str, Tensor]]:
    """Plain gradient descent; the gradients of every step."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer, seen = torch.optim.SGD(trained, lr=lr), []
    name = type(model.get_base_model()).__name__
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        model.train()(**batch(name)).loss.backward()
        seen.append({key: value.grad.clone() for key, value in adapter_weights(model).items()})
        optimizer.step()
    model.eval()
    return seen


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(ids(2, 41, seed=7)).logits


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", TASKS)
def test_every_adapter_trains(name, dropout):
    model = adapt(name, dropout=dropout)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    first, second = take_steps(model, 2)
    assert len(first) == 2 * ADAPTERS
    for key in first:
        # B starts at zero, so on the first step nothing reaches A.
        assert (first[key].abs().max() > 0) == ("lora_B" in key), key
        assert second[key].abs().max() > 0, key
    after = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("name", TASKS)
def test_reversible_blocks_give_the_gradients_of_plain_autograd(name):
    """With dropout in the adapters and in the model, two steps far, in double precision."""
    drops = {"hidden_dropout_prob": 0.2, "local_attention_probs_dropout_prob": 0.2}
    both = []
    for reversible in (True, False):
        model = adapt(name, dropout=0.3, reversible=reversible, lsh_attention_probs_dropout_prob=0.2, **drops)
        assert model.get_base_model().config.reversible is reversible
        both.append(take_steps(model.double(), 2)[-1])
    for key, expected in both[1].items():
        assert_close(both[0][key], expected, 1e-9, key)


@pytest.mark.parametrize("name", TASKS)
def test_merged_saved_and_reloaded_adapters_compute_the_same(name, tmp_path):
    import peft

    model = adapt(name)
    start = logits(model)
    take_steps(model, 3)
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    build(name, num_labels=2).save_pretrained(tmp_path / "base")
    base = getattr(ours, name).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(base), start)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    merged = model.merge_and_unload()
    assert type(merged) is getattr(ours, name)
    assert merged.state_dict().keys() == build(name, num_labels=2).state_dict().keys()
    assert_close(logits(merged), trained, 1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(getattr(ours, name).from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("name", TASKS)
def test_trainer_trains_adapters_alone(name, tmp_path):
    model = adapt(name, dropout=0.1)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    Trainer(model, arguments(tmp_path, **options), train_dataset=rows_for(name)).train()
    for key, value in model.named_parameters():
        assert torch.equal(value, start[key]) != value.requires_grad, key
    assert sum(value.requires_grad for value in model.parameters()) >= 2 * ADAPTERS


def test_names_of_the_issue_pick_linear_layers_only():
    model = adapt("ReformerModelWithLMHead", targets=["query_key", "value", "dense"])
    picked = model.targeted_module_names
    assert len(picked) == ADAPTERS - 2
    assert {name.rsplit(".", 1)[-1] for name in picked} == {"query_key", "value", "dense"}
    assert any(name.endswith("feed_forward.dense.dense") for name in picked)
    # The container of that name is only left out of the walk over modules.
    layer = build().reformer.encoder.layers[0]
    assert layer.get_submodule("feed_forward.dense").dense is layer.feed_forward.dense.dense
    names = [name for name, _ in layer.named_modules()]
    assert "feed_forward.dense" not in names
    assert "feed_forward.dense.dense" in names
    assert not layer.eval().feed_forward.dense.training
