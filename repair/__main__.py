"""`python -m repair` is the `repair` command."""

from repair.cli import main

if __name__ == "__main__":
    main()
