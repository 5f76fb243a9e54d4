"""``python -m flash_reformer.cli``: the command line, as launchers start it."""

from flash_reformer.cli import main

if __name__ == "__main__":
    main()
