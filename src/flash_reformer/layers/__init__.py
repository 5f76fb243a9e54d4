"""Modules with weights: embeddings, attention, blocks, heads.

Sub-module names are the checkpoint's keys and equal those of ``transformers``' Reformer. Sub-modules are called,
never read for their ``weight``, so LoRA, hooks, quantisation and offloading keep working.
"""
