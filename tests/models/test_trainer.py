"""The models under ``transformers.Trainer``: evaluation with metrics, and accumulation that keeps the loss right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from tests.models.builders import CLASSES, build, ids

LENGTH = 21


class Rows(Dataset):
    """A fixed list of examples."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def rows_for(name: str, count: int = 5) -> Rows:
    rows: list[dict[str, Any]] = []
    for seed in range(count):
        tokens = ids(1, LENGTH, seed)[0]
        labels = tokens.clone()
        labels[: 3 * seed] = -100  # another number of labels in every row
        if name == "ReformerForSequenceClassification":
            rows.append({"input_ids": tokens, "labels": seed % 2})
        elif name == "ReformerForQuestionAnswering":
            rows.append({"input_ids": tokens, "start_positions": seed, "end_positions": seed + 2})
        else:
            rows.append({"input_ids": tokens, "labels": labels})
    return Rows(rows)


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    quiet |= {"dataloader_pin_memory": False, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return TrainingArguments(output_dir=str(folder), **{**quiet, **options})


@pytest.mark.parametrize("name", CLASSES[1:])
def test_evaluation_hands_metrics_the_logits_alone(name, tmp_path):
    model = build(name, num_labels=2, use_cache=True)
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"seen": 1.0}

    data = rows_for(name)
    trainer = Trainer(
        model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=data, compute_metrics=metrics
    )
    result = trainer.evaluate()
    assert result["eval_seen"] == 1.0
    assert np.isfinite(result["eval_loss"])
    (prediction,) = seen
    with torch.no_grad():
        wanted = model(torch.stack([row["input_ids"] for row in data.rows]))
    if name == "ReformerForQuestionAnswering":
        parts = list(zip(prediction.predictions, (wanted.start_logits, wanted.end_logits), strict=True))
    else:
        assert isinstance(prediction.predictions, np.ndarray)
        parts = [(prediction.predictions, wanted.logits)]
    for actual, expected in parts:
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ReformerModelWithLMHead", "ReformerForMaskedLM"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, tmp_path):
    """Rows have different numbers of labels, so a mean of means would be wrong: ``num_items_in_batch`` must count."""
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        model = build(name).double()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        Trainer(model, arguments(tmp_path, learning_rate=0.1, **options), train_dataset=rows_for(name, 4)).train()
        weights.append({key: value.detach().clone() for key, value in model.named_parameters()})
    whole, accumulated = weights
    start = dict(build(name).double().named_parameters())
    for key in whole:
        assert (whole[key] - start[key]).abs().max() > 1e-7, key
        assert torch.allclose(accumulated[key], whole[key], rtol=1e-7, atol=1e-9), key
