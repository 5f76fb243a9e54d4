"""Causal language modelling: every token from those before it."""

import math
from pathlib import Path
from typing import Any, ClassVar

from flash_reformer.models.modeling_language import ReformerModelWithLMHead
from flash_reformer.training.data import Document, hold_out
from flash_reformer.training.packing import PackedBlocks, pack
from flash_reformer.training.sampling import generate_text
from flash_reformer.training.settings import CausalSettings, TextSettings
from flash_reformer.training.sources import read_dataset, read_standard_library, read_text_files
from flash_reformer.training.tasks.task import Measure, Task
from flash_reformer.training.vocabulary import Vocabulary

# The sample starts with so many bytes of a text that the model has never seen.
PROMPT_BYTES = 200


def read_documents(settings: TextSettings) -> list[Document]:
    """Read the text that the settings name."""
    if settings.text:
        return read_text_files(settings.text)
    if settings.dataset is not None:
        return read_dataset(settings.dataset, column=settings.text_column, split=settings.dataset_split)
    return read_standard_library()


class CausalLanguageModelling(Task):
    """Trains :class:`ReformerModelWithLMHead` on packed text, judged in bits per byte and perplexity."""

    name = "clm"
    settings_class = CausalSettings
    model_class = ReformerModelWithLMHead
    measure: ClassVar[Measure] = Measure("bits per byte", "bits_per_byte", "bits_per_byte", greater_is_better=False)
    train: PackedBlocks
    held_out: PackedBlocks

    def __init__(self, settings: CausalSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        split = hold_out(read_documents(settings), settings.held_out)
        self.train = PackedBlocks(pack(split.train, vocabulary), settings.seq_len)
        held_out = PackedBlocks(pack(split.held_out, vocabulary), settings.seq_len)
        self.held_out = held_out.spread(settings.eval_sequences)
        self.prompt = split.held_out[0].data[:PROMPT_BYTES]

    def dictated_fields(self) -> dict[str, Any]:
        """Return what the vocabulary and causality dictate."""
        return {**super().dictated_fields(), "is_decoder": True}

    def loading_fields(self, architecture: str) -> dict[str, Any]:
        """Let a bidirectional model look back only."""
        return {"is_decoder": True}

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a block."""
        return float(self.train.length)

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
