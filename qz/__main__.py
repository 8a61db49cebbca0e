"""``python -m qz``."""

from qz.cli.entry import main

if __name__ == "__main__":
    main()
