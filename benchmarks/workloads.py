"""What is raced against what: the registry of workloads, and how much of them each mode measures.

A *workload* is a set of entries (``contestants.py``) that take turns in one race (``race.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.contestants import Entry

PASSES = ("forward", "training")
K = 1024
SHORT = 128


def counted(rounds: int) -> str:
    """Return a number of hash rounds in words; nothing for 0."""
    return f"{rounds} round{'s' * (rounds != 1)}" if rounds else ""


@dataclass(frozen=True)
class Mode:
    """How much is measured. ``tiny`` only shows that the machinery runs.

    Attributes:
        lengths: of the attention layers.
        long, far: the lengths of the table's ratios (16K and 64K).
        longest: up to where a contestant's layer runs; everywhere by default.
        rounds: of our LSH layer; the others run with the first and the last.
        token_lengths: of the cost per token.
        memory_lengths: of the layers' memory.
        seconds: of racing per workload; every entry runs at least ``turns`` times, whatever that takes.
        memory_steps: in the processes whose memory is measured.
        short_batch, short_rounds: of the models at 128 tokens.
        other_models: whether models of reformer-pytorch run.
    """

    name: str
    lengths: tuple[int, ...]
    long: int
    far: int
    longest: dict[str, int]
    rounds: tuple[int, ...]
    token_lengths: tuple[int, ...]
    memory_lengths: tuple[int, ...]
    seconds: float
    turns: int
    memory_steps: int
    short_batch: int
    short_rounds: tuple[int, ...]
    other_models: bool

    @property
    def ends(self) -> tuple[int, int]:
        """The fewest and the most rounds: what everybody runs with."""
        return self.rounds[0], self.rounds[-1]


MODES = {
    "full": Mode(
        name="full",
        lengths=(K // 2, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
        long=16 * K,
        far=64 * K,
        longest={"transformers": 64 * K, "reformer-pytorch": 16 * K, "ours-exact": 8 * K},
        rounds=(1, 2, 3, 4),
        token_lengths=(4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K),
        memory_lengths=(4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
        seconds=25,
        turns=2,
        memory_steps=2,
        short_batch=32,
        short_rounds=(1, 4),
        other_models=True,
    ),
    "quick": Mode(
        name="quick",
        lengths=(K // 2, K, 2 * K, 4 * K, 16 * K, 64 * K),
        long=16 * K,
        far=64 * K,
        longest={"transformers": 16 * K, "reformer-pytorch": 4 * K, "ours-exact": 4 * K},
        rounds=(1, 4),
        token_lengths=(4 * K, 16 * K, 64 * K, 256 * K),
        memory_lengths=(4 * K, 16 * K),
        seconds=10,
        turns=2,
        memory_steps=1,
        short_batch=32,
        short_rounds=(1,),
        other_models=False,
    ),
    "tiny": Mode(
        name="tiny",
        lengths=(K // 2, K),
        long=K,
        far=K,
        longest={"transformers": K, "reformer-pytorch": K // 2, "ours-exact": K},
        rounds=(1, 4),
        token_lengths=(K // 2, K),
        memory_lengths=(K // 2, K),
        seconds=1,
        turns=1,
        memory_steps=1,
        short_batch=2,
        short_rounds=(1,),
        other_models=True,
    ),
}


@dataclass(frozen=True)
class Workload:
    """Entries that take turns for some seconds; ``skipped`` are those that the mode leaves out, and why."""

    name: str
    entries: tuple[Entry, ...]
    seconds: float
    skipped: tuple[tuple[Entry, str], ...] = ()


def _attention(mode: Mode, length: int) -> Workload:
    rounds = {
        "ours": mode.rounds,
        "transformers": mode.ends,
        "reformer-pytorch": mode.ends,
        "sdpa": (0,),
        "ours-exact": (0,),
    }
    every = [Entry(who, "lsh", length, r, passes) for who in rounds for r in rounds[who] for passes in PASSES]
    within = [entry for entry in every if length <= mode.longest.get(entry.who, length)]
    reasons = {who: f"in mode {mode.name} only up to {longest} tokens" for who, longest in mode.longest.items()}
    skipped = tuple((entry, reasons[entry.who]) for entry in every if entry not in within)
    return Workload(f"attention-{length}", tuple(within), mode.seconds, skipped)


def _local(mode: Mode) -> Workload:
    base = [Entry(who, "local", mode.long, 0, passes) for who in ("ours", "transformers") for passes in PASSES]
    dropped = [replace(entry, dropout="default") for entry in base if entry.training]
    return Workload(f"local-{mode.long}", (*base, *dropped), mode.seconds)


def _models(mode: Mode, name: str, base: Entry) -> Workload:
    whos = ("ours", "transformers", "reformer-pytorch")
    every = [replace(base, who=who, dropout=dropout) for who in whos for dropout in ("none", "default")]
    left_out = [entry for entry in every if entry.who == "reformer-pytorch" and not mode.other_models]
    entries = tuple(entry for entry in every if entry not in left_out)
    skipped = tuple((entry, f"its models do not run in mode {mode.name}") for entry in left_out)
    return Workload(name, entries, mode.seconds, skipped)


def workloads(mode: Mode) -> dict[str, Workload]:
    """Return the workloads of a mode by name, in the order in which they run."""
    found = [_attention(mode, length) for length in mode.lengths]
    found.append(_local(mode))
    for rounds in mode.ends:
        base = Entry("ours", "model", mode.long, rounds, "training")
        found.append(_models(mode, f"model-{mode.long}-r{rounds}", base))
    for rounds in mode.short_rounds:
        short = Entry("ours", "model", SHORT, rounds, "training", batch=mode.short_batch)
        found.append(_models(mode, f"short-{SHORT}-r{rounds}", short))
    tokens = tuple(Entry("ours", "lsh", length, 1, "training") for length in mode.token_lengths)
    found.append(Workload("tokens", tokens, mode.seconds))
    return {workload.name: workload for workload in found}


def memory_entries(mode: Mode) -> list[Entry]:
    """Return what has its memory measured: the models at the long length, the layers over lengths; all in training."""
    pairs = [(who, rounds) for who in ("ours", "transformers") for rounds in mode.ends]
    models = [
        Entry(who, "model", mode.long, rounds, "training", dropout=dropout)
        for who, rounds in pairs
        for dropout in ("none", "default")
    ]
    layers = [Entry(who, "lsh", T, rounds, "training") for who, rounds in pairs for T in mode.memory_lengths]
    return models + layers


def profiled_entries(mode: Mode) -> list[Entry]:
    """Return what is taken apart by stage: our LSH layer and our model, with few and with many rounds."""
    return [Entry("ours", kind, mode.long, rounds, "training") for kind in ("lsh", "model") for rounds in mode.ends]
