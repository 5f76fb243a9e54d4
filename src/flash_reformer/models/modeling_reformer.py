"""The Reformer without a head (Kitaev, Kaiser and Levskaya, 2020): tokens in, hidden states out."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from flash_reformer import functional
from flash_reformer.layers import block, linear
from flash_reformer.layers.attention import ReformerAttention
from flash_reformer.layers.call import Call
from flash_reformer.layers.decode_storage import Fill
from flash_reformer.layers.embeddings import ReformerEmbeddings
from flash_reformer.layers.encoder import Judge, ReformerEncoder
from flash_reformer.layers.exchange import ALONE, BY_ITSELF, Exchange, SharesSequences
from flash_reformer.layers.head import ReformerOnlyLMHead
from flash_reformer.models import inputs as door
from flash_reformer.models.cache import ReformerCache
from flash_reformer.models.configuration_reformer import ReformerConfig, check_consistency
from flash_reformer.models.decoding import CachedForwards
from flash_reformer.models.outputs import ReformerModelOutput
from flash_reformer.models.resizing import ResizablePositions

__all__ = ["ReformerAttention", "ReformerLayer", "ReformerModel", "ReformerPreTrainedModel"]


class ReformerLayer(block.ReformerLayer):
    """A layer of the stack, built from a configuration."""

    def __init__(self, config: ReformerConfig, layer_id: int = 0) -> None:
        super().__init__(config, layer_id, ACT2FN[config.hidden_act])


class ReformerPreTrainedModel(ResizablePositions, PreTrainedModel):
    """Loading, saving and initialisation, common to all Reformers."""

    config_class = ReformerConfig
    config: ReformerConfig
    base_model_prefix = "reformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReformerLayer"]
    # Whether the losses divide by the ``num_items_in_batch`` that Trainer passes.
    accepts_loss_kwargs = True
    # Written by old versions: constants, and a bias that lm_head.bias stands for.
    _keys_to_ignore_on_load_unexpected = [
        r"self_attention\.(self_)?mask_value_float(16|32)$",
        r"lm_head\.decoder\.bias$",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers.initialization leaves alone what a checkpoint has already filled.
        from transformers import initialization as init

        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):
            # The axial tables; their owner holds no parameter itself, and transformers passes such modules over.
            for weight in module:
                init.normal_(weight, std=self.config.axial_norm_std)
        elif isinstance(module, ReformerOnlyLMHead):
            init.zeros_(module.bias)

    @property
    def backend(self) -> str:
        """Which implementation of hashing, sorting and attention the model uses; see :meth:`set_backend`."""
        return cast(ReformerModel, self.base_model)._backend

    def set_backend(self, backend: str, *, deterministic: bool = True) -> None:
        """Choose the implementation of hashing, sorting and attention.

        Args:
            backend: ``"auto"``, the fastest that can run; ``"reference"``, the plain PyTorch definitions;
                ``"cpu"``, the kernels for a CPU, and ``"triton"``, those for a GPU, where a forward on another
                device, or on a dtype that they do not take, raises ``ValueError``. With
                ``"reference"`` linear layers are exactly ``nn.Linear``, which ``torch.ao.quantization`` asks for, and
                second derivatives exist (with ``reversible=False``).

            deterministic: whether equal calls must give equal gradients to the bit. If not, the kernels for a GPU add
                the gradients of several hash rounds in any order, which is all that this changes.

        Raises:
            ValueError: for any other name, and for ``"triton"`` where it is not installed or the heads are too large.
            TypeError: if ``deterministic`` is not a bool.
        """
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be True or False; got {deterministic!r}")
        model = cast(ReformerModel, self.base_model)
        model._backend = functional.check_backend(backend, self.config.attention_head_size)
        model._deterministic = deterministic
        linear.set_backend(self, backend)

    def share_trained_buckets(self) -> None:
        """Record the largest automatic bucket count that any rank has trained with. A collective call.

        Ranks see inputs of different lengths, and one of them saves. Without ``torch.distributed`` this does nothing.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        recorded: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(recorded, self.config.trained_num_buckets)
        for factors in recorded:
            if factors is not None:
                self.config.record_trained_buckets(tuple(factors))


