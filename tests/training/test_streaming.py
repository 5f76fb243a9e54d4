"""Streamed text: the blocks of text in memory, in another order, a little at a time, and the same after a stop."""

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_reformer.models.modeling_language import ReformerForMaskedLM
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training import resume, resume_clm, train, train_clm
from flash_reformer.training.checkpoints import seal
from flash_reformer.training.data import Document, hold_out
from flash_reformer.training.masking import WordBlocks, word_row
from flash_reformer.training.packing import PackedBlocks, pack
from flash_reformer.training.settings import CausalSettings
from flash_reformer.training.stream_blocks import BlockStream
from flash_reformer.training.stream_pieces import PIECE_BYTES, FilePart, FileSource, MemorySource, cut_text, join
from flash_reformer.training.stream_text import held_out_files, stream_text
from flash_reformer.training.tasks.masked import MaskedLanguageModelling
from flash_reformer.training.vocabulary import Vocabulary
from tests.training.runs import QUICK, TINY, Interrupt, weights

WORDS = "the cat sat on the mat while the dog ate a cake and the bird sang 猫 naïve songs of six pence".split()


def story(words: int, seed: int) -> str:
    draw = np.random.default_rng(seed)
    return "".join(
        WORDS[index] + (" ", " ", "\n", "  ")[draw.integers(4)] for index in draw.integers(len(WORDS), size=words)
    )


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram"])
def vocabulary(request, tmp_path_factory):
    if request.param == "bytes":
        return Vocabulary.of_bytes()
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "text.txt").write_text(story(3000, 0), encoding="utf-8")
    train_vocabulary([folder / "text.txt"], folder / "made", vocab_size=45, model_type=request.param)
    return Vocabulary.load(str(folder / "made"))


@pytest.fixture
def files(tmp_path):
    """Three files, the first longer than two pieces."""
    parts = []
    for number, words in enumerate((30_000, 700, 40)):
        path = tmp_path / f"{number}.txt"
        path.write_text(story(words, number), encoding="utf-8")
        parts.append(FilePart(path, 0, path.stat().st_size))
    assert parts[0].size > 2 * PIECE_BYTES
    return parts


def stream_of(source, length=64, **options) -> BlockStream:
    asked = {"rows": 1, "longest": 64, "accumulation": 1, "seed": 5, "shuffle_tokens": 1000}
    length_at = length if callable(length) else lambda step: length
    return BlockStream(source, length_at=length_at, **{**asked, **options})


def rows_of(stream, count):
    return [{name: value.tolist() for name, value in batch.items()} for batch in itertools.islice(stream, count)]


def test_a_pass_is_the_blocks_of_the_text_in_memory(files, vocabulary):
    source = FileSource(files, vocabulary, 5)
    order = np.random.default_rng([5, 0]).permutation(3)
    whole = pack([Document("", files[index].read(0, files[index].size)) for index in order], vocabulary)
    expected = PackedBlocks(whole, 64)
    found = rows_of(stream_of(source), len(expected))
    blocks = [{name: [value.tolist()] for name, value in expected[index].items()} for index in range(len(expected))]
    assert found != blocks  # mixed, and
    assert sorted(map(str, found)) == sorted(map(str, blocks))
    if vocabulary.is_bytes:
        assert source.tokens == len(whole.ids)
        assert stream_of(source).blocks_per_pass == len(expected)


