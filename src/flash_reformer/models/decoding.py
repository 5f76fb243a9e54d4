"""Cached forwards of the stack: a full forward that fills a cache, and steps that go on from it.

Letters: B batch, T positions, E hidden size. Columns are what callers count, pads included; a row's tokens are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_reformer.layers.call import Call
from flash_reformer.layers.decode_step import Factors, Step
from flash_reformer.layers.decode_storage import Fill
from flash_reformer.models import inputs as door
from flash_reformer.models.cache import ReformerCache


@dataclass(frozen=True)
class Compact:
    """Each row's tokens taken out of the columns of a call, in order.

    Attributes:
        counts: tokens per row.
        places: ``[B, max(counts)]``, the columns they stood in; None where every column is a token.
    """

    counts: list[int]
    places: Tensor | None

    @staticmethod
    def of(mask_BT: Tensor | None, batch_size: int, columns: int) -> Compact:
        """Read a mask, bool ``[B, T]``. The one place where a call waits for the device."""
        counts = [columns] * batch_size if mask_BT is None else mask_BT.sum(dim=1).tolist()
        if mask_BT is None or min(counts) == columns:
            return Compact(counts, None)
        # Tokens first, each kind in its order.
        return Compact(counts, torch.sort(~mask_BT, dim=1, stable=True).indices[:, : max([*counts, 1])])

    def checked(self, what: str) -> Compact:
        """Return it; raise ``ValueError`` if a row has no token."""
        if 0 in self.counts:
            raise ValueError(f"attention_mask must leave every row a {what}; row {self.counts.index(0)} has none")
        return self

    def mask_of(self, inputs: door.Inputs) -> Tensor | None:
        """Return the mask that this was read from; None where every column is a token."""
        return None if self.places is None else inputs.mask_BT

    def take(self, x_BTX: Tensor) -> Tensor:
        """Return ``[B, max(counts), ...]``; what stands behind a row's tokens means nothing."""
        if self.places is None:
            return x_BTX
        rows = torch.arange(self.places.shape[0], device=x_BTX.device).unsqueeze(-1)
        return x_BTX.expand(self.places.shape[0], *x_BTX.shape[1:])[rows, self.places]

    def put_back(self, x_BTX: Tensor, columns: int) -> Tensor:
        """Return ``[B, columns, ...]``, zero where there is no token."""
        if self.places is None:
            return x_BTX
        out = x_BTX.new_zeros(x_BTX.shape[0], columns, *x_BTX.shape[2:])
        for row, count in enumerate(self.counts):
            out[row, self.places[row, :count]] = x_BTX[row, :count]
        return out

    def last(self, x_BTX: Tensor) -> Tensor:
        """Return ``[B, 1, ...]``: what stands at each row's last token, of compact ``x``; anything if it has none."""
        ends = [max(count, 1) for count in self.counts]
        if len(set(ends)) == 1:
            return x_BTX[:, ends[0] - 1 : ends[0]]
        rows = torch.arange(len(ends), device=x_BTX.device)
        return x_BTX[rows, torch.tensor(ends, device=x_BTX.device) - 1].unsqueeze(1)


def unpadded(given: Tensor, position_ids: Tensor | None) -> door.Inputs:
    """Return ids ``[B, T]`` or embeddings ``[B, T, E]`` as a batch without pads."""
    ids, embeds = (given, None) if given.dim() == 2 else (None, given)
    return door.Inputs(ids, embeds, None, position_ids)


