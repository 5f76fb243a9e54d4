"""Runs that are killed: forks of one process that has imported everything, each ended by SIGKILL, then one that is not.

Run as a script with a plan (JSON) as its argument; what happened goes to stdout as JSON. No product code knows of it:
moments in which a checkpoint is being written are found by Python's audit events.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What a run may be in the middle of.
STEP, WRITE = "step", "write"


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Do something in a child; return its id and a pipe that gets a byte per step."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        work(writer)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def train(plan: dict[str, Any], output: str, pipe: int, dies_at: int | None = None) -> None:
    """Start a run or go on with it; die at a moment, counted in audit events about what is being written."""
    from transformers import TrainerCallback

    from flash_reformer.training import train as start

    class Ticks(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            os.write(pipe, b".")

    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and "checkpoint-" in str(arguments[0]):
            writes = event != "open" or (isinstance(arguments[1], str) and "w" in arguments[1])
            seen += writes
            if writes and seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at is not None:
        sys.addaudithook(count)
    start(plan["task"], {**plan["asked"], "output": output}, plan["model"], auto_resume=True, callbacks=[Ticks()])


def kill_at_a_step(child: int, pipe: int, steps: int, delay: float) -> bool:
    """Wait until a child has begun so many steps and a little longer; say whether it was there to be killed."""
    for _ in range(steps):
        if not os.read(pipe, 1):
            break
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return died(child)


def died(child: int) -> bool:
    """Wait for a child; say whether SIGKILL was its end. Any other failure is one of the test."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, os.WTERMSIG(status)
        return True
    assert os.WEXITSTATUS(status) == 0, "a run failed by itself"
    return False


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Train undisturbed, then killed time and again; return when each one died and how far it had come."""
    from flash_reformer.training.checkpoints import own_checkpoints, partials, step_of

    draws = random.Random(plan["seed"])
    began = time.monotonic()
    child, pipe = forked(lambda writer: train(plan, plan["whole"], writer))
    assert not died(child)
    os.close(pipe)
    step_seconds = (time.monotonic() - began) / plan["asked"]["max_steps"]
    folder = Path(plan["broken"])
    kills = []
    while len(kills) < plan["kills"]:
        # A checkpoint takes some twenty events; the first one or the second one, from its first file to its last.
        kind = WRITE if len(kills) % 2 else STEP
        at = draws.randrange(1, 45) if kind == WRITE else draws.randrange(1, plan["steps_per_life"])
        child, pipe = forked(lambda writer, at=at if kind == WRITE else None: train(plan, plan["broken"], writer, at))
        ended = kill_at_a_step(child, pipe, at, draws.random() * step_seconds) if kind == STEP else died(child)
        os.close(pipe)
        if not ended:
            break
        left = [step_of(path) for path in own_checkpoints(folder)] if folder.is_dir() else []
        half = [path.name for path in partials(folder)] if folder.is_dir() else []
        kills.append({"kind": kind, "at": at, "checkpoints": left, "half": half})
    child, pipe = forked(lambda writer: train(plan, plan["broken"], writer))
    assert not died(child)
    os.close(pipe)
    return {"kills": kills}


if __name__ == "__main__":
    import torch

    import flash_reformer.training  # noqa: F401  # imported once, before the forks

    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(run(json.loads(sys.argv[1]))))
