"""What judges an encoder: one command a question, listed by `python -m eval`."""

import sys

try:
    from common import cli  # noqa: F401
except ImportError as error:  # another `common` comes first on the path, or nothing is installed
    way_out = "python -P -m ... passes over the current folder"
    way_out = way_out if error.name == "common" else "activate .venv, or pip install -e ."
    print(f"error: {error}; {way_out}", file=sys.stderr)
    sys.exit(2)
