"""Masked language modelling: hidden words from the text on both sides."""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flash_reformer.models.modeling_language import ReformerForMaskedLM
from flash_reformer.training.data import hold_out
from flash_reformer.training.masking import MaskedBlocks, Masking, WordBlocks
from flash_reformer.training.packing import IGNORED_LABEL, pack
from flash_reformer.training.settings import MaskedSettings
from flash_reformer.training.tasks.causal import read_documents
from flash_reformer.training.tasks.task import Measure, Task
from flash_reformer.training.vocabulary import NO_WORD, Vocabulary


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

    def __init__(self, settings: MaskedSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        mask_id = vocabulary.add_mask_token()
        split = hold_out(read_documents(settings), settings.held_out)
        ordinary = torch.from_numpy(vocabulary.ordinary_ids())
        self.masking = Masking(mask_id, settings.mask_probability, ordinary)
        by_token = settings.mask_unit == "token"
        self.blocks = WordBlocks(pack(split.train, vocabulary), settings.seq_len, by_token=by_token)
        self.train = self.blocks
        judged = WordBlocks(pack(split.held_out, vocabulary), settings.seq_len, by_token=by_token)
        self.held_out = MaskedBlocks(judged.spread(settings.eval_sequences), self.masking, settings.seed)
        for name, text in (("training", self.blocks.text), ("held-out", judged.text)):
            if not np.any(text.words != NO_WORD):
                raise ValueError(f"the {name} text is white space: there is no word to mask")

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
        return float(self.blocks.length)

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

    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """There is nothing more to write."""
        return ("", ""), {}
