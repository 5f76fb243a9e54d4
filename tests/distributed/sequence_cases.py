"""What ranks that share sequences are asked to do, and one process, too: the same functions run in both.

A case gets ``spread``, which spreads a model over ranks, or does nothing, and returns tensors by name. All is fp64, so
that whatever differs by more than rounding shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_reformer as fr

Results = dict[str, Tensor]
Spread = Callable[[nn.Module], None]
FIELDS: dict[str, Any] = {
    "attn_layers": ["lsh", "local"],
    "hidden_size": 16,
    "num_attention_heads": 4,
    "attention_head_size": 6,
    "feed_forward_size": 24,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_hashes": 2,
    "num_buckets": 4,
    "hash_seed": 5,
    "axial_pos_shape": (8, 8),
    "axial_pos_embds_dim": (6, 10),
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "vocab_size": 20,
    "is_decoder": True,
}
LANGUAGE = fr.ReformerModelWithLMHead


def build(spread: Spread, kind: Any = LANGUAGE, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind(fr.ReformerConfig(**{**FIELDS, **changes})).double().train()
    spread(model)
    return model


def ids_of(length: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask_of(length: int) -> Tensor:
    """Pads behind the first row, and in the middle of the second."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, length - 9 :] = 0
    mask[1, 5:9] = 0
    return mask


def gradients(model: nn.Module) -> Results:
    return {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learned(model: nn.Module, loss: Tensor, **more: Tensor) -> Results:
    loss.backward()
    return {"loss": loss.detach(), **{name: x.detach() for name, x in more.items()}, **gradients(model)}


def causal(length: int, **changes: Any) -> Callable[[Spread], Results]:
    """A step of a language model, its logits never whole."""

    def run(spread: Spread) -> Results:
        model, ids = build(spread, **changes), ids_of(length)
        torch.manual_seed(3)
        return learned(model, model(ids, labels=ids, return_logits=False).loss)

    return run


def masked_language_model(spread: Spread) -> Results:
    model, ids = build(spread, fr.ReformerForMaskedLM, is_decoder=False), ids_of(43)
    labels = torch.where(ids % 3 == 0, ids, -100)
    out = model(ids, attention_mask=mask_of(43), labels=labels)
    return learned(model, out.loss, logits=out.logits)


def classifier(pooling: str, **changes: Any) -> Callable[[Spread], Results]:
    def run(spread: Spread) -> Results:
        kind, fields = fr.ReformerForSequenceClassification, {"num_labels": 3, "classifier_pooling": pooling, **changes}
        model = build(spread, kind, **fields)
        # Weights as large as trained ones, so that gradients reach what is below.
        for parameter in model.classifier.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
        out = model(ids_of(43), attention_mask=mask_of(43), labels=torch.tensor([0, 2]))
        return learned(model, out.loss, logits=out.logits)

    return run


def answers(spread: Spread) -> Results:
    model = build(spread, fr.ReformerForQuestionAnswering, is_decoder=False)
    places = torch.tensor([3, 41])
    out = model(ids_of(43), attention_mask=mask_of(43), start_positions=places, end_positions=places + 1)
    return learned(model, out.loss, start=out.start_logits, end=out.end_logits)


def everything_around(spread: Spread) -> Results:
    """Embeddings and head masks with gradients, positions, a loss on states between layers and on probabilities."""
    model = build(spread, fr.ReformerModel, chunk_size_feed_forward=5)
    random = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 37, 16, generator=random, dtype=torch.float64, requires_grad=True)
    head_mask = torch.rand(2, 4, generator=random, dtype=torch.float64, requires_grad=True)
    inputs = {
        "inputs_embeds": embeds,
        "head_mask": head_mask,
        "attention_mask": mask_of(37),
        "position_ids": torch.randperm(64, generator=random)[None, :37],
    }
    out = model(**inputs, output_hidden_states=True)
    weight = torch.randn(2, 37, 32, generator=random, dtype=torch.float64)
    loss = (out.last_hidden_state * weight).sum() + out.hidden_states[1].square().sum()
    found = learned(model, loss, state=out.hidden_states[1], last=out.last_hidden_state)
    found |= {"gradient of embeddings": embeds.grad, "gradient of the head mask": head_mask.grad}
    model.zero_grad()
    out = model(**inputs, output_attentions=True)
    seen = learned(model, sum(probs.square().sum() for probs in out.attentions))
    seen |= {f"probabilities {number}": probs.detach() for number, probs in enumerate(out.attentions)}
    return {**found, **{f"{name}, of probabilities": x for name, x in seen.items()}}


