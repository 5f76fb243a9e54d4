"""Kernels against the definitions in ``flash_reformer.ops``."""
