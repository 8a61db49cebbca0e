"""``python -m qz``."""

from qz.cli.app import main

if __name__ == "__main__":
    main()
