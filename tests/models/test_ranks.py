"""The automatic bucket count that is saved is the largest that any rank has trained with (SEMANTICS 1.4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flash_reformer as fr

LENGTHS = (20, 45)


def train_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(LENGTHS))
    config = fr.ReformerConfig(
        attn_layers=["lsh"],
        hidden_size=8,
        num_attention_heads=2,
        attention_head_size=4,
        axial_pos_shape=(8, 8),
        axial_pos_embds_dim=(4, 4),
        feed_forward_size=8,
        lsh_attn_chunk_length=8,
    )
    model = fr.ReformerModel(config).train()
    model(torch.zeros(1, LENGTHS[rank], dtype=torch.long))
    alone = list(config.trained_num_buckets or [])
    model.share_trained_buckets()
    Path(folder, f"{rank}.txt").write_text(f"{alone} {config.trained_num_buckets}", encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_longest_input_of_all_ranks_decides(tmp_path: Path) -> None:
    mp.spawn(train_on_a_rank, args=(str(tmp_path),), nprocs=len(LENGTHS))
    assert (tmp_path / "0.txt").read_text() == "[4] [8]"
    assert (tmp_path / "1.txt").read_text() == "[8] [8]"
