"""The GPU benchmark's own logic, without a GPU: time, floors, verdicts, and what it does when something is wrong."""

import json
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import floors, parity, script
from benchmarks.gpu.attention import Case
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.device import StandIn
from benchmarks.gpu.lanes import OUT_OF_MEMORY, Lane, Prediction, faults, race, spare
from benchmarks.gpu.layers import Flex
from benchmarks.gpu.plan import FULL, REHEARSAL, SHARES
from benchmarks.gpu.requirements import MET, MISSED, REHEARSED, UNKNOWN, Requirement, requirements
from flash_reformer import ReformerConfig, functional


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_stage_may_use_what_earlier_ones_left():
    clock = Clock()
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock)
    assert budget.share("a").left() == pytest.approx(25)
    clock.now += 5
    assert budget.share("b").left() == pytest.approx(45)
    assert budget.left() == pytest.approx(95)


def test_a_late_stage_gets_half_its_share_but_nothing_beyond_the_deadline():
    clock = Clock()
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock)
    clock.now += 60
    assert budget.share("b").left() == pytest.approx(12.5)
    clock.now += 35
    share = budget.share("c")
    assert share.left() == pytest.approx(5)
    assert not share.out()
    assert share.out(needed=6)


#: tokens in 1024, rounds, microseconds forward and backward at 4.3 TB/s, as worked out on paper for 8 heads of 64.
ON_PAPER = [(16, 1, 17, 28), (64, 1, 66, 111), (64, 4, 298, 724), (256, 8, 2400, 5700), (1024, 4, 5500, 11600)]


@pytest.mark.parametrize(("length", "rounds", "forward", "backward"), ON_PAPER)
def test_floors_are_those_on_paper_or_stricter(length, rounds, forward, backward):
    shape = {"length": 1024 * length, "heads": 8, "head_size": 64, "itemsize": 2}
    for passes, paper in (("forward", forward), ("backward", backward)):
        floor = 1e6 * floors.floor_s("lsh", passes, 4.3e12, rounds=rounds, **shape)
        assert 0.8 * paper < floor < 1.03 * paper, (passes, floor)


def test_floors_count_rows():
    shape = {"length": 2**20, "heads": 1, "head_size": 2**10, "itemsize": 2}
    row = 2**31
    for kind, passes, rounds, rows in (
        ("lsh", "forward", 1, 4),
        ("lsh", "forward", 4, 18),
        ("lsh", "backward", 1, 7),
        ("lsh", "backward", 2, 10 + 8),
        ("local", "forward", 1, 4),
        ("local", "training", 1, 13),
    ):
        assert floors.floor_s(kind, passes, 1.0, rounds=rounds, **shape) / row == pytest.approx(rows, rel=0.02)


def test_slow_peers_are_predicted_and_not_run():
    prediction = Prediction(power=2)
    prediction.learn(("flash",), 1000, 0.1)
    lanes = [Lane({"who": who, "length": T}, lambda: None) for who in ("ours", "flash") for T in (2000, 10_000)]
    kept, told = spare(lanes, prediction, 1.5, lambda who: (who["who"],))
    assert [lane.who for lane in kept] == [lane.who for lane in lanes[:3]]
    assert told[0]["predicted_s"] == pytest.approx(10.0)
    assert "median_s" not in told[0]
    assert prediction.seconds(("cudnn",), 5) is None


def test_a_race_reports_what_fails():
    def broken():
        raise RuntimeError("no such thing")

    def full():
        raise torch.OutOfMemoryError("4 GiB")

    lanes = [Lane({"who": "ours", "n": i}, lambda run=run: run) for i, run in enumerate((lambda: None, broken, full))]
    rows = race(StandIn(), REHEARSAL, Budget(10, {"a": 1}).share("a"), lanes)
    assert rows[0]["runs"] == 1
    assert rows[1]["error"] == "RuntimeError: no such thing"
    assert rows[2]["error"] == OUT_OF_MEMORY
    assert len(faults(rows)) == 1


def test_verdicts():
    assert Requirement("x", 1, 8, {"": 9.0}, aim=12).row(True)["verdict"] == MET
    assert Requirement("x", 1, 8, {"": 9.0}, aim=12).row(True)["aim_verdict"] == MISSED
    assert Requirement("x", -1, 8, {"a": 7.0, "b": 9.0}).row(True)["verdict"] == MISSED
    assert Requirement("x", -1, 8, {"a": 7.0, "b": None}).row(True)["verdict"] == UNKNOWN
    assert Requirement("x", -1, 8, {"a": float("inf"), "b": 7.0}, any_of=True).row(True)["verdict"] == MET
    assert Requirement("x", -1, 8, {"a": float("inf"), "b": None}, any_of=True).row(True)["verdict"] == UNKNOWN
    told = Requirement("x", 1, 8, {"": 9.0}).row(False)
    assert told["verdict"] == REHEARSED
    assert "9" not in str(told["measured"])


def _attention_row(who, length, rounds, seconds):
    kind = "lsh" if who == "ours" else "exact"
    at = {"length": length, "head_size": 64, "rounds": rounds, "passes": "training"}
    return {"who": who, "kind": kind, **at, "median_s": seconds}


