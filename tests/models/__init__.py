"""The models: against transformers' Reformer where it is right, by hand where it is not."""