class ReformerModel(CachedForwards, SharesSequences, ReformerPreTrainedModel):
    """Embeddings and the stack; ``[B, T]`` token ids become ``[B, T, 2 * hidden_size]`` hidden states.

    LSH attention is not prefix-stable: later tokens move the borders of chunks, so they can change earlier outputs
    even in a causal model, though they are never read. Local attention is strictly causal.
    """

    #: See :meth:`set_backend`; a model that was pickled before the switch existed has it, too.
    _deterministic = True

    def __init__(self, config: ReformerConfig) -> None:
        check_consistency(config)
        super().__init__(config)
        self._backend = "auto"
        self.embeddings = ReformerEmbeddings(config)
        self.encoder = ReformerEncoder(config, [ReformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    def _bucket_factors(self, length: int) -> tuple[int, ...]:
        config = self.config
        if "lsh" not in config.attn_layers or config.lsh_attn_chunk_length is None:
            return ()
        fixed = None if self.training and config.num_buckets_automatic else config.num_buckets
        if fixed is not None:
            return (fixed,) if isinstance(fixed, int) else tuple(fixed)
        factors = tuple(
            functional.automatic_num_buckets(length, config.lsh_attn_chunk_length, config.max_position_embeddings)
        )
        if self.training:
            config.record_trained_buckets(factors)
        return factors

    def _rotation_seed(self) -> Tensor | None:
        seed = self.config.hash_seed
        return None if seed is None else torch.tensor(seed, dtype=torch.int64, device="cpu")

    def _draw_seed(self) -> Tensor | None:
        """Draw the root of this forward's private randomness, or nothing where no layer will ask for any.

        This is the only draw on the default generator besides the dropouts of training. A model on a GPU draws there
        and leaves the seed there: nobody waits, and a captured graph draws a new one in every replay.
        """
        needs_rotations = "lsh" in self.config.attn_layers and self.config.hash_seed is None
        # Not ``self.training``: a single layer may train in a model that does not.
        needs_dropout = any(module.training for module in self.modules())
        if not (needs_dropout or needs_rotations):
            return None
        device = self.embeddings.word_embeddings.weight.device
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device if device.type == "cuda" else "cpu")

    def _seeds_of_layers(self, seed: Tensor | None) -> Tensor | None:
        """Return the seeds of every layer's rotations and attention dropout, ``[layers, 2]``."""
        return None if seed is None else functional.derive_seeds(seed, self.config.num_hidden_layers, 2)

    def _exact_below(self, num_hashes: int | None) -> int:
        """Return up to which length all layers attend exactly, where the word embeddings are."""
        limit = self.config.full_attention_below
        if isinstance(limit, int):
            return limit
        rounds = self.config.num_hashes if num_hashes is None else num_hashes
        return functional.full_attention_below(self.embeddings.word_embeddings.weight, rounds, self._backend)

    def padded_length(self, length: int, num_hashes: int | None = None) -> int:
        """Return how many positions layers see of a batch of ``length`` ones: whole chunks of every kind."""
        return door.layout_of(self.config, self._exact_below(num_hashes)).padded(length)

    def _pad(self, inputs: door.Inputs, length: int, exchange: Exchange) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Pad to ``length``; return what is given and its positions, where this rank has them, and the whole mask."""
        words = self.embeddings.word_embeddings
        pad_token_id = self.config.pad_token_id or 0
        pad_embeds = None
        if inputs.inputs_embeds is not None and length > inputs.length:
            pad_embeds = words(torch.full((), pad_token_id, device=inputs.given.device))
        padded = door.pad(inputs, length, pad_embeds, pad_token_id)
        positions_XT = door.positions(inputs, length, self.config.max_length_of_positions)
        given = exchange.my_positions(padded.given, pad_token_id if padded.inputs_embeds is None else 0.0)
        return (given, exchange.my_positions(positions_XT, 0)), padded.mask_BT

    def _embed_at(self, given: Tensor, positions_XT: Tensor, exchange: Exchange = ALONE) -> Tensor:
        """Return the embeddings ``[B, T, E]`` of ids or of word embeddings at these positions."""
        embeds_BTE = self.embeddings.word_embeddings(given) if given.dim() == 2 else given
        embeds_BTE = self.embeddings(embeds_BTE, positions_XT, exchange.alike)
        if self.config.residual_in_fp32:
            embeds_BTE = embeds_BTE.to(torch.promote_types(embeds_BTE.dtype, torch.float32))
        return embeds_BTE

    def _encode(
        self,
        inputs: door.Inputs,
        num_hashes: int,
        seed: Tensor | None,
        head_masks: list[Tensor | None] | None = None,
        *,
        factors: tuple[int, ...] | None = None,
        fill: Fill | None = None,
        with_states: bool = False,
        with_probs: bool = False,
        keep_shards: bool = False,
        judge: Judge | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Run the stack; return hidden states ``[B, T, 2E]`` and what was asked for, at the caller's length.

        ``factors`` of the bucket count follow the length if they are None. With ``keep_shards`` the hidden states stay
        on the ranks that have their positions, pads included. With a ``judge`` its sum comes in their place.
        """
        config, T = self.config, inputs.length
        exact_below = self._exact_below(num_hashes)
        length = self.padded_length(T, num_hashes)
        # A cache is filled, and read, by one rank.
        exchange = ALONE if fill is not None else self.ranks.exchange(length)
        seed = exchange.agree(seed)
        given, mask_BT = self._pad(inputs, length, exchange)
        call = Call(
            mask_BT=mask_BT,
            num_hashes=num_hashes,
            bucket_factors=self._bucket_factors(length) if factors is None else factors,
            rotation_seed=self._rotation_seed(),
            seeds_LX=exchange.seeds(self._seeds_of_layers(seed)),
            exact=exact_below >= T,
            backend=self._backend,
            deterministic=self._deterministic,
            fill=fill,
            exchange=exchange,
        )
        my_masks = [None if mask is None else exchange.my_heads(mask) for mask in head_masks or ()]
        head_masks = my_masks or [None] * config.num_hidden_layers
        judge = None if judge is None else judge.shared(exchange)
        with exchange.apart():
            embeds_BTE = self._embed_at(*given, exchange)
            hidden_BTX, states, probs = self.encoder(embeds_BTE, call, head_masks, with_states, with_probs, judge)
        states, probs = [exchange.whole(s) for s in states], [exchange.all_heads(p) for p in probs]
        if judge is not None:
            hidden_BTX = exchange.total(hidden_BTX)
        elif not (keep_shards and exchange.shares):
            hidden_BTX = _crop(exchange.whole(hidden_BTX), T)
        return (
            hidden_BTX,
            # Without pads the very tensors of the chain, so that gradients can be asked for with respect to them.
            tuple(s if length == T else _crop(s, T) for s in states) if with_states else None,
            tuple(_crop_probs(p, T) for p in probs) if with_probs else None,
        )

    def _new_cache(self, use_cache: bool | None) -> ReformerCache | None:
        """Return an empty cache if this call is to fill one. Training never does (it would undo reversibility)."""
        # A cache is made of Python; a compiled graph has one only if asked for it, at the price of a break.
        by_default = self.config.use_cache and not torch.compiler.is_compiling() and self.ranks is BY_ITSELF
        wanted = by_default if use_cache is None else use_cache
        if not wanted:
            return None
        if self.training or not door.can_cache(self.config):
            if use_cache:
                reason = "training keeps no cache" if self.training else "only a causal model's decoding is cached"
                warnings.warn(f"use_cache=True has no effect: {reason}", stacklevel=3)
            return None
        return ReformerCache(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        past_buckets_states: Any | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Any | None = None,
        judge: Judge | None = None,
        keep_shards: bool = False,
    ) -> tuple[Any, ...] | ReformerModelOutput:
        """Encode a batch of any length up to the position tables' size.

        Args:
            input_ids: ``[B, T]`` token ids.
            attention_mask: ``[B, T]``, bool or 0 and 1 of any dtype: which tokens are real. All by default. Masked
                tokens are read by nobody, but they take part in sorting: an LSH row in a padded batch may see other
                neighbours than the row alone would. With a filled cache ``[B, cached + T]``, or None if all new
                tokens are real; then every row goes on as if it were alone.
            position_ids: ``[B, T]`` or ``[1, T]``; 0, 1, 2, ... by default, and with a cache what comes next.
            head_mask: ``[H]`` or ``[layers, H]``: a factor on each head's attention probabilities.
            inputs_embeds: ``[B, T, hidden_size]`` word embeddings in place of ``input_ids``.
            num_hashes: hash rounds of this call, in place of ``config.num_hashes``. A cache keeps those of its first.
            past_buckets_states: a :class:`ReformerCache`, empty or as an earlier call returned it. The input stands
                after what is cached; the cache is extended in place. Causal models in evaluation mode only.
            use_cache: return a cache; ``config.use_cache`` by default. No effect in training and bidirectional models.
                Neither what is cached nor the states of a step carry gradients.
            output_hidden_states: also return the states between layers. They carry gradients; each is stored.
            output_attentions: also return attention probabilities. They carry gradients; activations are stored. Steps
                from a filled cache have none to show.
            return_dict: False returns a tuple, without the fields that are None.
            past_key_values: the same as ``past_buckets_states``.
            judge: what a head sums over positions; its sum is returned as ``last_hidden_state``, which itself never
                exists then. Heads of this package use it where nothing else of that state is wanted.
            keep_shards: what models with heads ask for: where ranks share sequences, leave ``last_hidden_state`` on
                those that have its positions.

        Raises:
            ValueError, TypeError: for input that does not fit, naming the parameter. Values of ids, positions and
                masks are checked on CPU tensors only, since a GPU would have to be waited for.
        """
        config = self.config
        cache = self.check_cache(past_buckets_states, past_key_values)
        inputs = door.check_inputs(
            config, input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, cache=cache
        )
        head_masks = door.split_head_mask(config, head_mask)
        door.check_flags(
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=return_dict,
        )
        with_states = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        with_probs = bool(config.output_attentions if output_attentions is None else output_attentions)
        return_dict = config.return_dict if return_dict is None else return_dict
        if cache is not None and cache.columns:
            if output_attentions:
                raise ValueError("output_attentions must be False with a filled cache: a step has no chunks to show")
            hidden_BTX, stepped = self.step_cache(cache, inputs, num_hashes, head_masks, with_states)
            hidden_BTX = hidden_BTX if judge is None else judge.total(hidden_BTX)
            output = ReformerModelOutput(hidden_BTX, cache, tuple(stepped) if with_states else None)
        else:
            cache = self._new_cache(use_cache) if cache is None else cache
            flags = {"with_states": with_states, "with_probs": with_probs, "keep_shards": keep_shards}
            output = self._forward_whole(cache, inputs, num_hashes, head_masks, judge, flags)
        return output if return_dict else output.to_tuple()

    def _forward_whole(
        self,
        cache: ReformerCache | None,
        inputs: door.Inputs,
        num_hashes: int | None,
        head_masks: list[Tensor | None],
        judge: Judge | None,
        flags: dict[str, bool],
    ) -> ReformerModelOutput:
        """Encode a batch from its first token on, and fill the cache if there is one."""
        rounds = self.config.num_hashes if num_hashes is None else num_hashes
        options: dict[str, Any] = {"judge": judge, **flags}
        if cache is None:
            asked = {**flags, "return_logits": judge is None}
            self.ranks.check_same(inputs.given, num_hashes=rounds, training=self.training, **asked)
            hidden_BTX, states, probs = self._encode(inputs, rounds, self._draw_seed(), head_masks, **options)
        else:
            with cache.filling():
                fill, compact = self.fill_cache(cache, inputs, num_hashes)
                hidden_BTX, states, probs = self._encode(inputs, rounds, cache.seed, head_masks, fill=fill, **options)
                self.finish_filling(cache, inputs, compact)
        return ReformerModelOutput(hidden_BTX, cache, states, probs)


def _crop(x_BTX: Tensor, length: int) -> Tensor:
    """Return the first so many positions."""
    if torch.compiler.is_exporting():
        # A slice would ask the exporter for a proof that there are that many.
        return x_BTX.index_select(1, torch.arange(length, device=x_BTX.device))
    return x_BTX[:, :length]


def _crop_probs(probs: Tensor, length: int) -> Tensor:
    """Crop exact probabilities ``[B, H, T, T]`` to the caller's length; chunks have no such order to crop."""
    return probs[:, :, :length, :length] if probs.dim() == 4 else probs
