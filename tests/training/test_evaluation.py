"""Whole texts under a model: every token once, each with the context that was asked for."""

import json
import math
from pathlib import Path

import pytest
import torch

from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.training import train_clm
from flash_reformer.training.data import Document, hold_out
from flash_reformer.training.evaluation import evaluate_text, held_out_texts, tail_of, windows
from flash_reformer.training.packing import PackedBlocks, pack
from tests.training.runs import QUICK, TINY

TEXT = "".join(f"line {number} of a book, and not the last\n" for number in range(9)).encode()


def language_model(*layers: str) -> ReformerModelWithLMHead:
    torch.manual_seed(0)
    fields = {**TINY, "attn_layers": list(layers), "num_hashes": 1, "initializer_range": 0.3}
    fields |= {"local_attn_chunk_length": 4, "axial_pos_shape": (32, 16), "axial_pos_embds_dim": (4, 12)}
    return ReformerModelWithLMHead(ReformerConfig(**fields, vocab_size=258, is_decoder=True)).eval()


@pytest.mark.parametrize("tokens", [2, 3, 9, 10, 11, 57])
@pytest.mark.parametrize(("context", "stride"), [(10, 1), (10, 4), (10, 9), (2, 1), (100, 50)])
def test_windows_predict_every_token_once_with_context_before_it(tokens, context, stride):
    predicted = []
    for window in windows(tokens, context, stride):
        assert window.stop - window.start == min(context, tokens)
        assert 0 <= window.start < window.first < window.stop <= tokens
        predicted += range(window.first, window.stop)
        if window.start > 0:
            assert window.first - window.start >= context - stride
    assert predicted == list(range(1, tokens))


@pytest.mark.parametrize(("context", "stride"), [(None, None), ("full", None), (48, 16), (31, 30), (9, 4)])
def test_the_score_is_the_sum_over_single_tokens(context, stride):
    """Local attention is causal, so a prefix says of its next token what the whole window says of it."""
    model = language_model("local", "local")
    found = evaluate_text(model, TEXT, context=context, stride=stride)
    ids = torch.tensor([1, *(byte + 2 for byte in TEXT), 1])
    size = min(len(ids), 512) if context in (None, "full") else context
    step = size // 2 if stride is None else stride
    nats, stop = 0.0, size
    with torch.no_grad():
        for place in range(1, len(ids)):
            if place >= stop:
                stop = min(stop + step, len(ids))
            logits = model(ids[None, stop - size : place], use_cache=False).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[ids[place]])
    assert found.nats == pytest.approx(nats, rel=2e-6)  # sums of fp32
    assert (found.tokens, found.bytes, found.context) == (len(TEXT) + 1, len(TEXT), size)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT), rel=2e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / (len(TEXT) + 1)), rel=2e-5)
    assert found.bits_per_token < found.bits_per_byte


def test_several_texts_add_up_and_empty_ones_do_not_count():
    model = language_model("local")
    first, second = (evaluate_text(model, text, context=20) for text in (TEXT, b"short"))
    both = evaluate_text(model, [TEXT, b"", b"short"], context=20)
    assert both.nats == pytest.approx(first.nats + second.nats, rel=1e-6)
    assert both.tokens == first.tokens + second.tokens
    assert second.windows == 1


def test_neither_the_generators_nor_the_model_change():
    model = language_model("lsh", "local").train()
    model.config.hash_seed = None
    state = torch.get_rng_state()
    told = []
    first = evaluate_text(model, TEXT, context=64, report=lambda done, total: told.append((done, total)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert told[-1] == (len(TEXT) + 1, len(TEXT) + 1)
    assert len(told) == first.windows
    torch.manual_seed(99)
    assert evaluate_text(model, TEXT, context=64).nats == first.nats
    assert evaluate_text(model, TEXT, context=64, seed=1).nats != first.nats
    assert evaluate_text(model, TEXT, context=64, num_hashes=3).nats != first.nats
    half = evaluate_text(model, TEXT, context=64, precision="bf16")
    assert half.nats != first.nats
    assert half.nats == pytest.approx(first.nats, rel=0.05)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"context": 1}, "context must be at least 2 and at most 512"),
        ({"context": 513}, "context must be at least 2 and at most 512, the positions of the model; got 513"),
        ({"context": "all"}, "context must be a number of tokens, 'full' or None, got 'all'"),
        ({"context": 20, "stride": 20}, "stride must be at least 1 and at most context - 1, 19; got 20"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"context": "full", "stride": 3}, "stride 3 would have no effect"),
        ({"num_hashes": 2}, "num_hashes would have no effect: attn_layers has no 'lsh' layer"),
        ({"precision": "fp64"}, "precision must be one of fp32, bf16, fp16"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
        ({"seed": -1}, "seed must lie in"),
        ({"text": b""}, "text is empty"),
        ({"text": 2 * TEXT, "context": "full"}, "context 'full' would be .* tokens, more than the 512 positions"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(asked, message):
    asked = {"text": TEXT, **asked}
    with pytest.raises(ValueError, match=message):
        evaluate_text(language_model("local"), asked.pop("text"), **asked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "book.txt").write_bytes(30 * TEXT)
    asked = {**QUICK, "text": (str(folder / "book.txt"),), "output": str(folder / "run"), "held_out": 0.1}
    train_clm({**asked, "max_steps": 2, "eval_sequences": 10**6}, {**TINY, "hash_seed": 3})
    return folder / "run"


def test_the_tail_is_what_training_holds_out(trained):
    book = trained.parent / "book.txt"
    expected = hold_out([Document("book", book.read_bytes())], 0.1).held_out[0].data
    assert tail_of(book, 0.1) == expected
    assert held_out_texts(trained) == [expected]
    metrics = json.loads((trained / "metrics.json").read_text())
    # Training judges whole blocks that share one token; here the last, short one reaches back to be whole.
    blocks = PackedBlocks(pack([Document("", expected)]), 64)
    score = evaluate_text(ReformerModelWithLMHead.from_pretrained(trained), expected, context=64, stride=63)
    assert score.windows == len(blocks)
    assert score.bits_per_byte == pytest.approx(metrics["held_out_bits_per_byte"], rel=0.01)
