"""Checkpoints are whole or not there; a damaged one is found before it is used, and the one before it taken."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from flash_reformer.training import checkpoints as safe
from flash_reformer.training import resume, train
from flash_reformer.training.run_folder import find_checkpoint, prepare_folder

from .runs import QUICK, TINY, Interrupt, weights, write_text


def sealed(folder: Path, step: int, content: bytes = b"0123456789" * 50) -> Path:
    """A folder that looks like a checkpoint to whoever reads manifests."""
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "shards" / "0.bin").write_bytes(content)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    safe.seal(path)
    return path


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray((path / "shards" / "0.bin").read_bytes())
    content[77] ^= 4
    (path / "shards" / "0.bin").write_bytes(bytes(content))


DAMAGES = {
    "truncated": (truncate, r"model\.safetensors has 499 bytes, 500 were written"),
    "flipped": (flip, r"shards/0\.bin does not hold the bytes that were written"),
    "missing": (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "extra": (lambda path: (path / "pytorch_model.bin").touch(), r"pytorch_model\.bin was not written with it"),
    "no manifest": (lambda path: (path / safe.MANIFEST).unlink(), r"it has no manifest\.json"),
    "half a manifest": (lambda path: (path / safe.MANIFEST).write_text('{"files"'), r"its manifest\.json is damaged"),
    "odd manifest": (lambda path: (path / safe.MANIFEST).write_text('{"files": [3]}'), r"manifest\.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_seen_and_the_checkpoint_before_it_taken(name, tmp_path):
    good, bad = sealed(tmp_path, 9), sealed(tmp_path, 10)
    assert safe.damage(bad) is None
    (tmp_path / "run.json").write_text(json.dumps({"sealed_from": 0}))
    damage, reason = DAMAGES[name]
    damage(bad)
    with pytest.raises(ValueError, match=rf"--resume-from .*checkpoint-10 is damaged: .*{reason}"):
        find_checkpoint(str(bad), "")
    with pytest.warns(UserWarning, match=rf"checkpoint-10 is damaged and is now checkpoint-10\.damaged: .*{reason}"):
        assert find_checkpoint(None, str(tmp_path)) == good
    # The second time there is nothing left to warn of.
    assert find_checkpoint(None, str(tmp_path)) == good
    truncate(good)
    with (
        pytest.warns(UserWarning, match="checkpoint-9 is damaged"),
        pytest.raises(ValueError, match=r"no checkpoint in .* is undamaged \(checkpoint-9: model"),
    ):
        find_checkpoint(None, str(tmp_path))


def test_a_flipped_bit_of_the_manifest_is_seen_wherever_it_matters(tmp_path):
    manifest = sealed(tmp_path, 3) / safe.MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        manifest.write_bytes(bytes(flipped))
        try:
            harmless = json.loads(bytes(flipped)) == json.loads(content)  # white space
        except ValueError:
            harmless = False
        assert (safe.damage(manifest.parent) is None) == harmless, bytes(flipped)


def test_hidden_files_of_others_are_no_damage(tmp_path):
    path = sealed(tmp_path, 3)
    (path / ".DS_Store").touch()
    assert safe.damage(path) is None


def test_checkpoints_of_earlier_versions_are_taken_with_a_warning(tmp_path):
    path = sealed(tmp_path, 3)
    (path / safe.MANIFEST).unlink()
    for name in ("config.json", "optimizer.pt", "scheduler.pt"):
        (path / name).write_text("{}")
    with pytest.warns(UserWarning, match="was written by an earlier version"):
        assert find_checkpoint(None, str(tmp_path)) == path
    (path / "optimizer.pt").write_text("")
    with (
        pytest.warns(UserWarning, match=r"optimizer\.pt is missing or empty"),
        pytest.raises(ValueError, match="is undamaged"),
    ):
        find_checkpoint(None, str(tmp_path))


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    safe.write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safe.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        safe.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_dead_run_left_half_is_removed_and_what_only_lacks_its_name_gets_it(tmp_path):
    for step, whole in ((5, True), (6, False)):
        aside = tmp_path / f".checkpoint-{step}.partial"
        written = sealed(aside, step)
        if not whole:
            (written / safe.MANIFEST).unlink()
    (tmp_path / ".checkpoint-4.old.partial").mkdir()
    (tmp_path / ".run.json.partial").touch()
    (tmp_path / ".mine.partial").touch()
    safe.clear_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "checkpoint-5"]
    assert safe.damage(tmp_path / "checkpoint-5") is None


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    old = sealed(tmp_path, 5)
    new = sealed(tmp_path / ".checkpoint-5.partial", 5, b"new" * 10)
    safe.move_into_place(new, old)
    assert (old / "model.safetensors").read_bytes() == b"new" * 10
    assert safe.damage(old) is None
    assert not (tmp_path / ".checkpoint-5.old.partial").exists()


@pytest.mark.parametrize(
    ("steps", "limit", "best", "now", "left"),
    [
        ([1, 2, 3], 2, None, None, [2, 3]),
        ([1, 2, 3], 2, 1, 3, [1, 3]),
        ([1, 2, 3], 1, 1, 3, [1, 3]),
        ([9, 10, 11], 1, None, None, [11]),
        # Gone back to 10, then 15 was written: what came after it the first time goes first, 15 never.
        ([10, 15, 20, 30], 2, None, 15, [10, 15]),
        ([15, 20, 30], 1, None, 15, [15]),
        # Could not be written: what is last stays.
        ([10, 20], 1, None, 25, [20]),
    ],
)
def test_pruning_keeps_the_one_just_written_and_the_best(steps, limit, best, now, left, tmp_path):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-7.damaged").mkdir()
    safe.prune_checkpoints(tmp_path, limit, None if best is None else f"elsewhere/checkpoint-{best}", now)
    assert [safe.step_of(path) for path in safe.own_checkpoints(tmp_path)] == left
    assert (tmp_path / "checkpoint-7.damaged").is_dir()


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, Path]:
    """An undisturbed run, and one that was interrupted at step 9 of 10, with checkpoints 6 and 8."""
    folder = tmp_path_factory.mktemp("runs")
    asked = {**QUICK, "text": (write_text(folder),), "max_steps": 10, "keep": "best", "eval_interval": 2}
    asked["save_interval"] = 2
    train("clm", {**asked, "output": str(folder / "whole")}, TINY)
    with pytest.raises(KeyboardInterrupt):
        train("clm", {**asked, "output": str(folder / "broken")}, TINY, callbacks=[Interrupt(9)])
    assert [path.name for path in safe.own_checkpoints(folder / "broken")] == ["checkpoint-6", "checkpoint-8"]
    return folder / "whole", folder / "broken"


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_the_same(broken, tmp_path):
    whole, run = broken[0], copy_of(broken[1], tmp_path)
    content = bytearray((run / "checkpoint-8" / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoint-8" / "optimizer.pt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint-8\.damaged: optimizer\.pt does not hold the bytes"):
        resume({"output": str(run)})
    a, b = weights(whole), weights(run)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Starting over removes what was set aside, too.
    assert (run / "checkpoint-8.damaged").is_dir()
    prepare_folder(str(run), overwrite=True)
    assert list(run.iterdir()) == []


def test_a_damaged_best_checkpoint_is_no_longer_the_best(broken, tmp_path):
    run = copy_of(broken[1], tmp_path)
    state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
    state.update(best_global_step=6, best_metric=0.0, best_model_checkpoint=str(run / "checkpoint-6"))
    (run / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    (run / "checkpoint-8" / safe.MANIFEST).unlink()
    safe.seal(run / "checkpoint-8")
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    with pytest.warns(
        UserWarning,
        match=r"best checkpoint so far .*checkpoint-6 is damaged and is now .*: model\.safetensors has 0 bytes",
    ):
        result = resume({"output": str(run)})
    # Nothing can be better than the 0.0 of the lost one; what was evaluated since counts.
    assert result.metrics["kept_step"] == 10
    assert result.metrics["held_out_loss"] > 0


def test_a_run_that_died_between_its_last_checkpoint_and_its_end_is_ended(broken, tmp_path):
    run = copy_of(broken[0], tmp_path)
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (run / name).unlink()
    resume({"output": str(run)})
    assert (run / "model.safetensors").read_bytes() == (broken[0] / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (broken[0], run))
    assert (after["steps"], after["kept_step"]) == (before["steps"], before["kept_step"])
    with pytest.raises(ValueError, match="already at the end"):
        resume({"output": str(run)})


def test_auto_resume_starts_goes_on_and_lets_an_ended_run_be(broken, tmp_path):
    asked = {**QUICK, "text": (write_text(tmp_path),), "max_steps": 4, "output": str(tmp_path / "run")}
    with pytest.raises(KeyboardInterrupt):
        # Died before its first checkpoint.
        train("clm", asked, TINY, auto_resume=True, callbacks=[Interrupt(0)])
    with pytest.raises(KeyboardInterrupt):
        train("clm", {**asked, "save_interval": 2}, TINY, auto_resume=True, callbacks=[Interrupt(3)])
    for changed, fields, message in (
        ({"seed": 5}, TINY, "seed cannot change on resume: the run has 0"),
        ({}, {**TINY, "hidden_size": 32}, "hidden_size cannot change on resume: the run's model has 16, got 32"),
        ({}, {**TINY, "num_hashes": 2}, "num_hashes cannot change on resume: the run's model has 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train("clm", {**asked, **changed}, fields, auto_resume=True)
    with pytest.raises(ValueError, match="holds a run of clm, not of mlm"):
        train("mlm", {name: asked[name] for name in asked if name != "sample_tokens"}, TINY, auto_resume=True)
    with pytest.raises(ValueError, match="auto_resume and overwrite contradict"):
        train("clm", asked, TINY, auto_resume=True, overwrite=True)
    steps = []
    watch = [lambda now: steps.append(now.step)]
    first = train("clm", asked, {**TINY, "num_hashes": 1}, auto_resume=True, report=watch[0])
    assert min(steps) == 2
    again = train("clm", asked, TINY, auto_resume=True, report=pytest.fail)
    assert again.metrics == json.loads(json.dumps(first.metrics))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    os.rename(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-3.damaged")
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"):
        train("clm", asked, TINY, auto_resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ValueError, match="already holds other files"):
        train("clm", {**asked, "output": str(tmp_path / "notes")}, TINY, auto_resume=True)
