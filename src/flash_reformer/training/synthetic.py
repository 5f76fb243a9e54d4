"""Synthetic tasks whose answer only one mechanism can carry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_language import ReformerModelWithLMHead

WORD_LENGTH = 31
VOCAB_SIZE = 32


def duplication_batch(
    batch_size: int, vocab_size: int, word_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``0 w 0 w`` with w uniform over ``1..vocab_size-1`` (Reformer, section 5, "synthetic task").

    Returns:
        Tokens ``[batch_size, 2 * (word_length + 1)]`` and labels of the same shape, -100 outside the second w: the
        first is noise that nothing can predict.
    """
    words = torch.randint(1, vocab_size, (batch_size, word_length), generator=generator)
    half = torch.nn.functional.pad(words, (1, 0), value=0)
    ignored = torch.full((batch_size, word_length + 2), -100)
    return torch.cat([half, half], dim=1), torch.cat([ignored, words], dim=1)


def duplication_config(*, reversible: bool = True) -> ReformerConfig:
    """Return a model for words of 31 tokens in which only LSH attention can look into the first half.

    Local layers see their own chunk of 16 positions and nothing else; the answer lies 31 positions back. Each position
    has a vector of its own, at the scale of the words: under axial tables at their default scale, fifty times larger,
    tokens go unheard for long.
    """
    return ReformerConfig(
        attn_layers=["local", "lsh", "local", "lsh"],
        is_decoder=True,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_attention_heads=2,
        attention_head_size=32,
        feed_forward_size=128,
        axial_pos_embds=False,
        max_position_embeddings=2 * (WORD_LENGTH + 1),
        initializer_range=0.05,
        local_attn_chunk_length=16,
        local_num_chunks_before=0,
        lsh_attn_chunk_length=16,
        num_buckets=8,
        num_hashes=2,
        hidden_dropout_prob=0.05,
        local_attention_probs_dropout_prob=0.05,
        lsh_attention_probs_dropout_prob=0.05,
        reversible=reversible,
    )


def train_duplication(
    seed: int,
    steps: int,
    *,
    reversible: bool = True,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> ReformerModelWithLMHead:
    """Train a model on fresh duplications, AdamW with one warm-up and a cosine to zero; ``seed`` decides everything.

    ``on_step(step, loss)`` is called after each step.
    """
    torch.manual_seed(seed)
    model = ReformerModelWithLMHead(duplication_config(reversible=reversible)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        tokens, labels = duplication_batch(batch_size, VOCAB_SIZE, WORD_LENGTH, generator)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
    return model


def duplication_accuracy(
    model: ReformerModelWithLMHead, *, num_hashes: int | None = None, batch_size: int = 64
) -> float:
    """Return the share of the second word's tokens that ``model`` predicts, on held-out words, in evaluation."""
    tokens, labels = duplication_batch(batch_size, VOCAB_SIZE, WORD_LENGTH, torch.Generator().manual_seed(10**6))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        predicted = model(tokens, num_hashes=num_hashes).logits[:, :-1].argmax(-1)
    model.train(was_training)
    judged = labels[:, 1:] != -100
    return float((predicted == labels[:, 1:])[judged].double().mean())
