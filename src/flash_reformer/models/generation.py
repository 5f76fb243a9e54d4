"""Generation without a cache: slow, and right. Each row is computed as if it were alone.

A padded forward shares one ring of chunks among real tokens and pads, so pads change who sees whom. Here every
row's real tokens are taken out of the batch, wherever its pads stand, and rows of one length run together. So a
row gets the logits that it gets alone, with its own positions and its own number of buckets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_reformer.models.inputs import check_inputs
from flash_reformer.models.outputs import ReformerModelWithLMHeadOutput

_NO_CACHE = "decoding is not cached in this version"
_REFUSED = {
    "position_ids": "positions follow from attention_mask",
    "past_key_values": _NO_CACHE,
    "past_buckets_states": _NO_CACHE,
    "cache_implementation": _NO_CACHE,
    "cache_config": _NO_CACHE,
    "prefill_chunk_size": _NO_CACHE,
    "assistant_model": _NO_CACHE,
    "prompt_lookup_num_tokens": _NO_CACHE,
    "guidance_scale": _NO_CACHE,
    "output_attentions": "rows run apart and have no common layout",
    "output_hidden_states": "rows run apart and have no common layout",
}


class UncachedGeneration:
    """The part of ``GenerationMixin`` that a Reformer without a cache answers itself."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens after each row's prompt; arguments as in ``GenerationMixin.generate``.

        ``attention_mask`` may pad rows on either side. ``num_hashes`` sets the hash rounds.

        Raises:
            ValueError: for what decoding without a cache cannot honour, and for a length that the position table
                does not hold.
        """
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"generate does not take {name}: {reason}")
        prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            self._check_length(prompt, kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _check_length(self: Any, prompt: Tensor, options: dict[str, Any]) -> None:
        """Refuse to start what would run out of positions. Of pads no position is used up."""
        config = options.get("generation_config") or self.generation_config
        columns, mask = prompt.shape[1], options.get("attention_mask")
        tokens = int(mask.sum(dim=1).max()) if isinstance(mask, Tensor) and mask.dim() == 2 else columns
        new, total = (options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length"))
        if new is None:
            new = total - columns if total is not None else 0
        limit = self.config.max_length_of_positions
        # The last new token is written, not read.
        if tokens + new - 1 > limit:
            raise ValueError(
                f"max_new_tokens or max_length asks for {new} tokens after a prompt of {tokens}, "
                f"but the position table holds {limit}"
            )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("assisted decoding (assistant_model, prompt_lookup_num_tokens) needs a decoding cache")

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the forward that a generation step makes: always the whole sequence."""
        model_inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "num_hashes": num_hashes,
            "rows_alone": True,
        }
        if inputs_embeds is None:
            return {**model_inputs, "input_ids": input_ids}
        new = self.get_input_embeddings()(input_ids)
        return {**model_inputs, "inputs_embeds": torch.cat([inputs_embeds, new.to(inputs_embeds.dtype)], dim=1)}

    def _last_logits_of_rows(
        self: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask_BT: Tensor | None,
        num_hashes: int | None,
    ) -> Tensor:
        """Return ``[B, 1, V]``: the logits of each row's last real token, the row computed alone.

        Rows with equally many real tokens share a forward. Every forward starts from the same state of the default
        generator, so a row meets the same random rotations whatever the other rows are; the state moves on once.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        B, T = given.shape[:2]
        lengths = [T] * B if mask_BT is None else mask_BT.sum(dim=1).tolist()
        if 0 in lengths:
            raise ValueError(f"attention_mask must leave every row a token; row {lengths.index(0)} has none")
        # Real tokens first, each kind in its order.
        order_BT = None if mask_BT is None else torch.sort(~mask_BT, dim=1, stable=True).indices
        rng_state = torch.get_rng_state()
        logits: list[Tensor | None] = [None] * B
        for length in sorted(set(lengths)):
            rows = torch.tensor([row for row in range(B) if lengths[row] == length], device=given.device)
            group = given[rows]
            if order_BT is not None:
                places = order_BT[rows, :length]
                group = group[torch.arange(len(rows), device=given.device).unsqueeze(1), places]
            torch.set_rng_state(rng_state)
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            hidden = self.reformer(**{name: group}, num_hashes=num_hashes, return_dict=True).last_hidden_state
            for row, last in zip(rows.tolist(), self.lm_head(hidden[:, -1:]), strict=True):
                logits[row] = last
        return torch.stack([last for last in logits if last is not None])

    def _forward_rows_alone(
        self: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        num_hashes: int | None,
    ) -> ReformerModelWithLMHeadOutput:
        inputs = check_inputs(self.config, input_ids, attention_mask, None, inputs_embeds, num_hashes, alone=True)
        logits = self._last_logits_of_rows(inputs.input_ids, inputs.inputs_embeds, inputs.mask_BT, num_hashes)
        return ReformerModelWithLMHeadOutput(logits=logits)
