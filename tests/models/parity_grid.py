"""The parity grid: which forwards are compared with transformers' Reformer ("HF"), and how. The benchmark uses it too.

Most cases run in fp64, on purpose. HF merges rounds by ``exp(z - logsumexp(z))``; in fp32, where a row sees only
itself, z is -1e5 and the difference is off by up to 0.004, so its weights do not sum to 1 (FAULTS F10). The same
happens in its softmax where such a row stands in its window twice, and later layers spread the error. A row without any
key (a masked one, in a local layer) has z = -1e9, where fp32 cannot see ``log W`` at all: HF's W weights are 1 each.
In fp64 the former is invisible and the latter costs 1e-8, which is why the tolerance there is not tighter; both sides
draw their rotations in fp64. So fp32 is compared for one round, windows without duplicates, and tokens that are real.

Not compared, because HF fails or is wrong there; other tests hold us to hand computations instead: axial positions on
three axes; ``position_ids`` where the input gets padded; chunk length None; windows that reach further than the ring is
long (HF's slices do not wrap twice), which nothing here does: a ring has two chunks or more, a window reaches two at
most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.models.builders import VOCAB, build, generator, hf_twin, ids, mask, relative_error

BATCH = 3
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
BOTH = (False, True)


@dataclass(frozen=True)
class Case:
    """One forward: a configuration, an input and the dtype."""

    family: str
    config: dict[str, Any]
    length: int = 19
    mask: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    position_ids: bool = False
    embeds: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        parts = [f"{key}={value}" for key, value in {**self.config, **self.call}.items()]
        parts += [f"T={self.length}", f"mask={self.mask}"] + ["position_ids"] * self.position_ids
        parts += ["embeds"] * self.embeds + ["fp32"] * (self.dtype == torch.float32)
        return f"{self.family}: {' '.join(parts)}".replace(" ", "_").replace("/", "|")

    def inputs(self) -> dict[str, Any]:
        """The arguments of the forward that ours and HF's share."""
        made: dict[str, Any] = dict(self.call)
        tokens = ids(BATCH, self.length, vocab=self.config.get("vocab_size", VOCAB))
        if self.embeds:
            shape = (BATCH, self.length, 11)
            made["inputs_embeds"] = torch.randn(shape, generator=generator(7), dtype=torch.float64).to(self.dtype)
        else:
            made["input_ids"] = tokens
        if self.mask is not None:
            made["attention_mask"] = mask(self.mask, BATCH, self.length)
        if self.position_ids:
            limit = 72
            made["position_ids"] = torch.randint(limit, (BATCH, self.length), generator=generator(11))
        return made


def _decoder(is_decoder: bool, **config: Any) -> dict[str, Any]:
    return {"is_decoder": is_decoder, **config}


MIXES = {
    "lsh": ["lsh", "lsh"],
    "local": ["local", "local"],
    "mixed": ["lsh", "local", "lsh"],
    "deep": ["local", "lsh", "local", "local", "lsh", "lsh"],
}
MASKS = (None, "right", "left", "scattered", "whole row")


def _layers() -> Iterator[Case]:
    for layers, is_decoder, kind in itertools.product(MIXES.values(), BOTH, MASKS):
        yield Case("layers", _decoder(is_decoder, attn_layers=layers), 24, kind)


def _hashes() -> Iterator[Case]:
    for num_hashes, is_decoder, kind in itertools.product((1, 2, 3, 4), BOTH, (None, "scattered")):
        yield Case("hashes", _decoder(is_decoder, num_hashes=num_hashes), 21, kind)
    for (ours, call), is_decoder in itertools.product(((1, 3), (2, 1), (2, 4)), BOTH):
        yield Case("hashes", _decoder(is_decoder, num_hashes=ours), 20, "right", {"num_hashes": call})


def _buckets() -> Iterator[Case]:
    counts = (2, 6, 8, [4], [2, 4], [4, 2], [6, 2], [2, 4, 2], None)
    for num_buckets, is_decoder in itertools.product(counts, BOTH):
        yield Case("buckets", _decoder(is_decoder, num_buckets=num_buckets, num_hashes=2), 27, "left")
    # Chunks this short make automatic counts above 2 * isqrt(72 / 2) = 12 factorise.
    short = {"num_buckets": None, "lsh_attn_chunk_length": 2, "local_attn_chunk_length": 2}
    for length, is_decoder in itertools.product((5, 16, 37, 70), BOTH):
        yield Case("buckets", _decoder(is_decoder, **short), length)


def _chunks() -> Iterator[Case]:
    pairs = ((2, 3), (3, 2), (4, 6), (6, 4), (2, 8), (5, 3))
    for (lsh, local), length, is_decoder in itertools.product(pairs, (17, 24), BOTH):
        config = {"lsh_attn_chunk_length": lsh, "local_attn_chunk_length": local, "num_hashes": 2}
        yield Case("chunks", _decoder(is_decoder, **config), length)


