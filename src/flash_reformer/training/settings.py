"""What a training run is asked for: every setting once, with its default, its help and its limits."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flash_reformer.training.schedules import Schedule

PRECISIONS = ("fp32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp")


def option(default: Any, help: str, panel: str, **more: Any) -> Any:
    """Declare a setting; command-line flags are made from what is said here."""
    return dataclasses.field(default=default, metadata={"help": help, "panel": panel, **more})


def at_least(low: float) -> tuple[str, Callable[[Any], bool]]:
    """Allow whole and other numbers from ``low`` on."""
    return f"at least {low}", lambda value: value >= low and math.isfinite(value)


POSITIVE: tuple[str, Callable[[Any], bool]] = (
    "a positive number",
    lambda value: value > 0 and math.isfinite(value),
)
FRACTION: tuple[str, Callable[[Any], bool]] = ("strictly between 0 and 1", lambda value: 0 < value < 1)


def one_of(*values: str) -> tuple[str, Callable[[Any], bool]]:
    """Allow some words."""
    return f"one of {', '.join(values)}", lambda value: value in values


@dataclass(frozen=True)
class TrainingSettings:
    """What every task is asked for. ``None`` means "not asked for" where it is the default."""

    output: str = option("", "Folder for checkpoints, the final model, the loss curve and the metrics.", "Run")
    init_from: str | None = option(None, "Saved model folder to start from, in place of fresh weights.", "Run")
    tokenizer: str | None = option(
        None, "Tokenizer: a folder or a name on the hub; else that of --init-from; else one token per byte.", "Run"
    )
    seed: int = option(0, "Seed of the weights, the data order, the dropout and the hashing.", "Run")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.", "Run")
    precision: str = option("fp32", "Precision of the arithmetic: fp32, bf16 or fp16.", "Run")
    parallel: str = option(
        "ddp", "On several ranks: ddp, each with the whole model, or fsdp, each with a shard of every block.", "Ranks"
    )
    find_unused_parameters: bool = option(False, "ddp: look for parameters that a batch left out.", "Ranks")
    static_graph: bool = option(False, "ddp: rely on every step taking the same path.", "Ranks")
    cpu_offload: bool = option(False, "fsdp: keep the shards in main memory.", "Ranks")
    sequence_parallel: int = option(1, "Ranks that share each sequence.", "Ranks")
    max_steps: int | None = option(None, "Stop after so many optimizer steps (reproducible).", "Run")
    max_epochs: float | None = option(None, "Stop after so many passes over the data (reproducible).", "Run")
    max_minutes: float | None = option(
        None, "Stop after so many minutes of training; the schedule follows the clock, so runs differ.", "Run"
    )
    num_hashes_schedule: str | None = option(
        None,
        "Rounds of hashing as training goes, START:ROUNDS,...: from these steps or fractions of the run on, such as "
        "0:1,0.5:2.",
        "Model",
    )
    eval_num_hashes: int | None = option(
        None, "Rounds of hashing in evaluations and in the model that is saved; else those training ends with.", "Model"
    )
    seq_len: int = option(4096, "Tokens per sequence, at most.", "Data")
    batch_size: int = option(1, "Sequences per step and device.", "Optimizer")
    gradient_accumulation: int = option(1, "Batches whose gradients are summed into one step.", "Optimizer")
    learning_rate: float = option(3e-3, "Highest learning rate of AdamW.", "Optimizer")
    final_learning_rate: float = option(0.1, "Fraction of it left at the end of the cosine decay.", "Optimizer")
    warmup_steps: int = option(20, "Steps over which the learning rate rises from 0.", "Optimizer")
    weight_decay: float = option(0.1, "Weight decay of AdamW.", "Optimizer")
    adam_beta2: float = option(0.98, "Second moment decay of AdamW.", "Optimizer")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "Optimizer")
    eval_interval: int | None = option(None, "Steps between evaluations; by default a fixed number per run.", "Reports")
    save_interval: int | None = option(None, "Steps between checkpoints; by default with each evaluation.", "Reports")
    save_total_limit: int = option(2, "Checkpoints to keep.", "Reports")
    keep: str = option("last", "Weights to end with: the last ones, or the best held-out ones.", "Reports")
    early_stopping: int | None = option(
        None, "Stop after so many evaluations in a row without a better held-out result.", "Reports"
    )
    tensorboard: bool = option(False, "Also write logs for TensorBoard, into OUTPUT/tensorboard.", "Reports")
    trackio: bool = option(
        False, "Also log to trackio, on this machine; `trackio show` shows it. The project is OUTPUT's name.", "Reports"
    )
    log_interval: int = option(5, "Steps between points of the loss curve.", "Reports")

    # How many evaluations a run has where no interval is asked for.
    EVALUATIONS: ClassVar[int] = 6
    # How many steps it has where no end is asked for; None demands one.
    STEPS: ClassVar[int | None] = None

    @classmethod
    def with_end(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Add the task's own number of steps where no end is given."""
        ends = ("max_steps", "max_epochs", "max_minutes")
        if cls.STEPS is None or any(given.get(name) is not None for name in ends):
            return given
        return {**given, "max_steps": cls.STEPS}

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be: in words, and as a test."""
        counts = (
            "batch_size gradient_accumulation save_total_limit log_interval max_steps eval_interval save_interval "
            "early_stopping eval_num_hashes sequence_parallel"
        )
        return {
            **dict.fromkeys(counts.split(), at_least(1)),
            "warmup_steps": at_least(0),
            "seed": ("in 0..2**32 - 1", lambda value: 0 <= value < 2**32),
            **dict.fromkeys(("learning_rate", "max_minutes", "max_epochs", "max_grad_norm"), POSITIVE),
            "seq_len": at_least(2),
            "weight_decay": ("a number, at least 0", at_least(0)[1]),
            "final_learning_rate": ("between 0 and 1", lambda value: 0 <= value <= 1),
            "adam_beta2": ("at least 0 and below 1", lambda value: 0 <= value < 1),
            "precision": one_of(*PRECISIONS),
            "parallel": one_of(*PARALLEL),
            "keep": one_of("last", "best"),
        }

    def __post_init__(self) -> None:
        """Refuse what makes no sense, by the name of the setting."""
        for name, (allowed, holds) in self.limits().items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        _ = self.rounds  # is refused here if it is none

    @property
    def rounds(self) -> Schedule | None:
        """How many rounds of hashing training takes as it goes, or None where it does not change."""
        text = self.num_hashes_schedule
        return None if text is None else Schedule.parse(text, "num_hashes_schedule", low=1)

    def check_complete(self) -> None:
        """Refuse settings from which no run can start."""
        if not self.output:
            raise ValueError("output is missing: name a folder with --output")
        self.check_sources()
        self.refuse_without(self.parallel == "ddp", "find_unused_parameters static_graph", "--parallel ddp only")
        self.refuse_without(self.parallel == "fsdp", "cpu_offload", "--parallel fsdp, which is not given")
        if self.max_steps is None and self.max_minutes is None and self.max_epochs is None:
            raise ValueError("no end is set: give --max-steps, --max-epochs or --max-minutes")

    def check_sources(self) -> None:
        """Refuse data that is missing or named twice."""

    def check_ranks(self, launched: bool) -> None:
        """Refuse what is about ranks in a process that no launcher has started."""
        about = "ranks: start the run with torchrun or accelerate launch"
        self.refuse_without(launched, "parallel find_unused_parameters static_graph", about)

    def refuse_without(self, condition: bool, names: str, about: str) -> None:
        """Refuse settings that would have no effect, because what they are about is not there."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not condition and field.name in names.split() and value != field.default:
                raise ValueError(f"{field.name} {value!r} is about {about}")


