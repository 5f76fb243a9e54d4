"""Causal language modelling: every token from those before it."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from flash_reformer.models.modeling_language import ReformerModelWithLMHead
from flash_reformer.training.data import Document, hold_out
from flash_reformer.training.packing import PackedBlocks, pack
from flash_reformer.training.sampling import generate_text
from flash_reformer.training.settings import CausalSettings, TextSettings
from flash_reformer.training.sources import read_dataset, read_standard_library, read_text_files
from flash_reformer.training.stream_blocks import BlockStream
from flash_reformer.training.stream_pieces import MemorySource, TokenSource
from flash_reformer.training.stream_text import stream_text
from flash_reformer.training.tasks.task import Measure, Task
from flash_reformer.training.vocabulary import Encoded, Vocabulary

# The sample starts with so many bytes of a text that the model has never seen.
PROMPT_BYTES = 200


def read_documents(settings: TextSettings) -> list[Document]:
    """Read the text that the settings name."""
    if settings.text:
        return read_text_files(settings.text)
    if settings.dataset is not None:
        return read_dataset(settings.dataset, column=settings.text_column, split=settings.dataset_split)
    return read_standard_library()


def open_text(settings: TextSettings, vocabulary: Vocabulary) -> tuple[Encoded | TokenSource, Sequence[Document]]:
    """Return what to learn from, packed or as a source that is read as training goes, and what is held out."""
    if settings.streaming:
        if settings.max_epochs is not None and not (vocabulary.is_bytes and settings.dataset is None):
            raise ValueError(
                "max_epochs needs the number of tokens, which --streaming knows for files and --tokenizer bytes only: "
                "give --max-steps or --max-minutes"
            )
        text = stream_text(settings, vocabulary)
        return text.train, text.held_out
    split = hold_out(read_documents(settings), settings.held_out)
    train = pack(split.train, vocabulary)
    return (MemorySource(train) if settings.streams else train), split.held_out


def make_stream(source: TokenSource, settings: TextSettings, **options: Any) -> BlockStream:
    """Return a stream of blocks as the settings ask for it."""
    return BlockStream(
        source,
        length_at=settings.length_at,
        rows=settings.batch_size,
        longest=settings.seq_len,
        accumulation=settings.gradient_accumulation,
        seed=settings.seed,
        shuffle_tokens=settings.shuffle_tokens,
        **options,
    )


def warn_of_short_text(train: PackedBlocks | BlockStream, held_out: Encoded, seq_len: int) -> None:
    """Say so where sequences will be shorter than what was asked for."""
    learnt = train.source.tokens if isinstance(train, BlockStream) else len(train.text.ids)
    for kind, tokens in (("training", learnt), ("held-out", len(held_out.ids))):
        if tokens is not None and tokens < seq_len:
            warnings.warn(
                f"seq_len is {seq_len}, but the {kind} text has {tokens} tokens: no {kind} sequence is longer",
                stacklevel=4,
            )


def blocks_per_pass(train: PackedBlocks | BlockStream) -> int:
    """Return the number of blocks of a pass over the text."""
    if not isinstance(train, BlockStream):
        return len(train)
    assert train.blocks_per_pass is not None  # max_epochs is refused where it is unknown
    return train.blocks_per_pass


class CausalLanguageModelling(Task):
    """Trains :class:`ReformerModelWithLMHead` on packed text, judged in bits per byte and perplexity."""

    name = "clm"
    settings_class = CausalSettings
    model_class = ReformerModelWithLMHead
    measure: ClassVar[Measure] = Measure("bits per byte", "bits_per_byte", "bits_per_byte", greater_is_better=False)
    train: PackedBlocks | BlockStream
    held_out: PackedBlocks

    def __init__(self, settings: CausalSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        train, held_out = open_text(settings, vocabulary)
        if isinstance(train, Encoded):
            self.train = PackedBlocks(train, settings.seq_len)
        else:
            self.train = make_stream(train, settings)
        self._judged = pack(held_out, vocabulary)
        self.prepare_evaluation(0)
        self.prompt = held_out[0].data[:PROMPT_BYTES]

    def prepare_evaluation(self, steps: int) -> None:
        """Judge sequences as long as those of the last step, of about as much text at every length."""
        length = self.settings.length_at(max(0, steps - 1))
        count = self.settings.eval_sequences * max(1, self.settings.seq_len // length)
        self.held_out = PackedBlocks(self._judged, length).spread(count)

    def warn(self) -> None:
        """Say so where there is too little text for ``seq_len``."""
        warn_of_short_text(self.train, self._judged, self.settings.seq_len)

    def dictated_fields(self) -> dict[str, Any]:
        """Return what the vocabulary and causality dictate."""
        return {**super().dictated_fields(), "is_decoder": True}

    def loading_fields(self, architecture: str) -> dict[str, Any]:
        """Let a bidirectional model look back only."""
        return {"is_decoder": True}

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a block."""
        return float(self.train.longest if isinstance(self.train, BlockStream) else self.train.length)

    def tokens_of(self, steps: int) -> float:
        """Tokens of the blocks that a process sees."""
        return self.train.tokens_of(steps) if isinstance(self.train, BlockStream) else super().tokens_of(steps)

    @property
    def rows_per_pass(self) -> int:
        """Blocks in a pass over the text."""
        return blocks_per_pass(self.train)

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Ask for the loss alone: no cache is built, and logits are never held for the whole sequence."""
        return {**inputs, "return_logits": False, "use_cache": False}

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Add bits per byte and, for held-out text, the perplexity per token."""
        if "loss" in logs:
            logs["bits_per_byte"] = self.train.bits_per_byte(logs["loss"])
        if "eval_loss" in logs:
            logs["eval_bits_per_byte"] = self.held_out.bits_per_byte(logs["eval_loss"])
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            if self.settings.lengths is not None:
                logs["eval_seq_len"] = self.held_out.length

    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """Let the model go on from a held-out text."""
        if not self.settings.sample_tokens:
            return ("", ""), {}
        # Half of a small position table for the prompt, the other half for what the model makes of it.
        room = model.config.max_length_of_positions - 1
        prompt = self.prompt
        while prompt and len(self.vocabulary.encode(prompt).ids) > max(1, room // 2):
            prompt = prompt[: len(prompt) // 2]
        used = len(self.vocabulary.encode(prompt).ids)
        written = generate_text(
            model.eval(),
            prompt,
            vocabulary=self.vocabulary,
            max_new_tokens=max(1, min(self.settings.sample_tokens, room - used)),
            temperature=0.8,
            seed=self.settings.seed,
        )
        sample = (prompt.decode("utf-8", errors="replace"), written.decode("utf-8", errors="replace"))
        path = folder / "sample.txt"
        path.write_text("".join(sample), encoding="utf-8")
        return sample, {"sample": path}