def test_words_are_streamed_for_masking_as_they_are_in_memory(files):
    vocabulary = Vocabulary.of_bytes()
    order = np.random.default_rng([5, 0]).permutation(3)
    whole = pack([Document("", files[index].read(0, files[index].size)) for index in order], vocabulary)
    expected = WordBlocks(whole, 64)
    stream = stream_of(
        FileSource(files, vocabulary, 5), overlap=0, make_row=lambda t, d: word_row(t, d, by_token=False)
    )

    def relative(row):  # words are numbered from where a window began
        ids, words = (torch.as_tensor(row[name]).flatten().numpy() for name in ("input_ids", "words"))
        first = words[words >= 0].min()
        return str((ids.tolist(), np.where(words >= 0, words - first, -1).tolist()))

    found = rows_of(stream, len(expected))
    assert sorted(map(relative, found)) == sorted(relative(expected[index]) for index in range(len(expected)))


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), words=st.integers(1, 900), piece_bytes=st.integers(600, 2000))
def test_pieces_have_the_tokens_of_the_whole(vocabulary, seed, words, piece_bytes):
    data = story(words, seed).encode()
    whole = vocabulary.encode(data)
    pieces = list(cut_text(lambda start, n: data[start : start + n], len(data), 0, vocabulary, piece_bytes))
    joined = join([text for _, text in pieces])
    assert joined.ids.tolist() == whole.ids.tolist()
    assert joined.words.tolist() == whole.words.tolist()
    assert joined.byte_counts.sum() == len(data)
    # Any piece is where to go on from.
    offset, text = pieces[len(pieces) // 2]
    again = next(cut_text(lambda start, n: data[start : start + n], len(data), offset, vocabulary, piece_bytes))
    assert again[0] == offset
    assert again[1].ids.tolist() == text.ids.tolist()


def test_text_without_spaces_is_cut_between_characters(vocabulary):
    data = ("猫naïve" * 200).encode()
    pieces = list(cut_text(lambda start, n: data[start : start + n], len(data), 0, vocabulary, 601))
    assert len(pieces) > 3
    assert sum(int(text.byte_counts.sum()) for _, text in pieces) == len(data)
    if not vocabulary.is_bytes:
        offsets = [offset for offset, _ in pieces]
        assert all(data[offset] & 0xC0 != 0x80 for offset in offsets)


def test_ranks_share_every_batch_of_one_process(files):
    vocabulary = Vocabulary.of_bytes()
    alone = rows_of(stream_of(FileSource(files[1:], vocabulary, 5), rows=4), 40)
    shares = [rows_of(stream_of(FileSource(files[1:], vocabulary, 5), rows=2).share(rank, 2), 40) for rank in range(2)]
    for whole, first, second in zip(alone, *shares, strict=True):
        assert whole == {name: first[name] + second[name] for name in whole}
        assert first != second


@pytest.mark.parametrize("kind", ["one length", "lengths"])
def test_a_stream_goes_on_from_a_position_as_if_it_had_never_stopped(files, vocabulary, kind):
    length = 64 if kind == "one length" else lambda step: (16, 64, 32)[min(step // 20, 2)]
    make = lambda: stream_of(FileSource(files[1:], vocabulary, 5), length, rows=3, accumulation=2)  # noqa: E731
    stream, positions = make(), {}
    batches = iter(stream)
    whole = []
    for step in range(1, 60):
        whole += [next(batches)["input_ids"], next(batches)["input_ids"]]
        positions[step] = json.loads(json.dumps(stream.position(step)))
    assert positions[59]["place"][0] > 0  # a later pass
    assert len({json.dumps(each["place"]) for each in positions.values()}) > 5
    for step in (1, 2, 19, 20, 21, 33, 58):
        again = make()
        again.start_at(step, positions[step])
        found = [batch["input_ids"] for batch in itertools.islice(again, len(whole) - 2 * step)]
        assert len(found) == len(whole) - 2 * step
        assert all(map(torch.equal, found, whole[2 * step :]))
        assert again.position(59) == positions[59]


def test_the_seed_decides_the_order(files):
    source = MemorySource(pack([Document("", story(400, 1).encode())]))
    first, second, third = (rows_of(stream_of(source, seed=seed), 30) for seed in (1, 1, 2))
    assert first == second != third
    passes = rows_of(stream_of(source, seed=1), 2 * len(PackedBlocks(source.text, 64)))
    half = len(passes) // 2
    assert passes[:half] != passes[half:]  # each pass has an order of its own


def test_short_text_is_one_short_block_and_empty_text_is_refused():
    source = MemorySource(pack([Document("", b"abc")]))
    assert rows_of(stream_of(source), 3) == 3 * [
        {"input_ids": [[1, 99, 100, 101, 1]], "labels": [[-100, 99, 100, 101, 1]]}
    ]
    with pytest.raises(ValueError, match="the text is empty"):
        next(iter(stream_of(MemorySource(pack([])))))


@pytest.mark.parametrize("count", [3, 30])
def test_the_same_bytes_of_files_are_held_out_as_without_streaming(tmp_path, count):
    paths = [tmp_path / f"{number}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(story(50, number // 2))  # each text twice
    expected = hold_out([Document(str(path), path.read_bytes()) for path in paths], 0.2)
    asked = CausalSettings(text=tuple(map(str, paths)), held_out=0.2, streaming=True)
    found = stream_text(asked, Vocabulary.of_bytes())
    assert [document.data for document in found.held_out] == [document.data for document in expected.held_out]
    assert [part.read(0, part.size) for part in held_out_files(asked)] == [d.data for d in expected.held_out]
    parts = [part.read(0, part.size) for part in found.train.parts]
    assert parts == [document.data for document in expected.train]


def test_rows_are_held_out_by_their_text(tmp_path, offline_datasets):
    texts = [story(20, number % 150) for number in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = CausalSettings(dataset=str(path), held_out=0.2, streaming=True)
    vocabulary = Vocabulary.of_bytes()
    found = stream_text(asked, vocabulary)
    held_out = {document.data for document in found.held_out}
    learnt = {data for _, data in found.train.texts()}
    assert not held_out & learnt
    assert held_out | learnt == {text.encode() for text in texts}
    assert 0.1 < len(held_out) / 150 < 0.3
    rows = [number for number, _ in found.train.texts()]
    later = next(found.train.pieces(0, rows[7], 0))
    assert later.document == rows[7]
    assert vocabulary.decode(later.text.ids.tolist()) == texts[rows[7]].encode()


def test_memory_does_not_grow_with_the_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"a line of a long text, and one more word\n" * 600_000)
    size = path.stat().st_size
    vocabulary = Vocabulary.of_bytes()
    tracemalloc.start()
    try:
        asked = CausalSettings(text=(str(path),), streaming=True, seq_len=1024, eval_sequences=4, shuffle_tokens=2**15)
        text = stream_text(asked, vocabulary)
        seen = sum(
            batch["input_ids"].numel()
            for batch in itertools.islice(stream_of(text.train, 1024, shuffle_tokens=2**15), 10_000)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen > 10_000_000
    assert peak < 6e6 < size / 4


def test_a_streamed_run_resumes_bit_for_bit_and_counts_passes(tmp_path, offline_datasets):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": story(20, number)}) + "\n" for number in range(40)))
    asked = {**QUICK, "dataset": str(path), "streaming": True, "held_out": 0.2, "shuffle_tokens": 700}
    asked |= {"max_steps": 24, "save_interval": 10, "gradient_accumulation": 2, "eval_interval": 24}
    whole = train_clm({**asked, "output": str(tmp_path / "whole")}, TINY)
    with pytest.raises(KeyboardInterrupt):
        train_clm({**asked, "output": str(tmp_path / "broken")}, TINY, callbacks=[Interrupt(17)])
    torch.manual_seed(12345)
    resumed = resume_clm({"output": str(tmp_path / "broken")})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.metrics["held_out_bits_per_byte"] == whole.metrics["held_out_bits_per_byte"]
    entries = [
        [(e["loss"], e["bits_per_byte"], e["epoch"]) for e in r.metrics["history"] if "loss" in e]
        for r in (whole, resumed)
    ]
    assert entries[0] == entries[1]
    assert whole.metrics["tokens"] == 24 * 2 * 64
    state = tmp_path / "broken" / "checkpoint-20" / "trainer_state.json"
    saved = json.loads(state.read_text())
    del saved["stateful_callbacks"]["StreamPosition"]
    state.write_text(json.dumps(saved))
    seal(state.parent)
    with pytest.raises(ValueError, match="does not say where its stream of text stands"):
        resume_clm({"output": str(tmp_path / "broken"), "max_steps": 30}, resume_from=str(state.parent))


def test_masked_words_are_streamed_too(tmp_path):
    (tmp_path / "text.txt").write_text(story(600, 3))
    asked = {"text": (str(tmp_path / "text.txt"),), "streaming": True, "seq_len": 64, "max_steps": 6, "cpu": True}
    asked |= {"batch_size": 2, "eval_sequences": 2, "save_interval": 3, "keep": "last"}
    sizes = {**TINY, "attn_layers": ["local"], "local_num_chunks_after": 1}
    sizes = {name: value for name, value in sizes.items() if not name.startswith("lsh")}
    result = train("mlm", {**asked, "output": str(tmp_path / "whole")}, sizes)
    assert result.metrics["steps"] == 6
    with pytest.raises(KeyboardInterrupt):
        train("mlm", {**asked, "output": str(tmp_path / "broken")}, sizes, callbacks=[Interrupt(4)])
    resume({"output": str(tmp_path / "broken")})
    a, b = (ReformerForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert isinstance(result.task, MaskedLanguageModelling)


def test_passes_end_a_streamed_run_where_their_length_is_known(tmp_path):
    (tmp_path / "text.txt").write_text(story(300, 3))
    asked = {**QUICK, "text": (str(tmp_path / "text.txt"),), "streaming": True, "output": str(tmp_path / "run")}
    asked |= {"max_steps": None, "max_epochs": 1, "batch_size": 4, "eval_interval": 99, "held_out": 0.1}
    learnt = tail = (tmp_path / "text.txt").stat().st_size
    learnt -= round(tail * 0.1)
    result = train_clm(asked, TINY)
    assert result.metrics["steps"] == math.ceil(math.ceil((learnt + 1) / 63) / 4)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    asked |= {"text": (), "dataset": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="max_epochs needs the number of tokens"):
        train_clm(asked, TINY)
    assert not (tmp_path / "other").exists()


def test_what_streaming_cannot_do_is_refused(tmp_path, offline_datasets):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    asked = {**QUICK, "dataset": str(tmp_path / "rows.jsonl"), "streaming": True, "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"holds no row of .* out: with --streaming the hash of a row decides"):
        train_clm(asked, TINY)
    with pytest.raises(ValueError, match=r"--text-column 'body' is no column of .*; it has text"):
        train_clm({**asked, "text_column": "body"}, TINY)
    with pytest.raises(ValueError, match="shuffle_tokens 9 is about --streaming or --seq-len-schedule"):
        train_clm({**asked, "streaming": False, "shuffle_tokens": 9}, TINY)
    assert not (tmp_path / "run").exists()
