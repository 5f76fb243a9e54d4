"""Text out of a trained byte-level model."""

from pathlib import Path
from typing import Any

import torch

from flash_reformer.models.modeling_heads import ReformerModelWithLMHead
from flash_reformer.tokenization.bytes import EOS_ID, PAD_ID, VOCAB_SIZE, decode_bytes, encode_bytes
from flash_reformer.training.quiet import quiet_transformers


def load_language_model(folder: str | Path) -> Any:
    """Load a byte-level language model that ``save_pretrained`` wrote; ``ValueError`` says what is wrong with it."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no saved model: there is no config.json in it")
    with quiet_transformers():
        model = ReformerModelWithLMHead.from_pretrained(path)
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{path} is no byte-level model: its vocabulary has {model.config.vocab_size} entries, not {VOCAB_SIZE}"
        )
    if not model.config.is_decoder:
        raise ValueError(f"{path} is no causal language model: its config says is_decoder=False")
    return model.eval()


def generate_text(
    model: Any,
    prompt: bytes,
    *,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_hashes: int | None = None,
) -> bytes:
    """Continue ``prompt`` until the model ends the text or ``max_new_tokens`` bytes are there; return what is new.

    The model sees an end-of-text token before the prompt, as every text has one before it in training. Sampling
    depends on ``seed`` alone, and torch's default generators are left as they were.
    """
    _check_sampling(max_new_tokens, greedy, temperature, top_k, top_p, num_hashes)
    device = next(model.parameters()).device
    ids = torch.tensor([[EOS_ID, *encode_bytes(prompt)]], device=device)
    limit = model.config.max_length_of_positions
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} after a prompt of {len(prompt)} bytes is more than the model has "
            f"positions for: {limit}, one of them for the start of the text"
        )
    choice: dict[str, Any] = {"do_sample": not greedy}
    if not greedy:
        # HF's own defaults are top_k=50 and top_p=1; "not given" means here that nothing is cut off.
        choice |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    if num_hashes is not None:
        choice["num_hashes"] = num_hashes
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            **choice,
        )
    return decode_bytes(output[0, ids.shape[1] :].tolist())


def _check_sampling(
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_hashes: int | None,
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("num_hashes", num_hashes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for the likeliest bytes use greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if greedy and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("greedy takes the likeliest byte each time: temperature, top_k and top_p contradict it")
