"""``python -m millstream`` is the command ``millstream``."""

from .cli.main import cli, main

__all__ = ["cli"]

if __name__ == "__main__":
    main()
