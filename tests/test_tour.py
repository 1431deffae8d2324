"""README.md's tour, as it stands there: from a folder of images to a picture, within ten minutes.

The folder is the environment's IMAGES, or else pictures that are drawn here, without labels.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from common import demo
from tests.helpers import ROOT


def tour():
    """The one ```bash block of README.md."""
    [block] = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def draw(folder, count=256):
    """`count` pictures of the embedded images, twice as large."""
    folder.mkdir()
    pixels, _ = demo.split("test")
    for i, image in enumerate(pixels[:count]):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.resize((64, 64)).save(folder / f"{i:03}.png")
    return folder


def test_begins_with_the_images():
    assert re.match(r"IMAGES=\$\{IMAGES:-path/to/your/images\}\n", tour())


@pytest.mark.slow
def test_ends_with_a_picture(tmp_path):
    images = os.environ.get("IMAGES") or draw(tmp_path / "images")
    found = {
        "IMAGES": str(Path(images).expanduser().resolve()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-c", tour()],
        cwd=tmp_path,
        env=os.environ | found,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{done.stdout}\n{time.monotonic() - began:.0f} s")  # shown by pytest -rP
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began < 600
    with Image.open(tmp_path / "runs" / "tour" / "neighbours.png") as picture:
        assert picture.width > 800 and picture.height > 600
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 100
