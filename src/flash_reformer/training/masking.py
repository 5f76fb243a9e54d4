"""Masked words: what a masked language model has to recover (BERT's recipe, over whole words)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flash_reformer.training.packing import IGNORED_LABEL, PackedBlocks
from flash_reformer.training.vocabulary import NO_WORD, Encoded

# Of the masked words so many become mask tokens, so many random ones; the rest stay as they are.
SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """How words are hidden.

    Attributes:
        mask_id: the mask token.
        probability: share of the words that are to be recovered.
        ordinary_ids: ``[n]`` what random replacements are drawn from.
    """

    mask_id: int
    probability: float
    ordinary_ids: Tensor

    def apply(self, ids_BT: Tensor, words_BT: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return ids with hidden words and labels, -100 where nothing is to be recovered; both ``[B, T]``.

        Args:
            ids_BT: token ids.
            words_BT: number of each token's word, or -1 for tokens that are never masked. One draw decides about a
                word, wherever its tokens stand in the row.
            generator: source of all draws.
        """
        real_BT = words_BT != NO_WORD
        # Words as 0, 1, 2, ... within each row.
        first_B1 = torch.where(real_BT, words_BT, words_BT.max()).amin(dim=1, keepdim=True)
        word_BT = torch.where(real_BT, words_BT - first_B1, 0)
        draws = torch.rand(2, ids_BT.shape[0], int(word_BT.max()) + 1, generator=generator)
        chosen_BW, kind_BW = draws[0] < self.probability, draws[1]
        # A row in which nothing is chosen teaches nothing: take the likeliest word.
        chosen_BW |= draws[0] == self._lowest(draws[0], word_BT, real_BT)
        chosen_BT = chosen_BW.gather(1, word_BT) & real_BT
        kind_BT = kind_BW.gather(1, word_BT)
        labels_BT = torch.where(chosen_BT, ids_BT, IGNORED_LABEL)
        picks_BT = torch.randint(len(self.ordinary_ids), ids_BT.shape, generator=generator)
        hidden_BT = torch.where(kind_BT < SHARE_MASKED, self.mask_id, self.ordinary_ids[picks_BT])
        hidden_BT = torch.where(kind_BT < SHARE_MASKED + SHARE_RANDOM, hidden_BT, ids_BT)
        return torch.where(chosen_BT, hidden_BT, ids_BT), labels_BT

    @staticmethod
    def _lowest(draw_BW: Tensor, word_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Return ``[B, 1]`` the lowest draw of the words that a row has."""
        return torch.where(real_BT, draw_BW.gather(1, word_BT), 1.0).amin(dim=1, keepdim=True)


def word_row(text: Encoded, done: int, *, by_token: bool) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``words`` of a block, both int64 of shape ``[length]``. What is ``done`` counts too."""
    words = text.words.astype(np.int64)
    if by_token:
        words = np.where(words == NO_WORD, NO_WORD, np.arange(len(words)))
    return {"input_ids": torch.from_numpy(text.ids.astype(np.int64)), "words": torch.from_numpy(words)}


class WordBlocks(PackedBlocks):
    """Blocks of ``length`` tokens with their words, each token in one block but for those of the last."""

    def __init__(
        self, text: Encoded, length: int, starts: NDArray[np.int64] | None = None, *, by_token: bool = False
    ) -> None:
        super().__init__(text, length, starts)
        if starts is None:
            self.starts = np.arange(0, len(text.ids) - 1, self.length, dtype=np.int64)
        self.by_token = by_token

    def spread(self, count: int) -> "WordBlocks":
        """Return at most ``count`` whole blocks spread evenly over the text."""
        return WordBlocks(self.text, self.length, super().spread(count).starts, by_token=self.by_token)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``words`` of one block, both int64 of shape ``[length]``."""
        place, done = self.place(index)
        text = Encoded(self.text.ids[place], self.text.byte_counts[place], self.text.words[place])
        return word_row(text, done, by_token=self.by_token)


class MaskedBlocks(Dataset[dict[str, Tensor]]):
    """Blocks masked once and for all, so that every evaluation asks the same."""

    def __init__(self, blocks: WordBlocks, masking: Masking, seed: int) -> None:
        self.rows = []
        for index in range(len(blocks)):
            row = blocks[index]
            generator = torch.Generator().manual_seed(seed + index)
            ids, labels = masking.apply(row["input_ids"][None], row["words"][None], generator)
            if bool((labels != IGNORED_LABEL).any()):
                self.rows.append({"input_ids": ids[0], "labels": labels[0]})

    def __len__(self) -> int:
        """Number of blocks in which something is masked."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels`` ``[length]``."""
        return self.rows[index]