def steps_of_training(spread: Spread) -> Results:
    """Clipped AdamW, two batches a step, tied blocks, frozen words; one process's weights are what must come out."""
    model = build(spread)
    layers = model.reformer.encoder.layers
    layers[1].feed_forward = layers[0].feed_forward
    model.reformer.embeddings.word_embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = {}
    for step in range(2):
        for part in range(2):
            ids = ids_of(45, seed=10 * step + part)
            model(ids, labels=ids, return_logits=False, num_items_in_batch=176).loss.backward()
        found[f"norm {step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {**found, **{f"weight {name}": p.detach() for name, p in model.named_parameters()}}


@torch.no_grad()
def evaluation(spread: Spread) -> Results:
    model, ids = build(spread, hash_seed=None).eval(), ids_of(43)
    torch.manual_seed(7)
    found = {"logits": model(ids).logits, "kept": model(ids, logits_to_keep=3).logits}
    out = model(ids, labels=ids, attention_mask=mask_of(43))
    found |= {"loss": out.loss, "masked": out.logits}
    found["written"] = model.generate(ids[:, :20], max_new_tokens=3, do_sample=False)
    # A cache is filled by a rank on its own.
    found["cached"] = model(ids, use_cache=True).logits
    return found


def half_precision(spread: Spread) -> Results:
    """Under autocast; two roundings of bf16 differ, so numbers are judged together, and loosely."""
    model, ids = build(spread).float(), ids_of(45)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, return_logits=False).loss
    found = learned(model, loss)
    return {"loss": found.pop("loss"), "gradients": torch.cat([grad.flatten() for grad in found.values()])}


def own_head(spread: Spread) -> Results:
    """A head of the user's own, on whole hidden states, around a model that is spread."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reformer = fr.ReformerModel(fr.ReformerConfig(**FIELDS))
            self.head = nn.Linear(32, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.reformer(ids).last_hidden_state.tanh().mean(dim=1))

    torch.manual_seed(0)
    model = Custom().double().train()
    spread(model)
    return learned(model, F.cross_entropy(model(ids_of(41)), torch.tensor([0, 1])))


#: Runs on four ranks, each of which holds a quarter of the positions.
CASES: dict[str, Callable[[Spread], Results]] = {
    "a length that no number of ranks divides": causal(33, lsh_attn_chunk_length=5, local_attn_chunk_length=5),
    "several chunk lengths, learned positions": causal(43, lsh_attn_chunk_length=6, axial_pos_embds=False),
    "rotations of a drawn seed, automatic buckets": causal(45, hash_seed=None, num_buckets=None),
    "pairs counted once, within buckets": causal(
        45, lsh_attend_across_buckets=False, lsh_allow_duplicate_attention=False, wrap_around=False, num_hashes=3
    ),
    "within one chunk, fewer tokens than ranks": causal(3),
    "exact attention by choice": causal(45, full_attention_below=50),
    "plain autograd": causal(45, reversible=False, chunk_size_lm_head=7),
    "masked language model": masked_language_model,
    "classifier, first position": classifier("first", is_decoder=False),
    "classifier, last token": classifier("last"),
    "classifier, mean": classifier("mean"),
    "classifier, maximum": classifier("max"),
    "answers": answers,
    "everything around": everything_around,
    "steps of training": steps_of_training,
    "evaluation": evaluation,
    "half precision": half_precision,
    "own head": own_head,
}