@dataclass(frozen=True)
class TextSettings(TrainingSettings):
    """What a language model is asked for: running text."""

    text: tuple[str, ...] = option((), "Text file to train on; repeat it, or list several files.", "Data")
    dataset: str | None = option(None, "Dataset to train on: a name on the hub, a file, or a folder.", "Data")
    dataset_split: str = option("train", "Part of the dataset to read.", "Data")
    text_column: str = option("text", "Column of the dataset that holds the text.", "Data")
    standard_library: bool = option(False, "Train on the source of this Python's standard library.", "Data")
    held_out: float = option(0.05, "Fraction of the text set aside for evaluation.", "Data")
    streaming: bool = option(False, "Read and tokenize the text as training goes: it is never in memory whole.", "Data")
    shuffle_tokens: int = option(
        2**21, "Tokens whose sequences are mixed at a time, with --streaming or --seq-len-schedule.", "Data"
    )
    seq_len_schedule: str | None = option(
        None,
        "Lengths of the sequences as training goes, START:LENGTH,...: from these steps or fractions of the run on, "
        "such as 0:4096,0.5:16384. --batch-size counts sequences of the longest.",
        "Data",
    )
    grow_positions: bool = option(
        False, "Add positions to the model when sequences outgrow them, in place of having all from the start.", "Model"
    )
    eval_sequences: int = option(8, "Held-out sequences per evaluation.", "Reports")

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be."""
        counts = dict.fromkeys(("eval_sequences", "shuffle_tokens"), at_least(1))
        return {**super().limits(), **counts, "held_out": FRACTION}

    @classmethod
    def with_end(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Add the task's own number of steps where no end is given, and the longest length of a schedule."""
        text = given.get("seq_len_schedule")
        if text is not None and given.get("seq_len") is None:
            given = {**given, "seq_len": max(Schedule.parse(text, "seq_len_schedule", low=2).values)}
        return super().with_end(given)

    def __post_init__(self) -> None:
        """Refuse what makes no sense, by the name of the setting."""
        super().__post_init__()
        lengths = self.lengths
        if lengths is not None and self.seq_len != max(lengths.values):
            raise ValueError(
                f"seq_len must be {max(lengths.values)}, the longest of seq_len_schedule {self.seq_len_schedule!r}, "
                f"got {self.seq_len}"
            )

    @property
    def lengths(self) -> Schedule | None:
        """How long sequences are as training goes, or None where that does not change."""
        text = self.seq_len_schedule
        return None if text is None else Schedule.parse(text, "seq_len_schedule", low=2)

    @property
    def streams(self) -> bool:
        """Whether blocks are made as training goes."""
        return self.streaming or self.seq_len_schedule is not None

    def length_at(self, step: int) -> int:
        """Return the length of the sequences of the step after ``step`` steps."""
        if self.lengths is None:
            return self.seq_len
        return self.lengths.at(step, 0.0 if self.max_steps is None else step / self.max_steps)

    def check_complete(self) -> None:
        """Refuse settings from which no run can start."""
        super().check_complete()
        if self.lengths is None:
            return
        name = f"seq_len_schedule {self.seq_len_schedule!r}"
        if self.max_epochs is not None:
            raise ValueError(f"{name} and max_epochs contradict each other: give max_steps")
        if self.lengths.by_fraction and (self.max_steps is None or self.max_minutes is not None):
            # A clock would give every run, and every process of it, other lengths.
            raise ValueError(f"{name} with fractions of the run needs max_steps alone; or give starts in steps")
        if self.keep == "best" or self.early_stopping is not None:
            asked = "keep 'best'" if self.keep == "best" else f"early_stopping {self.early_stopping}"
            way = "give --keep last" if self.keep == "best" else "leave it out"
            raise ValueError(f"{name} contradicts {asked}: evaluations at different lengths do not compare; {way}")

    def check_sources(self) -> None:
        """Refuse no text, or two sources of it."""
        sources = {"--text": self.text, "--dataset": self.dataset, "--standard-library": self.standard_library}
        given = [flag for flag, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one source of text")
        if not given:
            raise ValueError(f"no text to train on: give one of {', '.join(sources)}")
        self.refuse_without(self.dataset is not None, "text_column dataset_split", "--dataset, which is not given")
        about = "--streaming or --seq-len-schedule, which are not given"
        self.refuse_without(self.streams, "shuffle_tokens", about)


@dataclass(frozen=True)
class CausalSettings(TextSettings):
    """What a causal language model is asked for."""

    sample_tokens: int = option(300, "Tokens to generate at the end as a sample; 0 for none.", "Reports")

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be."""
        return {**super().limits(), "sample_tokens": at_least(0)}


@dataclass(frozen=True)
class MaskedSettings(TextSettings):
    """What a masked language model is asked for."""

    seq_len: int = option(512, "Tokens per sequence, at most.", "Data")
    batch_size: int = option(8, "Sequences per step and device.", "Optimizer")
    weight_decay: float = option(0.01, "Weight decay of AdamW.", "Optimizer")
    keep: str = option("best", "Weights to end with: the last ones, or the best held-out ones.", "Reports")
    eval_sequences: int = option(64, "Held-out sequences per evaluation.", "Reports")
    mask_probability: float = option(0.15, "Share of the words (or tokens) to be recovered.", "Data")
    mask_unit: str = option("word", "What is masked together: every token of a word, or single tokens.", "Data")
    STEPS: ClassVar[int | None] = 500

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be."""
        return {**super().limits(), "mask_probability": FRACTION, "mask_unit": one_of("word", "token")}


@dataclass(frozen=True)
class ExampleSettings(TrainingSettings):
    """What a task is asked for that learns from labelled examples."""

    dataset: str | None = option(None, "Examples: a file, a folder, or a name on the hub.", "Data")
    dataset_split: str = option("train", "Part of the dataset to train on.", "Data")
    validation: str | None = option(None, "Examples to be judged on: a file, a folder or a name on the hub.", "Data")
    validation_split: str | None = option(
        None, "Part to be judged on, of --validation, or else of --dataset; by default 'train' of --validation.", "Data"
    )
    held_out: float = option(0.1, "Fraction of the examples set aside for evaluation where none are named.", "Data")
    batch_size: int = option(4, "Sequences per step and device.", "Optimizer")
    weight_decay: float = option(0.01, "Weight decay of AdamW.", "Optimizer")
    keep: str = option("best", "Weights to end with: the last ones, or the best held-out ones.", "Reports")
    STEPS: ClassVar[int | None] = 500

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be."""
        return {**super().limits(), "held_out": FRACTION}

    def check_sources(self) -> None:
        """Refuse to start without examples."""
        if self.dataset is None:
            raise ValueError("no examples to train on: give --dataset")
        named = self.validation is not None or self.validation_split is not None
        if named and self.held_out != ExampleSettings().held_out:
            raise ValueError("--held-out and --validation contradict each other: are examples set aside, or named?")


@dataclass(frozen=True)
class ClassificationSettings(ExampleSettings):
    """What a classifier is asked for."""

    learning_rate: float = option(2e-3, "Highest learning rate of AdamW.", "Optimizer")
    text_column: str = option("text", "Column that holds the text.", "Data")
    label_column: str = option("label", "Column that holds the class: whole numbers or names.", "Data")


@dataclass(frozen=True)
class AnswerSettings(ExampleSettings):
    """What a model that finds answers in a text is asked for."""

    seq_len: int = option(4096, "Tokens of question and context together, per window.", "Data")
    doc_stride: int = option(128, "Tokens that neighbouring windows of a long context share.", "Data")
    max_answer_tokens: int | None = option(
        None, "Tokens that an answer may have; by default as many as the longest one trained on.", "Data"
    )

    def limits(self) -> dict[str, tuple[str, Callable[[Any], bool]]]:
        """Return what each setting may be."""
        return {**super().limits(), "doc_stride": at_least(0), "max_answer_tokens": at_least(1)}
