"""Generation: what ``transformers`` asks of a model, answered with every row on its own.

A padded forward shares one ring of chunks among tokens and pads, so pads change who sees whom. Here every row's tokens
are taken out of the batch, wherever its pads stand, so a row gets the logits that it gets alone, with its own positions
and its own number of buckets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flash_reformer.models.cache import ReformerCache
from flash_reformer.models.decoding import Compact, unpadded
from flash_reformer.models.inputs import Inputs, check_inputs, check_tensor
from flash_reformer.models.outputs import ReformerModelWithLMHeadOutput

_APART = "rows run apart and have no common layout"
#: What cannot be honoured, and why.
_REFUSED = {
    "cache_config": "a ReformerCache has no settings",
    "guidance_scale": "it would run a second, unconditional forward outside the cache",
    "output_attentions": _APART,
    "output_hidden_states": _APART,
}


def _refuse(asked: dict[str, Any]) -> None:
    """Raise ``ValueError`` for what a caller asks for in vain.

    What a *model's* configuration asks its forwards to return is no such thing: its steps then return None.
    """
    for name, reason in _REFUSED.items():
        value = asked.get(name)
        if value is None or value is False or (name == "guidance_scale" and value == 1):
            continue
        raise ValueError(f"generate does not take {name}: {reason}; got {value!r}")


def _columns(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return some columns of a batch."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, start:stop]

    return replace(
        inputs,
        input_ids=cut(inputs.input_ids),
        inputs_embeds=cut(inputs.inputs_embeds),
        mask_BT=cut(inputs.mask_BT),
        position_ids=cut(inputs.position_ids),
    )


def _positions_of_all(position_ids: Any, prompt: Tensor) -> Tensor:
    """Return positions ``[B, T]``, one row per prompt: beams and copies are made by row."""
    B, T = prompt.shape[:2]
    check_tensor("position_ids", position_ids, [(B, T), (1, T)], (torch.int64, torch.int32))
    return position_ids.expand(B, -1)


class CachedGeneration:
    """The part of ``GenerationMixin`` that a Reformer answers itself."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens after each row's prompt; arguments as in ``GenerationMixin.generate``.

        ``attention_mask`` may pad rows on either side, and ``position_ids`` place the prompt's tokens. ``num_hashes``
        sets the hash rounds. ``past_key_values`` (or ``past_buckets_states``) goes on from a cache that an earlier call
        returned; ``input_ids`` is then the whole text again, or with an ``attention_mask`` over the whole the new part.
        ``prefill_chunk_size`` runs only a prompt's first so many tokens by a full forward and the others by steps, as
        if they were generated: in LSH models of several layers that gives other values than one full forward.

        Raises:
            ValueError: for what cannot be honoured, and for a length that the position table does not hold.
        """
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        _refuse({} if config is None else vars(config))
        _refuse(kwargs)
        cache = self.reformer.check_cache(kwargs.pop("past_buckets_states", None), kwargs.get("past_key_values"))
        if cache is not None:
            kwargs["past_key_values"] = cache
            if kwargs.get("use_cache") is False:
                raise ValueError("use_cache=False contradicts past_key_values: a cache that is given is used")
        prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = _positions_of_all(kwargs["position_ids"], prompt)
            self._check_length(prompt, config or self.generation_config, kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _check_length(self: Any, prompt: Tensor, config: Any, options: dict[str, Any]) -> None:
        """Refuse to start what would run out of positions. Of pads no position is used up."""
        columns, mask, positions = prompt.shape[1], options.get("attention_mask"), options.get("position_ids")
        tokens = int(mask.sum(dim=1).max()) if isinstance(mask, Tensor) and mask.dim() == 2 else columns
        if isinstance(positions, Tensor) and positions.numel():
            tokens = int(positions.max()) + 1
        new, total = (options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length"))
        if any(count is not None and not isinstance(count, int) for count in (new, total)):
            return  # transformers says what is wrong with them
        if new is None:
            new = total - columns if total is not None else 0
        limit = self.config.max_length_of_positions
        # The last new token is written, not read.
        if tokens + new - 1 > limit:
            raise ValueError(
                f"max_new_tokens or max_length asks for {new} tokens after a prompt of {tokens}, "
                f"but the position table holds {limit}"
            )

    # --- the cache ----------------------------------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Whether ``generate`` sets up a cache; without this it skips every class with 'reformer' in its name."""
        return True

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None or 'dynamic' for a Reformer; got {kind!r}")
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            self.reformer.check_cache(None, cache)
            cache._is_user_defined = True
            # Whatever the model's own default is: a cache was given.
            generation_config.use_cache = True
        elif generation_config.use_cache is False:
            if generation_config.prefill_chunk_size is not None:
                raise ValueError("prefill_chunk_size needs use_cache=True: steps go on from a cache")
            return
        elif self.training:
            raise ValueError("generate with a cache needs evaluation mode: call model.eval(), or pass use_cache=False")
        else:
            cache = model_kwargs["past_key_values"] = ReformerCache(self.config)
        if cache.columns == 0:
            cache.reach = max_cache_length + 1
        cache.prompt_columns = cache.chunk_size = None
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def _prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let rows, not columns, be cut by ``prefill_chunk_size``: pads must not change where a row is cut."""
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be an integer >= 1 or None; got {chunk_size!r}")
        model_kwargs["past_key_values"].chunk_size = chunk_size
        generation_config.prefill_chunk_size = None
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        finally:
            generation_config.prefill_chunk_size = chunk_size

    def _assisted_decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tell the cache where the prompt ends: its first forward sees candidates too, and they are steps."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds cannot be given in assisted decoding: candidates are sought among input_ids"
            )
        if cache is not None:
            if cache.columns >= input_ids.shape[1]:
                raise ValueError(
                    f"input_ids must be the whole text in assisted decoding; got {input_ids.shape[1]} tokens, and "
                    f"past_key_values holds {cache.columns}"
                )
            cache.prompt_columns = input_ids.shape[1]
            cache.chunk_size = kwargs["generation_config"].prefill_chunk_size
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Let no candidate go beyond the position table: the last one would be looked at for nothing."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        cache, propose = kwargs["model_kwargs"].get("past_key_values"), generator.get_candidates
        limit = self.config.max_length_of_positions

        def get_candidates(input_ids: Tensor, *more: Any, **options: Any) -> Any:
            candidates, logits = propose(input_ids, *more, **options)
            used = cache.lengths[0] + cache.offsets[0] - cache.columns if cache is not None and cache.columns else 0
            excess = max(0, min(candidates.shape[1] + used - limit, candidates.shape[1] - input_ids.shape[1]))
            if excess:
                candidates = candidates[:, :-excess]
                logits = None if logits is None else logits[:, :-excess]
            return candidates, logits

        generator.get_candidates = get_candidates
        return generator

    # --- one step -----------------------------------------------------------------------------------------------------

    def _prepare_attention_mask_for_generation(
        self: Any, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Guess a mask where none was given: pads by their id in a first prompt, none after what is cached.

        A row that has ended goes on with pads, which are cached as the tokens that they were.
        """
        mask = super()._prepare_attention_mask_for_generation(  # type: ignore[misc]
            inputs_tensor, generation_config, model_kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, ReformerCache) or not 0 < cache.columns < mask.shape[1]:
            return mask
        known = cache.mask_of_columns()
        mask = torch.ones_like(mask)
        if known is not None and known.shape[0] == mask.shape[0]:
            mask[:, : cache.columns] = known.to(mask)
        return mask

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Leave positions to the rows' counts of tokens."""
        return

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, num_new_tokens: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        options = {**kwargs, "num_new_tokens": num_new_tokens}
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)  # type: ignore[misc]
        if positions is not None:
            # A row goes on after its own last token, not after what stands in the last column.
            known = positions if mask is None else positions.masked_fill(mask[:, -positions.shape[1] :] == 0, -1)
            columns = torch.arange(known.shape[1], device=known.device)
            last = (columns * (known >= 0)).amax(dim=1, keepdim=True)
            following = known.gather(1, last) + 1 + torch.arange(num_new_tokens, device=known.device)
            updated["position_ids"] = torch.cat([positions.expand(known.shape[0], -1), following], dim=1)
        return updated

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: ReformerCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        position_ids: Tensor | None = None,
        num_hashes: int | None = None,
        logits_to_keep: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the forward that a generation step makes: what is new, or all without a cache."""
        model_inputs: dict[str, Any] = {"attention_mask": attention_mask, "num_hashes": num_hashes, "rows_alone": True}
        if past_key_values is None:
            return {**model_inputs, "input_ids": input_ids, "position_ids": position_ids}
        cached = past_key_values.columns
        name, given = "input_ids", input_ids
        if inputs_embeds is not None and is_first_iteration:
            name, given = "inputs_embeds", inputs_embeds
        if (
            cached
            and is_first_iteration
            and next_sequence_length is None
            and past_key_values.prompt_columns is not None
        ):
            next_sequence_length = given.shape[1] - cached
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise ValueError(
                    f"input_ids must be the whole text, longer than the {cached} tokens that past_key_values holds; "
                    f"got {given.shape[1]}. For new tokens alone pass an attention_mask over the whole"
                )
            given = given[:, -next_sequence_length:]
        if position_ids is not None and is_first_iteration:
            model_inputs["position_ids"] = position_ids[:, -given.shape[1] :]
        return {
            **model_inputs,
            name: given,
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep or 1,
        }

    def _forward_rows_alone(
        self: Any,
        cache: ReformerCache | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        num_hashes: int | None,
        logits_to_keep: int | Tensor,
    ) -> ReformerModelWithLMHeadOutput:
        """Return the logits ``[B, 1, V]`` of each row's last token, or of the last so many where rows have no pads."""
        if not isinstance(logits_to_keep, int):
            raise TypeError("logits_to_keep must be an integer with rows_alone: rows end in different columns")
        cache = self.reformer.check_cache(None, cache)
        inputs = check_inputs(
            self.config, input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, alone=True, cache=cache
        )
        hidden = (
            self._last_hidden_of_rows(inputs, num_hashes) if cache is None else self._go_on(cache, inputs, num_hashes)
        )
        logits = self.lm_head(hidden[:, -max(1, logits_to_keep) :])
        return ReformerModelWithLMHeadOutput(logits=logits, past_buckets_states=cache)

    def _go_on(self: Any, cache: ReformerCache, inputs: Inputs, num_hashes: int | None) -> Tensor:
        """Return ``[B, *, 2E]`` of the input's last tokens: what is left of a prompt, then each of the candidates."""
        prompt, chunk_size = inputs.length, cache.chunk_size
        if cache.prompt_columns is not None:
            prompt = min(prompt, cache.prompt_columns - cache.columns)
        # They are about the first forward of a generation only.
        cache.prompt_columns = cache.chunk_size = None
        head = _columns(inputs, 0, prompt)
        if cache.columns == 0:
            hidden = self.reformer.prefill_rows(cache, head, num_hashes, chunk_size)
        elif chunk_size is None and (head.mask_BT is None or bool(head.mask_BT.all())):
            hidden = self._step(cache, replace(head, mask_BT=None), num_hashes)
        else:
            hidden = self.reformer.extend_rows(cache, head, num_hashes, chunk_size)
        if prompt == inputs.length:
            return hidden
        rest = self._step(cache, _columns(inputs, prompt, inputs.length), num_hashes)
        return torch.cat([hidden, rest], dim=1)

    def _step(self: Any, cache: ReformerCache, inputs: Inputs, num_hashes: int | None) -> Tensor:
        head_masks = [None] * self.config.num_hidden_layers
        return self.reformer.step_cache(cache, inputs, num_hashes, head_masks)[0]

    def _last_hidden_of_rows(self: Any, inputs: Inputs, num_hashes: int | None) -> Tensor:
        """Return ``[B, 1, 2E]`` at each row's last token, without a cache.

        Rows with equally many tokens share a forward. Every forward starts from the same state of the default
        generator, so a row meets the same random rotations whatever the other rows are; the state moves on once.
        """
        compact = Compact.of(inputs.mask_BT, inputs.batch_size, inputs.length).checked("token")
        tokens = compact.take(inputs.given)
        positions = inputs.position_ids
        positions = None if positions is None else compact.take(positions).expand(len(compact.counts), -1)
        rng_state = torch.get_rng_state()
        last: list[Tensor | None] = [None] * len(compact.counts)
        for length in sorted(set(compact.counts)):
            rows = [row for row, count in enumerate(compact.counts) if count == length]
            index = torch.tensor(rows, device=tokens.device)
            torch.set_rng_state(rng_state)
            part = unpadded(tokens[index, :length], None if positions is None else positions[index, :length])
            hidden = self.reformer(
                part.input_ids,
                inputs_embeds=part.inputs_embeds,
                position_ids=part.position_ids,
                num_hashes=num_hashes,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
            for row, state in zip(rows, hidden[:, -1:], strict=True):
                last[row] = state
        return torch.stack([state for state in last if state is not None])
