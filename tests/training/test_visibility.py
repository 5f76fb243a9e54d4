"""What a run says of itself while it goes: speed, time left, memory, to a terminal, TensorBoard and trackio."""

import gc
import importlib.machinery
import mmap
import sys
import time
import types
from types import SimpleNamespace

import pytest

from flash_reformer.training import memory, train_clm
from flash_reformer.training.budget import Budget
from flash_reformer.training.progress import ProgressCallback, Speed, evaluations_left
from flash_reformer.training.settings import CausalSettings
from flash_reformer.training.tasks import TASKS
from tests.training.runs import QUICK, TINY


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_time_left_is_of_steps_and_evaluations_to_come(monkeypatch):
    """100 steps of 2 s, and an evaluation of 30 s before them and after every 25: 320 s from the first step on."""
    clock, events = Clock(monkeypatch), []
    settings, budget = CausalSettings(eval_interval=25), Budget(100, None)
    callback = ProgressCallback(events.append, budget, lambda steps: 10.0 * steps, TASKS["clm"].measure, settings)
    state = SimpleNamespace(global_step=0)
    budget.start()
    callback.on_train_begin(None, state, None)
    clock.now += 30.0
    callback.on_evaluate(None, state, None, metrics={})
    left = {}
    for state.global_step in range(1, 101):
        callback.on_step_begin(None, state, None)
        clock.now += 2.0
        callback.on_step_end(None, state, None)
        left[state.global_step] = events[-1].seconds_left
        if state.global_step % 25 == 0:
            clock.now += 30.0
            callback.on_evaluate(None, state, None, metrics={})
    assert left[1] == pytest.approx(99 * 2 + 4 * 30)
    assert left[24] == pytest.approx(76 * 2 + 4 * 30)
    assert left[26] == pytest.approx(74 * 2 + 3 * 30)
    assert left[100] == 0.0
    assert events[-1].tokens_per_second == pytest.approx(5.0)


def test_minutes_are_left_where_minutes_end_a_run(monkeypatch):
    clock, events = Clock(monkeypatch), []
    budget = Budget(None, 10.0)
    callback = ProgressCallback(
        events.append, budget, lambda steps: 10.0 * steps, TASKS["clm"].measure, CausalSettings()
    )
    state = SimpleNamespace(global_step=1)
    budget.start()
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None)
    callback.on_step_begin(None, state, None)
    clock.now += 45.0
    callback.on_step_end(None, state, None)
    assert events[-1].seconds_left == pytest.approx(555.0)


@pytest.mark.parametrize("interval", [None, 3, 5, 20])
def test_evaluations_left_are_those_that_the_run_makes(interval, text, tmp_path):
    asked = {**QUICK, "text": (text,), "output": str(tmp_path / "run"), "max_steps": 13, "eval_interval": interval}
    result = train_clm(asked, TINY)
    judged = [entry["step"] for entry in result.metrics["history"] if "eval_loss" in entry]
    settings = CausalSettings(eval_interval=interval)
    for step in range(14):
        # An evaluation at this very step follows the report of the step.
        after = [each for each in judged if each > step]
        assert evaluations_left(settings, Budget(13, None), step) == len(after), step


def test_speed_is_that_of_steps_without_pauses(monkeypatch):
    clock, speed = Clock(monkeypatch), Speed(lambda steps: 100.0 * steps)
    assert speed.since_last_time() == 0.0
    for step, seconds in ((1, 1.0), (2, 3.0)):
        speed.on_step_begin(None, None, None)
        clock.now += seconds
        speed.on_step_end(None, SimpleNamespace(global_step=step), None)
        clock.now += 50.0
    assert speed.since_last_time() == pytest.approx(50.0)
    speed.on_step_begin(None, None, None)
    clock.now += 0.5
    speed.on_step_end(None, SimpleNamespace(global_step=3), None)
    assert speed.since_last_time() == pytest.approx(200.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says what is resident at the moment")
def test_memory_is_that_of_now_and_at_most():
    gc.collect()
    before, size = memory.memory_of_process(), 64 * 2**20
    # Apart from the heap, which may have so much to spare.
    block = mmap.mmap(-1, size)
    block.write(b"x" * size)
    during, peak = memory.memory_of_process(), memory.peak_of_process()
    block.close()
    after = memory.memory_of_process()
    # The kernel counts pages by thread and adds up now and then: what it says is off by some hundred of them.
    slack = 2**22
    assert during - before > 0.9 * size
    assert peak >= during - slack
    assert during - after > 0.9 * size
    assert memory.peak_of_process() >= peak - slack


def test_tensorboard_gets_speed_memory_rate_and_norm(text, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = {
        **QUICK,
        "text": (text,),
        "output": str(tmp_path / "run"),
        "tensorboard": True,
        "log_interval": 2,
        "eval_interval": 4,
        "save_interval": 4,
    }
    train_clm({**asked, "max_steps": 4}, TINY)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    for name in ("tokens_per_second", "memory_bytes", "peak_memory_bytes", "learning_rate", "grad_norm", "loss"):
        assert f"train/{name}" in tags
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert len(values) == 2
        assert all(value > 0 for value in values), name
    assert "eval/bits_per_byte" in tags


@pytest.fixture
def trackio(monkeypatch):
    """A module that stands in for trackio, where it is not installed: what transformers' callback calls of it."""
    logged, started = [], []
    module = types.ModuleType("trackio")
    module.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    module.__version__ = "0.43.0"
    module.init = lambda **named: started.append(named)
    module.log = logged.append
    module.finish = lambda: logged.append("end")
    module.config = {}
    module.config = type("Config", (dict,), {"update": lambda self, values, **_: dict.update(self, values)})()
    module.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    monkeypatch.setitem(sys.modules, "trackio", module)
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return SimpleNamespace(logged=logged, started=started, config=module.config)


def test_trackio_gets_what_the_log_says_and_sends_it_nowhere(text, tmp_path, trackio):
    asked = {
        **QUICK,
        "text": (text,),
        "output": str(tmp_path / "run-7"),
        "trackio": True,
        "log_interval": 2,
        "eval_interval": 4,
        "save_interval": 4,
    }
    train_clm({**asked, "max_steps": 4}, TINY)
    (started,) = trackio.started
    assert started["project"] == "run-7"
    assert started["space_id"] is None
    assert trackio.config["hidden_size"] == 16
    assert trackio.logged[-1] == "end"
    losses = [entry for entry in trackio.logged[:-1] if "train/loss" in entry]
    assert [entry["train/global_step"] for entry in losses] == [2, 4]
    names = ("tokens_per_second", "memory_bytes", "peak_memory_bytes", "learning_rate", "grad_norm")
    assert all(entry[f"train/{name}"] > 0 for entry in losses for name in names)
    assert any("eval/bits_per_byte" in entry for entry in trackio.logged[:-1])


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_what_is_not_installed_is_named_before_anything_is_written(name, text, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda what, *more: None if what == name else find(what, *more))
    asked = {**QUICK, "text": (text,), "output": str(tmp_path / "run"), name: True}
    with pytest.raises(ImportError, match=f"--{name} needs the package `{name}`: pip install {name}"):
        train_clm(asked, TINY)
    assert not (tmp_path / "run").exists()
