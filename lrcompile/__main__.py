"""``python -m lrcompile``."""

from lrcompile.cli import main

if __name__ == "__main__":
    main()
