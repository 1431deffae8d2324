"""What judges an encoder: one command a question, listed by `python -m eval`."""

import sys

try:
    from common import cli  # noqa: F401
except ImportError as error:  # another `common` comes first on the path; the message names its file
    print(f"error: {error}; pass over the current folder: python -P -m ...", file=sys.stderr)
    sys.exit(2)