class CachedForwards:
    """The part of :class:`ReformerModel` that knows the cache."""

    def context(self: Any) -> tuple[Any, ...]:
        """Return dtype, device and autocast dtype, which what is cached depends on."""
        weight = self.embeddings.word_embeddings.weight
        kind = weight.device.type
        # Weights that are brought from disk when needed say "meta".
        autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        return (weight.dtype, str(weight.device), autocast)

    def check_cache(self: Any, past_buckets_states: Any, past_key_values: Any) -> ReformerCache | None:
        """Return the cache that was given under either name.

        Raises:
            TypeError, ValueError: if it is no cache of this model, in evaluation mode.
        """
        given = [cache for cache in (past_buckets_states, past_key_values) if cache is not None]
        if len(given) == 2 and given[0] is not given[1]:
            raise ValueError("past_buckets_states and past_key_values are two names of one thing: give one")
        name = "past_buckets_states" if past_buckets_states is not None else "past_key_values"
        cache = past_buckets_states if past_buckets_states is not None else past_key_values
        if cache is None:
            return None
        if not isinstance(cache, ReformerCache):
            raise TypeError(
                f"{name} must be a ReformerCache, which a forward with use_cache=True returns; "
                f"got {type(cache).__name__}"
            )
        if self.training:
            raise ValueError(f"{name} must be None in training: call model.eval() before decoding")
        cache.check_model(self, self.config, self.context())
        return cache

    def _factors_of_row(self: Any, cache: ReformerCache) -> Callable[[int, int], Factors]:
        """Return the bucket count of a row at a length: fixed where it is known how long the row may get."""
        layout, known = cache.layout, cache.known_factors

        def factors(row: int, length: int) -> Factors:
            reach = cache.reaches[row] if cache.reaches else None
            padded = layout.padded(length if reach is None else reach)
            if padded not in known:
                known[padded] = self._bucket_factors(padded)
            return known[padded]

        return factors

    def _begin(self: Any, cache: ReformerCache, num_hashes: int | None, columns: int, counts: list[int]) -> None:
        """Settle what holds as long as the cache lives: seed, rounds, how long rows may get."""
        limit = self.config.max_length_of_positions
        reach = cache.reach
        cache.own(self)
        cache.settle_layout(self._exact_below(num_hashes))
        cache.context = self.context()
        cache.seed = self._draw_seed()
        cache.seeds_LX = self._seeds_of_layers(cache.seed)
        cache.num_hashes = self.config.num_hashes if num_hashes is None else num_hashes
        cache.reaches = [None if reach is None else min(limit, reach - (columns - n)) for n in counts]

    def fill_cache(
        self: Any, cache: ReformerCache, inputs: door.Inputs, num_hashes: int | None
    ) -> tuple[Fill, Compact]:
        """Prepare an empty cache for a plain forward of the batch."""
        compact = Compact.of(inputs.mask_BT, inputs.batch_size, inputs.length)
        self._begin(cache, num_hashes, inputs.length, compact.counts)
        rows = list(range(inputs.batch_size))
        return Fill(cache.states, rows, rows, compact.counts, compact.places, compact.counts), compact

    def finish_filling(self: Any, cache: ReformerCache, inputs: door.Inputs, compact: Compact) -> None:
        """Count what a plain forward has put into the cache."""
        offsets = [0] * inputs.batch_size
        if inputs.position_ids is not None or compact.places is not None:
            # A plain forward counts pads, too: a row goes on after the position of its last token.
            given = door.positions(inputs, inputs.length, self.config.max_length_of_positions)
            ends = compact.last(compact.take(given).expand(inputs.batch_size, -1)).flatten().tolist()
            offsets = [end + 1 - n if n else 0 for end, n in zip(ends, compact.counts, strict=True)]
        cache.commit(compact.counts, compact.mask_of(inputs), inputs.length, offsets)

    def step_cache(
        self: Any,
        cache: ReformerCache,
        inputs: door.Inputs,
        num_hashes: int | None,
        head_masks: list[Tensor | None],
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what a full forward would, ``[B, T, 2E]`` and states, for new columns; the cache grows by them."""
        compact = Compact.of(inputs.mask_BT, inputs.batch_size, inputs.length)
        hidden, states, offsets = self._step(cache, inputs, compact, num_hashes, head_masks, output_hidden_states)
        cache.commit(compact.counts, compact.mask_of(inputs), inputs.length, offsets)
        return compact.put_back(hidden, inputs.length), [compact.put_back(s, inputs.length) for s in states]

    def _step(
        self: Any,
        cache: ReformerCache,
        inputs: door.Inputs,
        compact: Compact,
        num_hashes: int | None,
        head_masks: list[Tensor | None],
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[int]]:
        """Run new tokens, compact, and return their hidden states and the rows' new offsets. Commits nothing."""
        counts = compact.counts
        cache.check_rounds(num_hashes)
        given = compact.take(inputs.given)
        new = given.shape[1]
        positions_XT, offsets = self._positions_of(cache, inputs, compact, new)
        step = Step(
            Call(
                mask_BT=None,
                num_hashes=cache.num_hashes or 0,
                bucket_factors=(),
                rotation_seed=self._rotation_seed(),
                seeds_LX=cache.seeds_LX,
                exact=False,
                backend=self._backend,
            ),
            cache.layout,
            cache.lengths,
            counts,
            new,
            self._factors_of_row(cache),
            given.device,
        )
        embeds_BTE = self._embed_at(given, positions_XT)
        # A step is hundreds of small operations, and inference mode makes each of them cheaper. What is kept is made
        # by ``ordinary_tensors``, and so is what is returned.
        with torch.inference_mode():
            hidden_BTX, states = self.encoder.decode(embeds_BTE, step, cache.states, head_masks, output_hidden_states)
        return hidden_BTX.clone(), [state.clone() for state in states], offsets

    def _positions_of(
        self: Any, cache: ReformerCache, inputs: door.Inputs, compact: Compact, new: int
    ) -> tuple[Tensor, list[int]]:
        """Return positions ``[X, T]`` of new tokens, and how far the rows' positions are ahead of their counts then."""
        limit = self.config.max_length_of_positions
        device, counts, offsets = inputs.given.device, compact.counts, cache.offsets
        if inputs.position_ids is not None:
            positions = compact.take(inputs.position_ids)
            ends = compact.last(positions.expand(len(counts), -1)).flatten().tolist()
            triples = zip(ends, cache.lengths, counts, offsets, strict=True)
            return positions, [end + 1 - n - c if c else offset for end, n, c, offset in triples]
        starts = [n + offset for n, offset in zip(cache.lengths, offsets, strict=True)]
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        if longest > limit:
            raise ValueError(
                f"with what is cached, the input comes to {longest} tokens, but the position table holds {limit}"
            )
        if len(set(starts)) == 1:
            starts = starts[:1]
        positions = torch.tensor(starts, device=device).unsqueeze(-1) + torch.arange(new, device=device)
        # What fills up a row may lie beyond the table.
        return positions.clamp_(max=limit - 1), offsets

    # --- rows alone, for generate -------------------------------------------------------------------------------------

    def prefill_rows(
        self: Any, cache: ReformerCache, inputs: door.Inputs, num_hashes: int | None, chunk_size: int | None
    ) -> Tensor:
        """Fill an empty cache, each row as if it were alone, and return ``[B, 1, 2E]`` at each row's last token.

        ``chunk_size`` runs only so many of a row's tokens by a full forward and the others by steps of so many.
        """
        columns = inputs.length
        compact = Compact.of(inputs.mask_BT, inputs.batch_size, columns).checked("token")
        with cache.filling():
            self._begin(cache, num_hashes, columns, compact.counts)
            firsts = [min(count, chunk_size or count) for count in compact.counts]
            last = self._prefill_first(cache, inputs, compact, firsts)
            offsets = [0] * len(firsts)
            if inputs.position_ids is not None:
                ends = compact.take(inputs.position_ids).expand(len(firsts), -1)
                offsets = [int(ends[row, first - 1]) + 1 - first for row, first in enumerate(firsts)]
            cache.commit(firsts, None, 0, offsets)
            last = self._steps_after(cache, inputs, compact, firsts, chunk_size, last)
            cache.commit([0] * len(firsts), compact.mask_of(inputs), columns, cache.offsets)
        return last

    def _prefill_first(
        self: Any, cache: ReformerCache, inputs: door.Inputs, compact: Compact, firsts: list[int]
    ) -> Tensor:
        """Run the first tokens of rows, those of equal length and bucket count together."""
        given = compact.take(inputs.given)
        positions = None if inputs.position_ids is None else compact.take(inputs.position_ids)
        factors_of = self._factors_of_row(cache)
        groups: dict[tuple[int, Factors], list[int]] = {}
        for row, first in enumerate(firsts):
            factors = factors_of(row, first)
            groups.setdefault((first, factors), []).append(row)
        lasts: list[Tensor | None] = [None] * len(firsts)
        for (first, factors), rows in groups.items():
            index = torch.tensor(rows, device=given.device)
            tokens = given[index, :first]
            source = list(range(len(rows)))
            if positions is None and tokens.dim() == 2 and len(rows) > 1:
                # Beams and several sequences per prompt start as copies.
                tokens, copies = torch.unique(tokens, dim=0, return_inverse=True)
                source = copies.tolist()
            part = unpadded(tokens, None if positions is None else positions.expand(len(firsts), -1)[index, :first])
            fill = Fill(cache.states, rows, source, [first] * len(rows), None, firsts)
            hidden = self._encode(part, cache.num_hashes, cache.seed, factors=factors, fill=fill)[0]
            for row, sequence in zip(rows, source, strict=True):
                lasts[row] = hidden[sequence, first - 1 : first]
        return torch.stack([last for last in lasts if last is not None])

    def _steps_after(
        self: Any,
        cache: ReformerCache,
        inputs: door.Inputs,
        compact: Compact,
        done: list[int],
        chunk_size: int | None,
        last: Tensor | None,
    ) -> Tensor:
        """Run rows' tokens from ``done`` on by steps of ``chunk_size``; return ``[B, 1, 2E]`` at the last ones."""
        given = compact.take(inputs.given)
        positions = None if inputs.position_ids is None else compact.take(inputs.position_ids)
        head_masks: list[Tensor | None] = [None] * self.config.num_hidden_layers
        while any(begin < count for begin, count in zip(done, compact.counts, strict=True)):
            left = [count - begin for begin, count in zip(done, compact.counts, strict=True)]
            counts = [min(n, chunk_size or n) for n in left]
            places = torch.tensor(done, device=given.device).unsqueeze(-1) + torch.arange(
                max(counts), device=given.device
            )
            part = Compact(counts, places.clamp(max=given.shape[1] - 1))
            taken = unpadded(part.take(given), None if positions is None else part.take(positions))
            hidden, _, offsets = self._step(cache, taken, Compact(counts, None), None, head_masks)
            newest = Compact(counts, None).last(hidden)
            if last is None:
                last = newest
            else:
                moved = torch.tensor([n > 0 for n in counts], device=hidden.device).view(-1, 1, 1)
                last = torch.where(moved, newest, last)
            cache.commit(counts, None, 0, offsets)
            done = [begin + n for begin, n in zip(done, counts, strict=True)]
        assert last is not None
        return last

    def extend_rows(
        self: Any, cache: ReformerCache, inputs: door.Inputs, num_hashes: int | None, chunk_size: int | None
    ) -> Tensor:
        """Go on from a filled cache and return ``[B, 1, 2E]`` at each row's last new token."""
        compact = Compact.of(inputs.mask_BT, inputs.batch_size, inputs.length).checked("new token")
        cache.check_rounds(num_hashes)
        none = [0] * inputs.batch_size
        # All of it, before the first piece changes anything.
        self._positions_of(cache, inputs, compact, 1)
        with cache.extending():
            last = self._steps_after(cache, inputs, compact, none, chunk_size, None)
            cache.commit(none, compact.mask_of(inputs), inputs.length, cache.offsets)
        return last
