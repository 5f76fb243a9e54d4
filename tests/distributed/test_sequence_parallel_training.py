"""Sequence parallelism under the Trainer: groups of ranks train to what one process comes to with their batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from flash_reformer.training import ranks
from flash_reformer.training.budget import Budget
from flash_reformer.training.building import build_model
from flash_reformer.training.recipes import train_clm
from flash_reformer.training.sharing import stop_sharing
from flash_reformer.training.signals import StopRequest
from flash_reformer.training.tasks import TASKS
from flash_reformer.training.trainer import TaskTrainer
from flash_reformer.training.vocabulary import Vocabulary
from tests.distributed.processes import start_ranks
from tests.training.runs import QUICK, TINY

RANKS, SHARED = 4, 2
#: Five held-out rows: the last batch of two groups of ranks is filled up.
SETTINGS: dict[str, Any] = {**QUICK, "seq_len": 45, "max_steps": 2, "eval_sequences": 5, "max_grad_norm": 0.1}
#: What ranks drop is not what one process drops.
FIELDS: dict[str, Any] = {
    **TINY,
    "hash_seed": 3,
    "hidden_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}


def run(folder: Path, name: str = "clm", **changes: Any) -> dict[str, torch.Tensor]:
    """Train, and return the weights, how far they have come, and the held-out losses."""
    asked = {**SETTINGS, "text": (str(folder / "text.txt"),), **changes}
    if name != "clm":
        del asked["sample_tokens"]
    settings = TASKS[name].settings_class(**asked)
    task = TASKS[name](settings, Vocabulary.of_bytes())
    model = build_model(task, FIELDS)
    trainer = TaskTrainer(task, Budget(settings.max_steps, None, 0.0), StopRequest(), model=model)
    before = parameters_to_vector(model.parameters()).detach().clone()
    trainer.train()
    stop_sharing(model, settings.sequence_parallel)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    weights = parameters_to_vector(model.parameters()).detach()
    return {"losses": torch.tensor(losses), "weights": weights, "way": weights - before}


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # As torchrun says it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = run(Path(folder), output=str(Path(folder, "ranks")), sequence_parallel=SHARED)
    torch.save(found, Path(folder, f"{rank}.pt"))
    # Words are masked at random, by each rank in its own way were they not told.
    masked = {"batch_size": 1, "keep": "last", "sequence_parallel": SHARED}
    run(Path(folder), "mlm", output=str(Path(folder, "masked")), **masked)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_groups_of_ranks_train_as_one_process_does_with_larger_batches(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {n} of a text that repeats itself\n" for n in range(120)))
    start_ranks(on_a_rank, RANKS, str(tmp_path))
    expected = run(tmp_path, output=str(tmp_path / "one"), batch_size=RANKS // SHARED)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0.0)
        # Adam makes steps of a common size, even of gradients that are little more than rounding.
        assert (found["weights"] - expected["weights"]).norm() <= 1e-2 * expected["way"].norm()


@pytest.mark.parametrize(
    ("processes", "shared", "heads", "said"),
    [
        (1, 2, 2, "sequence_parallel must divide the number of processes, 1; got 2: start as many with torchrun"),
        (3, 2, 2, "sequence_parallel must divide the number of processes, 3; got 2"),
        (3, 3, 2, "sequence_parallel must divide the model's num_attention_heads, 2; got 3"),
        (1, 0, 2, "sequence_parallel must be at least 1, got 0"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_anything_is_written(
    processes: int, shared: int, heads: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    output = tmp_path / "run"
    settings = {**QUICK, "text": (str(tmp_path / "text.txt"),), "output": str(output), "sequence_parallel": shared}
    with pytest.raises(ValueError, match=said):
        train_clm(settings, {**TINY, "num_attention_heads": heads})
    assert not output.exists()
