"""Masked language modelling: hidden words from the text on both sides."""

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flash_reformer.models.modeling_language import ReformerForMaskedLM
from flash_reformer.training.masking import MaskedBlocks, Masking, WordBlocks, word_row
from flash_reformer.training.packing import IGNORED_LABEL, pack
from flash_reformer.training.settings import MaskedSettings
from flash_reformer.training.stream_blocks import BlockStream
from flash_reformer.training.tasks.causal import blocks_per_pass, make_stream, open_text, warn_of_short_text
from flash_reformer.training.tasks.task import Measure, Task
from flash_reformer.training.vocabulary import NO_WORD, Encoded, Vocabulary


class MaskedLanguageModelling(Task):
    """Trains :class:`ReformerForMaskedLM` on packed text, judged by the share of hidden tokens that it recovers."""

    name = "mlm"
    settings_class = MaskedSettings
    model_class = ReformerForMaskedLM
    model_defaults: ClassVar[dict[str, Any]] = {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "hidden_size": 128,
        "num_attention_heads": 4,
        "attention_head_size": 32,
        "feed_forward_size": 256,
        "local_attn_chunk_length": 4,
        "local_num_chunks_after": 1,
        "lsh_attn_chunk_length": 32,
        "lsh_num_chunks_after": 1,
        "num_hashes": 2,
        "initializer_range": 0.05,
        "axial_norm_std": 0.05,
        "local_attention_probs_dropout_prob": 0.0,
    }
    measure: ClassVar[Measure] = Measure("accuracy on masked tokens", "masked_accuracy", "loss", greater_is_better=True)
    loss_only = False
    draws = True
    train: WordBlocks | BlockStream
    _judged_length = 0

    def __init__(self, settings: MaskedSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        mask_id = vocabulary.add_mask_token()
        train, held_out = open_text(settings, vocabulary)
        ordinary = torch.from_numpy(vocabulary.ordinary_ids())
        self.masking = Masking(mask_id, settings.mask_probability, ordinary)
        by_token = settings.mask_unit == "token"
        if isinstance(train, Encoded):
            self._check_words(train, "training")
            self.train = WordBlocks(train, settings.seq_len, by_token=by_token)
        else:
            self.train = make_stream(train, settings, overlap=0, make_row=partial(word_row, by_token=by_token))
        self._judged = pack(held_out, vocabulary)
        self._check_words(self._judged, "held-out")
        self.prepare_evaluation(0)

    @staticmethod
    def _check_words(text: Encoded, name: str) -> None:
        if not np.any(text.words != NO_WORD):
            raise ValueError(f"the {name} text is white space: there is no word to mask")

    def prepare_evaluation(self, steps: int) -> None:
        """Judge sequences as long as those of the last step, of about as much text at every length."""
        length = self.settings.length_at(max(0, steps - 1))
        if length == self._judged_length:
            return
        count = self.settings.eval_sequences * max(1, self.settings.seq_len // length)
        judged = WordBlocks(self._judged, length, by_token=self.settings.mask_unit == "token")
        self.held_out = MaskedBlocks(judged.spread(count), self.masking, self.settings.seed)
        self._judged_length = length

    def warn(self) -> None:
        """Say so where there is too little text for ``seq_len``."""
        warn_of_short_text(self.train, self._judged, self.settings.seq_len)

    def dictated_fields(self) -> dict[str, Any]:
        """Return what the vocabulary and two-sided attention dictate."""
        return {**super().dictated_fields(), "is_decoder": False}

    def loading_fields(self, architecture: str) -> dict[str, Any]:
        """Let a causal model look both ways."""
        return {"is_decoder": False}

    def check_model(self, model: Any) -> None:
        """Make room for the mask token, where the model's vocabulary ends right before it."""
        if model.config.vocab_size == self.masking.mask_id == self.vocabulary.size - 1:
            model.resize_token_embeddings(self.vocabulary.size)
        super().check_model(model)

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
        """Mask a training batch anew each time; held-out rows come masked."""
        if "words" not in inputs:
            return inputs
        # One draw on the default generator, which checkpoints keep: so a resumed run masks what it would have masked.
        seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator().manual_seed(seed)
        device = inputs["input_ids"].device
        ids, labels = self.masking.apply(inputs["input_ids"].cpu(), inputs["words"].cpu(), generator)
        return {"input_ids": ids.to(device), "labels": labels.to(device)}

    @staticmethod
    def reduce(logits: Any, labels: Any) -> torch.Tensor:
        """Keep the likeliest token of each position."""
        return logits.argmax(dim=-1)

    def judge(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return the share of hidden tokens that were found."""
        judged = labels != IGNORED_LABEL
        return {"masked_accuracy": float((predictions == labels)[judged].mean())}

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Add the perplexity of hidden tokens: of the mean over batches, which hide about as many tokens each."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            if self.settings.lengths is not None:
                logs["eval_seq_len"] = self._judged_length

    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """There is nothing more to write."""
        return ("", ""), {}
