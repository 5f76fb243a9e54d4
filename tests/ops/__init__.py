"""The operations, each against a definition written as loops (``definitions.py``), and the laws they obey."""
