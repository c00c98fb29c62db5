"""``python -m fgsteer``: the command line, as torchrun starts it."""

from fgsteer.cli import main

if __name__ == "__main__":
    main()
