"""Recipes on two ranks do what one process does with the same batches, and fail as one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments

from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.training import ranks, recipes
from flash_reformer.training.budget import Budget
from flash_reformer.training.settings import CausalSettings
from tests.distributed.processes import start_ranks

RANKS = 2
#: Nothing is dropped and rotations are fixed, so that a row means the same on every rank.
MODEL: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 24,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "num_buckets": 4,
    "hash_seed": 5,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}
STEPS = 4
#: What two ranks are asked for; one process takes batches of two.
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, unused": {"find_unused_parameters": True, "gradient_accumulation": 2},
    "ddp, static": {"static_graph": True, "gradient_accumulation": 2},
    "fsdp": {"parallel": "fsdp", "keep": "best"},
    "fsdp, offloaded": {"parallel": "fsdp", "cpu_offload": True, "gradient_accumulation": 2},
}
#: What rounding leaves of the weights' way, after the steps of AdamW, which divides by small numbers.
BOUND = 1e-4


def settings(folder: str, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "text": (f"{folder}/text.txt",),
        "output": f"{folder}/{name}",
        "seq_len": 48,
        "max_steps": STEPS,
        "warmup_steps": 0,
        "log_interval": 1,
        "save_interval": 2,
        "eval_interval": 2,
        "eval_sequences": 3,
        "sample_tokens": 2,
        "cpu": True,
        **changes,
    }


class Watch(TrainerCallback):
    """Notes what a run looks like from inside."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = getattr(kwargs["model"], "module", kwargs["model"]).reformer.encoder.layers
        self.seen = {"seed": torch.initial_seed(), "units": sum(isinstance(layer, FSDPModule) for layer in layers)}


