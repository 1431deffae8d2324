"""A checkpoint of the papers' authors as an encoder that every evaluation takes.

    python -m eval.weights moco_v2_800ep_pretrain.pth.tar --out moco-v2/encoder.safetensors
    python -m eval.weights ResNet50_1x/model.ckpt-225206 --out simclr-v1/encoder.safetensors
    python -m eval.weights pretrain_res50x1.pkl --out byol/encoder.safetensors
    python -m eval.linear byol --data ILSVRC/imagenet-1k     # results are kept in the folder

What a file is, is found from its content: MoCo's v1, v2 and v3 (ResNet), SimCLR's v1 and v2 as
TensorFlow checkpoints or SavedModels, of every width and with selective kernels, BYOL's, or a plain
state dict with torchvision's names. Nothing in it is run, and TensorFlow and JAX are not needed.
What is left out, as a second network or an optimiser, is counted. The evaluations also take such a
file as it is.
"""

import sys
from pathlib import Path

from common import cli
from eval.settings import Import as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.weights", __doc__
    )

from safetensors.torch import save_file

from common.errors import UserError
from common.files import atomic_write, naming, to_json
from eval.encoder import load_encoder
from eval.weights.official import format_of, read_official


def main(settings: Settings) -> None:
    """Read, write, and read again what was written."""
    source, out = Path(settings.run), Path(settings.out)
    if source.suffix == ".safetensors" and not format_of(source):
        raise UserError(f"{source}: already of this format; judge it as it is")
    if (source / "encoder.safetensors").exists():
        raise UserError(f"{source}: has an encoder.safetensors; judge it as it is")
    if out.exists():
        raise UserError(f"--out {out}: already there; give another file, or remove it")
    official = read_official(source)
    for line in official.lines():
        print(line)
    with naming(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    known = official.metadata | {"official": official.metadata["official"] | {"file": source.name}}
    head = {f"head.{key}": value for key, value in official.head_tensors.items()}
    with atomic_write(out) as aside:
        metadata = {key: to_json(value) for key, value in known.items()}
        save_file(official.tensors | head, aside, metadata=metadata)
    load_encoder(out)
    kept = out.name == "encoder.safetensors"  # then its folder is as good as a run's
    target = out.parent if kept else out
    print(f"{out}: written; next: python -m eval.linear {target} --data ILSVRC/imagenet-1k")


if __name__ == "__main__":
    cli.run(main, arguments)
