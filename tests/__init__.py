"""The tests mirror ``src/flash_reformer`` room for room; ``house.py`` holds the rules of the house itself."""
