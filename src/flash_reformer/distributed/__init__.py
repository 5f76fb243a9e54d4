"""Sequences that are spread over several processes (sequence parallelism), on ``torch.distributed``."""

from flash_reformer.distributed.sequence import parallelize_sequence, unparallelize_sequence

__all__ = ["parallelize_sequence", "unparallelize_sequence"]
