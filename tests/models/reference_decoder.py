"""Cached decoding as SEMANTICS 5 defines it, written as loops in double precision: slow, and plain enough to be read.

It takes nothing from the package but a model's weights and configuration. A decoder holds one row: per layer the key
and value of every token, as they were when the token came. A step lays all of them out anew, hashes and sorts them
anew, and computes the last row of every layer. Where the package keeps orders, windows and dropped chunks, this keeps
nothing, so there is nothing to get out of step. At the end of the file: how tests drive the package's own decoding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_reformer.models.cache import ReformerCache
from tests.models.builders import generator, ids, mask


class Slot(NamedTuple):
    """A token's place in the bucket order of one round. ``token`` counts the row's real tokens."""

    round: int
    bucket: int
    token: int


def _softmax(scores: list[float]) -> tuple[list[float], float]:
    """Return probabilities and the log of the sum of exponentials."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = sum(powers)
    return [power / total for power in powers], top + math.log(total)


class ReferenceDecoder:
    """One row of a ``ReformerModelWithLMHead`` in evaluation mode: a prompt, then a token at a time.

    Args:
        model: whose weights and configuration to use; it needs ``hash_seed`` and the activation ``relu``.
        num_hashes: rounds, in place of the configuration's.
        reach: the length that an automatic bucket count is fixed for, as in ``generate``; None follows the length.
    """

    def __init__(self, model: Any, num_hashes: int | None = None, reach: int | None = None) -> None:
        assert not model.training
        self.config = model.config
        assert self.config.is_decoder
        assert self.config.hidden_act == "relu"
        self.weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.rounds = self.config.num_hashes if num_hashes is None else num_hashes
        self.reach = reach
        self.heads = self.config.num_attention_heads
        self.size = self.config.attention_head_size
        self.keys: list[list[Tensor]] = [[] for _ in self.config.attn_layers]
        self.values: list[list[Tensor]] = [[] for _ in self.config.attn_layers]
        self.next_position = 0

    def prefill(self, tokens: list[int], columns: list[int] | None = None, width: int | None = None) -> Tensor:
        """Return logits ``[n, V]`` of a full forward of the prompt, and keep its keys and values.

        Of a padded forward, ``columns`` are those of the real tokens (all, by default) and ``width`` is how many there
        are. Positions count real tokens.
        """
        assert self.next_position == 0, "the prompt comes first"
        columns = list(range(len(tokens))) if columns is None else columns
        return self._forward(tokens, columns, len(tokens) if width is None else width)

    def step(self, token: int) -> Tensor:
        """Return the logits ``[V]`` after one more token."""
        n = self.next_position + 1
        return self._forward([token], list(range(n)), n)[0]

    def steps(self, tokens: list[int]) -> Tensor:
        """Return the logits ``[m, V]`` after each of these tokens, which come one by one."""
        return torch.stack([self.step(token) for token in tokens])

    # --- everything around attention: SEMANTICS 3 and 4 ---------------------------------------------------------------

    def _forward(self, tokens: list[int], columns: list[int], width: int) -> Tensor:
        """Run new tokens; ``columns`` has where each token that is held or new stands among ``width``."""
        first = self.next_position
        self.next_position += len(tokens)
        embeds = [self._embed(token, first + i) for i, token in enumerate(tokens)]
        x1 = x2 = torch.stack(embeds)
        for index, kind in enumerate(self.config.attn_layers):
            name = f"reformer.encoder.layers.{index}"
            normed = self._norm(x2, f"{name}.attention.layer_norm")
            attended = self._attention(index, kind, normed, columns, width)
            x1 = x1 + self._linear(attended, f"{name}.attention.output.dense")
            widened = self._linear(
                self._norm(x1, f"{name}.feed_forward.layer_norm"), f"{name}.feed_forward.dense.dense"
            )
            x2 = x2 + self._linear(widened.clamp(min=0), f"{name}.feed_forward.output.dense")
        hidden = self._norm(torch.cat([x1, x2], dim=-1), "reformer.encoder.layer_norm")
        return self._linear(hidden, "lm_head.decoder") + self.weights["lm_head.bias"]

    def _embed(self, token: int, position: int) -> Tensor:
        name = "reformer.embeddings"
        word = self.weights[f"{name}.word_embeddings.weight"][token]
        if not self.config.axial_pos_embds:
            return word + self.weights[f"{name}.position_embeddings.embedding.weight"][position]
        parts, rest = [], position
        for axis in reversed(range(len(self.config.axial_pos_shape))):
            table = self.weights[f"{name}.position_embeddings.weights.{axis}"].flatten(0, -2)
            parts.append(table[rest % len(table)])
            rest //= len(table)
        assert rest == 0, "beyond the table"
        return word + torch.cat(parts[::-1])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        product = x @ self.weights[f"{name}.weight"].T
        return product if bias is None else product + bias

    # --- attention: SEMANTICS 1 and 2 ---------------------------------------------------------------------------------

    def _padded(self, width: int) -> int:
        lengths = {"lsh": self.config.lsh_attn_chunk_length, "local": self.config.local_attn_chunk_length}
        chunks = [lengths[kind] for kind in set(self.config.attn_layers) if lengths[kind] is not None]
        if not chunks or width <= min(chunks):
            return width
        whole = math.lcm(*chunks)
        return -(-width // whole) * whole

    def _attention(self, index: int, kind: str, normed: Tensor, columns: list[int], width: int) -> Tensor:
        """Return ``[m, H * D]`` for m new tokens, after adding their keys and values to what is held."""
        name = f"reformer.encoder.layers.{index}.attention.self_attention"
        project = {
            part: self._linear(normed, f"{name}.{part}").view(-1, self.heads, self.size)
            for part in (("query_key", "value") if kind == "lsh" else ("query", "key", "value"))
        }
        if kind == "lsh":
            query = project["query_key"]
            key = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(self.size)
        else:
            query, key = project["query"], project["key"] / math.sqrt(self.size)
        self.keys[index] += list(key)
        self.values[index] += list(project["value"])
        keys, values = torch.stack(self.keys[index]), torch.stack(self.values[index])
        first = len(keys) - len(query)
        chunk = self.config.lsh_attn_chunk_length if kind == "lsh" else self.config.local_attn_chunk_length
        padded = self._padded(width)
        exact = chunk is None or padded <= chunk or width <= self.config.full_attention_below
        rings = (
            []
            if exact or kind == "local"
            else self._rings(keys, padded, self._bucket_factors(self._padded(self.reach or width)))
        )
        out = torch.zeros_like(query)
        for head in range(self.heads):
            for row in range(len(query)):
                token = first + row
                scores = (keys[:, head] @ query[row, head]).tolist()
                if exact:
                    weights = self._exact_weights(token, scores, exclude_self=kind == "lsh")
                elif kind == "local":
                    weights = self._local_weights(token, scores, columns, padded)
                else:
                    weights = self._lsh_weights(token, scores, rings[head])
                out[row, head] = torch.tensor(weights, dtype=torch.float64) @ values[:, head]
        return out.flatten(1)

    def _exact_weights(self, token: int, scores: list[float], *, exclude_self: bool) -> list[float]:
        seen = [-1e5 if exclude_self and other == token else scores[other] for other in range(token + 1)]
        return _softmax(seen)[0] + [0.0] * (len(scores) - len(seen))

    def _local_weights(self, token: int, scores: list[float], columns: list[int], padded: int) -> list[float]:
        chunk, before = self.config.local_attn_chunk_length, self.config.local_num_chunks_before
        chunks = padded // chunk
        held = {column: other for other, column in enumerate(columns)}
        own = columns[token] // chunk
        seen: list[int] = []
        for other_chunk in range(own - before, own + 1):
            if other_chunk < 0 and not self.config.wrap_around:
                continue
            start = other_chunk % chunks * chunk
            there = [held[column] for column in range(start, start + chunk) if column in held]
            seen += [other for other in there if other <= token]
        weights = [0.0] * len(scores)
        for other, probability in zip(seen, _softmax([scores[other] for other in seen])[0], strict=True):
            weights[other] += probability
        return weights

    def _bucket_factors(self, padded: int) -> list[int]:
        config, chunk = self.config, self.config.lsh_attn_chunk_length
        if config.num_buckets is not None:
            return [config.num_buckets] if isinstance(config.num_buckets, int) else list(config.num_buckets)
        power = max(1, (2 * (padded // chunk)).bit_length() - 1)
        if 2**power > 2 * max(int(math.sqrt(config.max_position_embeddings // chunk)), chunk):
            return [2 ** (power // 2), 2 ** (power - power // 2)]
        return [2**power]

    def _rings(self, keys: Tensor, padded: int, factors: list[int]) -> list[list[Slot | None]]:
        """Return the ring of every head: all rounds' slots, end to end; None is an empty slot.

        Keys are hashed, which points where their raw vectors did: a bucket does not depend on a vector's length.
        """
        shape = (self.heads, self.size, self.rounds, sum(factors) // 2)
        rotations = torch.randn(shape, generator=generator(self.config.hash_seed), dtype=torch.float64)
        rings: list[list[Slot | None]] = []
        for head in range(self.heads):
            ring: list[Slot | None] = []
            for round_ in range(self.rounds):
                slots = []
                for token, rotated in enumerate((keys[:, head] @ rotations[head, :, round_]).tolist()):
                    bucket, stride, start = 0, 1, 0
                    for factor in factors:
                        part = rotated[start : start + factor // 2]
                        both = part + [-number for number in part]
                        bucket += stride * both.index(max(both))
                        stride, start = stride * factor, start + factor // 2
                    slots.append(Slot(round_, bucket, token))
                ring += sorted(slots)  # by bucket, then by position
                ring += [None] * (padded - len(slots))
            rings.append(ring)
        return rings

    def _lsh_weights(self, token: int, scores: list[float], ring: list[Slot | None]) -> list[float]:
        config, chunk = self.config, self.config.lsh_attn_chunk_length
        chunks, chunks_per_round = len(ring) // chunk, len(ring) // chunk // self.rounds
        windows: list[list[int]] = []
        for place, own in enumerate(ring):
            if own is None or own.token != token:
                continue
            seen: list[int] = []
            for other_chunk in range(place // chunk - config.lsh_num_chunks_before, place // chunk + 1):
                if other_chunk // chunks_per_round != own.round and not config.wrap_around:
                    continue
                start = other_chunk % chunks * chunk
                for slot in ring[start : start + chunk]:
                    if slot is None or slot.token > token:
                        continue
                    if config.lsh_attend_across_buckets or slot[:2] == own[:2]:
                        seen.append(slot.token)
            windows.append(seen)
        assert len(windows) == self.rounds
        appearances = Counter(other for seen in windows for other in seen)
        if config.lsh_allow_duplicate_attention:
            appearances = Counter(dict.fromkeys(appearances, 1))
        softened = [
            _softmax([(-1e5 if other == token else scores[other]) - math.log(appearances[other]) for other in seen])
            for seen in windows
        ]
        merge, _ = _softmax([lse for _, lse in softened])
        weights = [0.0] * len(scores)
        for share, seen, (probabilities, _) in zip(merge, windows, softened, strict=True):
            for other, probability in zip(seen, probabilities, strict=True):
                weights[other] += share * probability
        return weights


# --- the package's own decoding ---------------------------------------------------------------------------------------


@torch.no_grad()
def filled(model: Any, tokens: Tensor, **options: Any) -> tuple[Tensor, ReformerCache]:
    """Return the logits ``[B, T, V]`` of a full forward, and its cache."""
    output = model(tokens, use_cache=True, **options)
    return output.logits, output.past_buckets_states


@torch.no_grad()
def more(model: Any, cache: ReformerCache, tokens: Tensor, size: int | None = None, **options: Any) -> Tensor:
    """Return the logits ``[B, m, V]`` of m columns after those in a cache, ``size`` in a call (None: all of them).

    An ``attention_mask`` may be wider than a call needs: each gets the columns up to its own.
    """
    logits = []
    for piece in tokens.split(size or tokens.shape[1], dim=1):
        given = options
        if "attention_mask" in options:
            width = cache.get_seq_length() + piece.shape[1]
            given = {**options, "attention_mask": options["attention_mask"][:, :width]}
        logits.append(model(piece, past_key_values=cache, **given).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def uncached(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Return ``[B, T, V]``: at every length the last logits of a forward of so many tokens (and ``position_ids``)."""
    logits = []
    for n in range(1, tokens.shape[1] + 1):
        given = {
            name: value[:, :n] if name == "position_ids" and value is not None else value
            for name, value in options.items()
        }
        logits.append(model(tokens[:, :n], use_cache=False, **given).logits[:, -1:])
    return torch.cat(logits, dim=1)


def padded_calls(
    model: Any, kind: str, cache: ReformerCache | None = None, **options: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Run a prompt of three rows with pads of a kind, and calls with holes after it.

    Yields per row: its tokens, the columns of those in the prompt, the prompt's logits at all columns, and the steps'
    logits at the row's tokens. An empty ``cache`` may come along; then each row's prompt ends in a token.
    """
    tokens = ids(3, 33)
    real = (torch.rand(3, 33, generator=generator(7)) < 0.7).long()
    real[:, :13] = mask(kind, 3, 13)
    real[:, 12] |= int(cache is not None)
    real[1, 20:24] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": real[:, :13], "position_ids": positions[:, :13], "past_key_values": cache}
    first, cache = filled(model, tokens[:, :13], **given, **options)
    pieces = tokens[:, 13:].split((1, 1, 6, 2, 1, 9), dim=1)
    steps = torch.cat([more(model, cache, piece, attention_mask=real) for piece in pieces], dim=1)
    assert cache.get_seq_length() == 33
    for row in range(3):
        columns = real[row].nonzero().flatten()
        prompt, later = columns[columns < 13], columns[columns >= 13]
        yield tokens[row, columns], prompt, first[row], steps[row, later - 13]