def _windows() -> Iterator[Case]:
    for before, after, num_hashes in itertools.product((0, 1, 2), (0, 1, 2), (1, 2)):
        sizes = {f"{kind}_num_chunks_{side}": n for kind in ("lsh", "local") for side, n in _sides(before, after)}
        yield Case("windows", _decoder(False, num_hashes=num_hashes, **sizes), 22, "right")
        if after == 0:
            yield Case("windows", _decoder(True, num_hashes=num_hashes, **sizes), 22, "right")
    # A ring of two chunks: keys stand in a window twice and count twice.
    for before, after in ((1, 1), (2, 0), (2, 2)):
        sizes = {f"{kind}_num_chunks_{side}": n for kind in ("lsh", "local") for side, n in _sides(before, after)}
        yield Case("windows", _decoder(False, **sizes), 8)


def _sides(before: int, after: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("before", before), ("after", after)


def _lengths() -> Iterator[Case]:
    for length, is_decoder in itertools.product((1, 2, 3, 4, 5, 7, 8, 13, 31, 43, 71), BOTH):
        yield Case("lengths", _decoder(is_decoder), length)
    for length, is_decoder in itertools.product((3, 4, 5, 11), BOTH):
        yield Case("lengths", _decoder(is_decoder), length, "left")


def _heads() -> Iterator[Case]:
    for (heads, size), is_decoder in itertools.product(((1, 7), (2, 16), (5, 2), (3, 1)), BOTH):
        yield Case("heads", _decoder(is_decoder, num_attention_heads=heads, attention_head_size=size), 23)


def _positions() -> Iterator[Case]:
    # HF pads ids but not position_ids: lengths that need no padding.
    for axial, given, length, is_decoder in itertools.product(BOTH, BOTH, (3, 16), BOTH):
        config = _decoder(is_decoder, axial_pos_embds=axial)
        yield Case("positions", config, length, "left", position_ids=given)
    for shape, is_decoder in itertools.product(([12, 6], [1, 72], [72, 1], [9, 8]), BOTH):
        yield Case("positions", _decoder(is_decoder, axial_pos_shape=shape), 18)


def _details() -> Iterator[Case]:
    for act, is_decoder in itertools.product(("relu", "gelu", "gelu_new", "silu"), BOTH):
        yield Case("details", _decoder(is_decoder, hidden_act=act), 13)
    # HF's chunks must divide the length. Ours need not: test_heads.py compares those with unchunked ones.
    for (forward, head), is_decoder in itertools.product(((4, 0), (0, 5), (1, 4)), BOTH):
        config = _decoder(is_decoder, chunk_size_feed_forward=forward, chunk_size_lm_head=head)
        yield Case("details", config, 20, "right")
    for length, kind, is_decoder in itertools.product((3, 18), (None, "left"), BOTH):
        yield Case("details", _decoder(is_decoder), length, kind, embeds=True)
    for eps in (1e-12, 1e-2):
        yield Case("details", _decoder(True, layer_norm_eps=eps, pad_token_id=0), 10)


def grid() -> list[Case]:
    """All cases, each once."""
    families = (_layers, _hashes, _buckets, _chunks, _windows, _lengths, _heads, _positions, _details)
    cases = [case for family in families for case in family()]
    for case in [*_layers(), *_lengths(), *_heads(), *_positions()]:
        if case.length in (5, 13, 16, 23, 24, 43):
            cases.append(Case(**{**vars(case), "family": "fp32", "dtype": torch.float32}))
    return cases


def model_of(case: Case, **changes: Any) -> Any:
    """Our language model for a case: causal or masked, in the case's dtype."""
    name = "ReformerModelWithLMHead" if case.config["is_decoder"] else "ReformerForMaskedLM"
    return build(name, **{**case.config, **changes}).to(case.dtype)


@torch.no_grad()
def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, last hidden state and hidden states, all at the caller's length; masked tokens are among them."""
    T = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[1]
    whole = model(**inputs, output_hidden_states=True)
    base = model.reformer(**inputs)
    # HF returns hidden states at the padded length.
    states = {f"hidden_states[{i}]": state[:, :T] for i, state in enumerate(whole.hidden_states)}
    return {"logits": whole.logits, "last_hidden_state": base.last_hidden_state, **states}


def errors(case: Case, model: Any, actual: dict[str, Tensor]) -> dict[str, float]:
    """The relative error against HF of every output that ``model`` gave for a case."""
    inputs = case.inputs()
    expected = outputs_of(hf_twin(model), inputs)
    assert actual.keys() == expected.keys()
    assert all(value.dtype == case.dtype for value in actual.values())
    compared = torch.ones(BATCH, case.length, dtype=torch.bool)
    if case.dtype == torch.float32 and case.mask is not None:
        compared = inputs["attention_mask"].bool()
    return {name: relative_error(actual[name][compared], expected[name][compared]) for name in actual}
