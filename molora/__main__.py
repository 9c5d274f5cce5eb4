"""``python -m molora``: the command line."""

from molora.cli.main import main

if __name__ == "__main__":
    main()
