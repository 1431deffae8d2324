"""What there is: `python -m moco` lists the recipes of this folder and the commands for them."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .config import PUBLISHED, RECIPES, Config


def overview(package: str) -> str:
    """The recipes as a table, and the commands. Twins: simclr/__main__.py, byol/__main__.py.

    Args:
        package: the name of this folder, which may have been copied under another one.
    """
    rows = [("recipe", "network", "pixels", "epochs", "batch", "published Top-1 (%)")]
    for name, (cfg, _) in RECIPES.items():
        stem = "-cifar" if cfg.stem == "cifar" and cfg.arch.startswith("resnet") else ""
        numbers = str(cfg.image_size), f"{cfg.epochs:g}", str(cfg.batch_size)
        rows.append((name, cfg.arch + stem, *numbers, PUBLISHED.get(name, "none")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines = [(Config.__doc__ or "").splitlines()[0], "", *lines]
    if Path(__file__).with_name("pretrain.py").exists():  # else the folder was copied without it
        lines += [
            "\nTo train, and to see what can judge the RUN (--help after RECIPE: all settings):\n",
            f"python -m {package}.pretrain RECIPE --data SOURCE --out RUN",
            "python -m eval",
            "\nTo train, judge and compare, in one command that may be interrupted and repeated:\n",
            f"bash {package}/reproduce.sh RECIPE [SOURCE [RUN]]",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] and not {"-h", "--help"} & set(sys.argv[1:]):
        words = " ".join(sys.argv[1:])
        print(f"error: to train, python -m {__package__}.pretrain {words}", file=sys.stderr)
        sys.exit(2)
    print(overview(__package__ or ""))