def uneven_rows() -> list[dict[str, Tensor]]:
    """Rows of which every second has few labels: a mean of ranks' means is not the mean of all."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(30, (48,), generator=generator) for _ in range(8)]
    return [
        {"input_ids": r, "labels": torch.where(torch.arange(48) > 40 * (i % 2), r, -100)} for i, r in enumerate(rows)
    ]


def uneven(folder: str, batch_size: int) -> dict[str, Tensor]:
    """Weights after training on rows with uneven labels, by the plain Trainer."""
    torch.manual_seed(0)
    shape = {"axial_pos_shape": (4, 16), "axial_pos_embds_dim": (8, 8), "vocab_size": 30, "is_decoder": True}
    model = ReformerModelWithLMHead(ReformerConfig(**MODEL, **shape))
    arguments = TrainingArguments(
        output_dir=f"{folder}/uneven",
        per_device_train_batch_size=batch_size,
        max_steps=3,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=uneven_rows()).train()
    return model.state_dict()


def said(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    facts: dict[str, Any] = {}
    for name, changes in RUNS.items():
        watch = Watch()
        reports: list[Any] = []
        asked = settings(folder, name, **changes)
        result = recipes.train("clm", asked, MODEL, report=reports.append, callbacks=[watch])
        facts[name] = {**watch.seen, "reports": len(reports), "tokens": result.metrics["tokens"]}
    for name in ("ddp", "fsdp"):
        shutil.copytree(Path(folder, name), Path(folder, f"{name}, resumed {rank}"))
        ranks.barrier()
        at = Path(folder, f"{name}, resumed 0")
        if rank == 0:
            shutil.rmtree(at / f"checkpoint-{STEPS}")
            (at / "model.safetensors").unlink()
        ranks.barrier()
        recipes.resume({"output": str(at)})
    # Rank 1 would stop first by its own clock, and rank 0 goes on: they must stop together.
    timed = settings(folder, "timed", max_minutes=0.005, max_steps=None, eval_interval=None)
    facts["timed"] = recipes.train("clm", timed, MODEL).metrics["steps"]
    facts["taken"] = said(lambda: recipes.train("clm", settings(folder, "ddp"), MODEL))
    missing = settings(folder, "missing", text=(f"{folder}/text.txt" if rank == 0 else f"{folder}/none.txt",))
    facts["missing"] = said(lambda: recipes.train("clm", missing, MODEL))
    weights = uneven(folder, 1)
    if rank == 0:
        torch.save(weights, f"{folder}/uneven.pt")
    Path(folder, f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    words = torch.randint(5, (3000,), generator=torch.Generator().manual_seed(0))
    text = " ".join(["chop", "sort", "hash", "attend", "reverse"][word] for word in words.tolist())
    (folder / "text.txt").write_text(text, encoding="utf-8")
    start_ranks(on_a_rank, RANKS, str(folder))
    return folder


def facts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text("utf-8")) for rank in range(RANKS)]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_way(found: dict[str, Tensor], expected: dict[str, Tensor], names: Sequence[str] = ()) -> None:
    assert found.keys() == expected.keys()
    off = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert off.abs().max() <= BOUND * 3e-3, off.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_weights_are_those_of_one_process(name: str, of_ranks: Path) -> None:
    accumulation = RUNS[name].get("gradient_accumulation", 1)
    alone = of_ranks / f"alone {accumulation}"
    if not alone.exists():
        changes = {"batch_size": RANKS, "gradient_accumulation": accumulation}
        recipes.train("clm", settings(str(of_ranks), alone.name, **changes), MODEL)
    expected, found = (json.loads((at / "metrics.json").read_text("utf-8")) for at in (alone, of_ranks / name))
    assert_same_way(weights_of(of_ranks / name), weights_of(alone))
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-5)
    assert found["held_out_loss"] < 0.99 * found["history"][0]["eval_loss"]
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == STEPS
    assert found["tokens"] == expected["tokens"] == STEPS * RANKS * accumulation * 48


@pytest.mark.slow
def test_rank_0_alone_reports_and_each_rank_has_its_seed(of_ranks: Path) -> None:
    first, second = facts_of(of_ranks)
    for name, asked in RUNS.items():
        assert first[name]["reports"] > STEPS
        assert second[name]["reports"] == 0
        assert second[name]["seed"] == first[name]["seed"] + 1
        assert first[name]["tokens"] == second[name]["tokens"]
        assert first[name]["units"] == (len(MODEL["attn_layers"]) if "parallel" in asked else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_resumed_run_ends_as_an_undisturbed_one(name: str, of_ranks: Path) -> None:
    shards = of_ranks / name / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0"
    # Each rank has written its part.
    assert len(list(shards.glob("*.distcp"))) == (RANKS if name == "fsdp" else 0)
    found, expected = (weights_of(of_ranks / at) for at in (f"{name}, resumed 0", name))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_ranks_stop_together_by_the_clock(of_ranks: Path) -> None:
    first, second = facts_of(of_ranks)
    assert first["timed"] == second["timed"] > 0


@pytest.mark.slow
def test_ranks_fail_together(of_ranks: Path) -> None:
    first, second = facts_of(of_ranks)
    assert first["taken"].startswith("ValueError: --output")
    assert second["taken"].startswith("ElsewhereError: rank 0 has failed: ValueError: --output")
    assert first["missing"].startswith("ElsewhereError: rank 1 has failed: ")
    assert second["missing"].split(": ")[0] in ("ValueError", "FileNotFoundError")
    assert "none.txt" in second["missing"]


@pytest.mark.slow
def test_every_label_counts_alike_whichever_rank_has_it(of_ranks: Path, tmp_path: Path) -> None:
    assert_same_way(torch.load(of_ranks / "uneven.pt", weights_only=True), uneven(str(tmp_path), RANKS))


def test_a_budget_goes_by_the_clock_of_rank_0() -> None:
    budget = Budget(None, 1.0)
    budget.start()
    budget.agree(lambda seconds: 30.0)
    assert budget.fraction(7) == 0.5
    by_steps = Budget(10, None)
    by_steps.agree(lambda seconds: pytest.fail("there is nothing to agree on"))
    assert by_steps.fraction(5) == 0.5


@pytest.mark.parametrize("changes", [{"find_unused_parameters": True}, {"static_graph": True}, {"parallel": "fsdp"}])
def test_what_is_about_ranks_needs_a_launcher(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 500, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} .* is about ranks: start the run with torchrun"):
        recipes.train("clm", settings(str(tmp_path), "run", **changes), MODEL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu_offload": True}, "cpu_offload True is about --parallel fsdp, which is not given"),
        ({"parallel": "fsdp", "static_graph": True}, "static_graph True is about --parallel ddp only"),
    ],
)
def test_flags_of_the_other_engine_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalSettings(output="x", text=("x",), max_steps=1, **changes).check_complete()
    with pytest.raises(ValueError, match="parallel must be one of ddp, fsdp, got 'zero'"):
        CausalSettings(parallel="zero")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0"}, "asks for FSDP .* choose with --parallel"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}, "asks for DeepSpeed"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but LOCAL_RANK is not set: start with torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes and started one",
        ),
    ],
)
def test_launchers_that_cannot_be_followed_are_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks.check_launcher()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ranks.check_launcher()
