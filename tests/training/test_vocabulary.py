import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer import ReformerByteTokenizer, ReformerTokenizer
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training.data import Document
from flash_reformer.training.packing import PackedBlocks, pack
from flash_reformer.training.vocabulary import NO_WORD, Vocabulary

TEXT = "the cat sat on the mat while the dog ate the cake and the bird sang a song of six pence\n" * 30


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "text.txt").write_text(TEXT)
    train_vocabulary([path / "text.txt"], path / "made", vocab_size=30, model_type=request.param)
    return path / "made"


@pytest.mark.parametrize(
    "text", ["", " ", "the cat", "  the   cat \n\n sat  ", "naïve 猫 the", "\ttab", "cake\u00a0cake", "a\r\nb"]
)
def test_bytes_of_tokens_sum_to_the_text(folder, text):
    for vocabulary in (Vocabulary.load(str(folder)), Vocabulary.of_bytes()):
        found = vocabulary.encode(text.encode())
        assert len(found.ids) == len(found.byte_counts) == len(found.words)
        assert found.byte_counts.sum() == (len(text.encode()) if len(found.ids) else 0)


@given(text=st.text(alphabet=st.sampled_from("the cat\n é猫🙂"), max_size=30))
def test_words_are_runs_without_white_space(text):
    found = Vocabulary.of_bytes().encode(text.encode())
    numbers = found.words[found.words != NO_WORD]
    assert [int((numbers == word).sum()) for word in range(len(text.split()))] == [
        len(w.encode()) for w in text.split()
    ]
    assert len(numbers) == sum(len(word.encode()) for word in text.split())


def test_every_token_of_a_word_has_its_number(folder):
    vocabulary = Vocabulary.load(str(folder))
    text = "  the catcake sat\non songs"
    found = vocabulary.encode(text.encode())
    parts: dict[int, list[int]] = {}
    for token, word in zip(found.ids.tolist(), found.words.tolist(), strict=True):
        parts.setdefault(word, []).append(token)
    spelled = [vocabulary.tokenizer.decode(parts[word]).strip() for word in sorted(parts) if word != NO_WORD]
    assert spelled == text.split()
    assert len(parts[1]) > 1


def test_white_space_is_of_no_word():
    found = Vocabulary.of_bytes().encode(b"ab  c\n")
    assert found.words.tolist() == [0, 0, NO_WORD, NO_WORD, 1, NO_WORD]


def test_bits_per_byte_do_not_depend_on_the_vocabulary(folder):
    document = Document("a", TEXT.encode())
    for vocabulary in (Vocabulary.load(str(folder)), Vocabulary.of_bytes()):
        blocks = PackedBlocks(pack([document], vocabulary), 64)
        # One bit for each byte of the text, spread over however many tokens.
        loss = np.log(2) * len(document.data) / blocks.predicted_tokens
        assert blocks.bits_per_byte(loss) == pytest.approx(1.0)


def test_text_comes_back(folder):
    vocabulary = Vocabulary.load(str(folder))
    assert vocabulary.decode(vocabulary.encode(b"the cat sat").ids.tolist()) == b"the cat sat"
    plain = Vocabulary.of_bytes()
    data = bytes(range(256))
    assert plain.decode([1, *plain.encode(data).ids.tolist(), 0, 1]) == data


def test_a_mask_token_is_added_once_and_behind_the_rest(folder):
    for vocabulary in (Vocabulary.load(str(folder)), Vocabulary.of_bytes()):
        size = vocabulary.size
        assert vocabulary.add_mask_token() == size == vocabulary.add_mask_token()
        assert vocabulary.size == size + 1
        ordinary = vocabulary.ordinary_ids()
        assert not set(ordinary.tolist()) & set(vocabulary.tokenizer.all_special_ids)
        assert len(ordinary) == vocabulary.size - len(set(vocabulary.tokenizer.all_special_ids))


def test_what_cannot_serve_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere cannot be loaded"):
        Vocabulary.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="gives no offsets: use the fast class"):
        Vocabulary(ReformerTokenizer(str(folder / "spiece.model")), "slow")
    tokenizer = ReformerByteTokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        Vocabulary(tokenizer, "mine")
