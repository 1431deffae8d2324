"""What judges an encoder: one command a question, listed by `python -m eval`."""

import sys

try:
    from common import cli  # noqa: F401
except ImportError as error:  # another `common` comes first on the path, or nothing is installed
    way_out = "activate .venv, or pass over the current folder: python -P -m ..."
    print(f"error: {error}; {way_out}", file=sys.stderr)
    sys.exit(2)
