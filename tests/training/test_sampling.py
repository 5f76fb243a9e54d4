"""Text from a model, piece by piece: what is streamed is what is returned, in any vocabulary."""

from __future__ import annotations

import pytest
import torch

from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training.sampling import write_text
from flash_reformer.training.vocabulary import Vocabulary

CORPUS = "the quick brown fox jumps over the lazy dog and naïve façades of 北京 remain; " * 12


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram", "byte fallback"])
def vocabulary(request, tmp_path_factory) -> Vocabulary:
    if request.param == "bytes":
        return Vocabulary.of_bytes()
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "text.txt").write_text(CORPUS, encoding="utf-8")
    fallback = request.param == "byte fallback"
    options = {"vocab_size": 320, "byte_fallback": True} if fallback else {"vocab_size": 38}
    kind = "bpe" if fallback else request.param
    train_vocabulary([path / "text.txt"], path / "made", model_type=kind, **options)
    return Vocabulary.load(str(path / "made"))


def model_for(vocabulary: Vocabulary) -> ReformerModelWithLMHead:
    """A model of random weights, with attention sharp enough that it writes all sorts of things."""
    config = ReformerConfig(
        attn_layers=["local", "lsh"],
        hidden_size=12,
        num_attention_heads=2,
        attention_head_size=6,
        feed_forward_size=12,
        vocab_size=vocabulary.size,
        axial_pos_shape=(16, 32),
        axial_pos_embds_dim=(4, 8),
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
        num_buckets=8,
        initializer_range=0.5,
        is_decoder=True,
    )
    torch.manual_seed(0)
    return ReformerModelWithLMHead(config).eval()


@pytest.mark.parametrize("prompt", [b"", b"the quick", "of 北".encode(), b"\xff\xfe"])
def test_the_pieces_make_up_the_text(vocabulary, prompt):
    model = model_for(vocabulary)
    for seed in range(2):
        pieces: list[bytes] = []
        options = {"vocabulary": vocabulary, "max_new_tokens": 60, "seed": seed, "temperature": 1.5}
        written = write_text(model, prompt, stream=pieces.append, **options)
        assert b"".join(pieces) == written.text
        assert len(pieces) > 5
        assert all(pieces)
        assert written == written.__class__(**{**vars(write_text(model, prompt, **options)), **times(written)})
        assert written.new_tokens <= 60
        assert written.prompt_tokens == 1 + len(vocabulary.encode(prompt).ids)
        assert written.prompt_seconds > 0
        assert written.tokens_per_second == pytest.approx((written.new_tokens - 1) / written.seconds)


def times(written) -> dict[str, float]:
    return {"prompt_seconds": written.prompt_seconds, "seconds": written.seconds}


def test_a_prompt_in_chunks_writes_and_is_counted_the_same_way():
    model = model_for(Vocabulary.of_bytes())
    prompt = b"the quick brown fox jumps over the lazy dog"
    whole, chunked = (write_text(model, prompt, seed=1, prefill_chunk_size=size) for size in (None, 5))
    # One LSH layer, on top: a forward and steps are the same.
    assert whole.text == chunked.text
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1"):
        write_text(model, prompt, prefill_chunk_size=0)
    assert write_text(model, prompt, max_new_tokens=1).tokens_per_second is None