def test_the_table_reads_the_rows():
    rows = [_attention_row("ours", T, 4, T * 1e-8) for T in FULL.lengths]
    rows += [_attention_row("flash", T, 0, T * 1e-8 * T / 4096) for T in FULL.lengths if T <= 2**18]
    rows += [_attention_row("cudnn", T, 0, T * 1e-8 * T / 8192) for T in FULL.lengths if T <= 2**18]
    steps = [
        {"model": "novel", "cap_gb": 8.0, "error": OUT_OF_MEMORY},
        {"model": "novel", "cap_gb": None, "step_s": 0.5, "allocated_gb": 9.0},
        {"model": "novel, a million positions", "cap_gb": 16.0, "reserved_gb": 15.0},
    ]
    table = requirements({"attention": {"rows": rows}, "models": {"rows": steps}}, FULL)
    verdicts = {row["what"]: (row["verdict"], next(iter(row["measured"].values()))) for row in table}
    lsh = "LSH, 65,536 tokens, 4 rounds, forward and backward, against exact attention"
    assert verdicts[f"{lsh} (FlashAttention)"] == (MET, "16x")
    assert verdicts[f"{lsh} (faster of flash, cuDNN)"] == (MET, "8x")
    overtakes = "LSH, 4 rounds, forward and backward, overtakes exact attention"
    assert verdicts[f"{overtakes} (FlashAttention)"] == (MET, "4,096 tokens")
    assert verdicts["novel model, training step of 524,288 tokens"] == (MET, "0.5 s")
    assert verdicts["novel model, training step of 524,288 tokens, peak memory (run within 8 GB)"] == (MISSED, "9 GB")
    assert verdicts["novel model, training step of 1,048,576 tokens, memory reserved"] == (MET, "15 GB")
    assert verdicts["LSH, forward, over the floor of bytes"][0] == UNKNOWN


def _run(tmp_path, monkeypatch, **stages):
    quiet = {name: lambda context: {"rows": []} for name in script.STAGES}
    monkeypatch.setattr(script, "STAGES", {**quiet, **stages})
    path = tmp_path / "results" / "gpu.json"
    code = script.run(rehearse=True, backend="reference", seconds=20, path=path)
    return code, json.loads(path.read_text("utf-8"))


def test_nothing_is_measured_on_a_red_parity(tmp_path, monkeypatch, capsys):
    code, data = _run(tmp_path, monkeypatch, parity=lambda context: {"rows": [], "red": ["hash"]})
    assert code == 1
    assert not data["ok"]
    assert data["stages"]["parity"]["status"] == "red"
    assert data["stages"]["attention"] == {"status": "not run"}
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["stages"] == data["stages"]


def test_a_failing_stage_is_recorded_and_does_not_stop_the_others(tmp_path, monkeypatch):
    def failing(context):
        context.rows.append({"who": "ours", "length": 1, "median_s": 1.0})
        raise RuntimeError("broken")

    code, data = _run(tmp_path, monkeypatch, attention=failing)
    assert code == 1
    assert data["stages"]["attention"]["errors"] == ["RuntimeError: broken"]
    assert data["results"]["attention"]["rows"] == [{"who": "ours", "length": 1, "median_s": REHEARSED}]
    assert {status["status"] for name, status in data["stages"].items() if name != "attention"} == {"ok"}


def test_all_well(tmp_path, monkeypatch):
    code, data = _run(tmp_path, monkeypatch)
    assert code == 0
    assert all("table" not in status for status in data["stages"].values())
    assert data["ok"]
    assert "triton's interpreter" in data["replaced"]["kernels"]


def test_a_loss_that_is_no_number_fails_the_stage(tmp_path, monkeypatch):
    wrong = {"rows": [{"who": "ours", "error": "the loss is nan, then nan"}]}
    code, data = _run(tmp_path, monkeypatch, models=lambda context: wrong)
    assert code == 1
    assert "the loss is nan" in data["stages"]["models"]["errors"][0]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert command.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_plans_are_sound():
    assert list(SHARES) == list(script.STAGES)
    for plan in (FULL, REHEARSAL):
        assert plan.long in plan.lengths
        assert plan.far in plan.lengths
        assert {plan.few, plan.many} <= set(plan.rounds)
        for fields in (plan.novel, plan.bytes_model):
            config = ReformerConfig(**fields)
            assert config.axial_pos_shape[0] * config.axial_pos_shape[1] == config.max_position_embeddings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [128, 256, 512])
def test_flex_attention_is_given_the_same_attention(length):
    sizes = {"length": length, "heads": 2, "head_size": 16, "chunk": 16, "dtype": torch.float32}
    case = Case(StandIn(), "reference", **sizes)
    peer = Flex(case, flex_attention)
    with torch.no_grad():
        expected, found = case.attend(peer.positions, case.buckets(case.rotations())), peer.whole()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [None, "output", "gradient"])
def test_parity_sees_what_is_wrong(wrong, monkeypatch):
    right = functional.lsh_attention

    def kernel(qk, v, *args, backend, **options):
        if backend == "cpu" and wrong == "gradient":
            qk = qk + 0.01 * (qk - qk.detach())  # the same value, another gradient
        out, lse = right(qk, v, *args, backend=backend, **options)
        return (1.001 * out if backend == "cpu" and wrong == "output" else out), lse

    monkeypatch.setattr(functional, "lsh_attention", kernel)
    if wrong is None:
        parity.TOYS[1].check(StandIn(), "cpu")
    else:
        with pytest.raises(parity.Red, match=wrong):
            parity.TOYS[1].check(StandIn(), "cpu")
