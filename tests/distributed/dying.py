"""Two ranks of one run, of which one meets a fault.

Run as a script with a plan (JSON). Alone it forks the ranks, so that everything is imported once; under torchrun it is
a rank. Each rank leaves a line about its end in `PLACE/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 2


def rank_of_a_run(plan: dict[str, Any]) -> int:
    """Train as one rank; rank 1 meets the fault of the plan after so many steps. Return the exit status."""
    import torch
    from transformers import TrainerCallback

    from flash_reformer.training import train
    from flash_reformer.training.trainer import TaskTrainer

    torch.set_num_threads(1)
    rank, fault, step = int(os.environ["RANK"]), plan.get("fault"), plan.get("step")
    # A process that a launcher has started again is in good health.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        fault = None

    class Fault(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == step and fault in ("SIGKILL", "SIGTERM"):
                os.kill(os.getpid(), getattr(signal, fault))

    real = TaskTrainer.compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, model, *args, **kwargs)
        spoilt = rank == 1 and model.training and self.state.global_step == step and fault == "nan"
        return loss * float("nan") if spoilt else loss

    TaskTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        train("clm", plan["asked"], plan["model"], auto_resume=True, callbacks=[Fault()])
        said = "ended"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    line = {"said": said, "seconds": time.monotonic() - began}
    Path(plan["place"], f"rank-{rank}.json").write_text(json.dumps(line), encoding="utf-8")
    return 0 if said == "ended" else 3


def forked_ranks(plan: dict[str, Any]) -> None:
    """Fork the ranks and wait for them; none may take longer than two minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            signal.alarm(120)
            os._exit(rank_of_a_run(plan))
        children.append(child)
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            line = {"said": signal.Signals(os.WTERMSIG(status)).name, "seconds": 0.0}
            Path(plan["place"], f"rank-{rank}.json").write_text(json.dumps(line), encoding="utf-8")


if __name__ == "__main__":
    plans = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        sys.exit(rank_of_a_run(plans[0]))
    import flash_reformer.training  # noqa: F401  # imported once, before the forks

    for each in plans:
        Path(each["place"]).mkdir()
        forked_ranks(each)
