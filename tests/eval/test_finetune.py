"""Which labels are used, what is recorded, and an encoder that keeps its own weights."""

import pytest
import torch
from torch import nn

from common.cli import UserError
from common.data import Images
from common.run import read_json
from eval import finetune
from eval.encoder import Encoder, Input
from eval.features import fingerprint
from eval.finetune import Settings, choose
from eval.results import Subject


class Network(nn.Module):
    num_features = 3

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images).mean((2, 3))


def coloured(count):
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, (count, 3, 12, 12), generator=torch.Generator().manual_seed(count))
    pixels[torch.arange(count), labels] += 150
    return Images("coloured", pixels.byte(), labels, ("r", "g", "b"), store=pixels.byte())


def test_a_fraction_is_balanced_and_seeded():
    images = coloured(300)
    keep = choose(images, 0.1, "", 1)
    assert images.labels[keep].bincount().tolist() == [10, 10, 10]
    assert torch.equal(keep, choose(images, 0.1, "", 1))
    assert not torch.equal(keep, choose(images, 0.1, "", 2))
    assert choose(images, 1.0, "", 1).all()
    assert choose(images, 1e-6, "", 1).sum() == 3  # at least one of each class


def test_a_list_of_names(tmp_path):
    images = Images("x", ["/a/one.png", "/a/two.png", "/b/three.png"], torch.tensor([0, 0, 1]))
    names = tmp_path / "names.txt"
    names.write_text("three.png\none.png\n")
    assert choose(images, 1.0, str(names), 1).tolist() == [True, False, True]
    names.write_text("four.png\n")
    with pytest.raises(UserError, match="1 not there"):
        choose(images, 1.0, str(names), 1)
    with pytest.raises(UserError, match="cannot be read"):
        choose(images, 1.0, str(tmp_path / "none"), 1)


@pytest.mark.parametrize(("fraction", "name", "epochs"), [(0.1, "10", 30), (1.0, "100", 60)])
def test_the_record(tmp_path, fraction, name, epochs):
    config = {"data": "x", "batch_size": 8, "seed": 1}
    encoder = Encoder(Network().eval(), Input(12, crop=1.0), "encoder", {"method": "moco"})
    splits = (coloured(120), coloured(30))
    before = fingerprint(encoder.network)
    subject = Subject(encoder, "x", {}, tmp_path, config, "cpu", splits)
    finetune.judge(subject, Settings(label_fraction=fraction, batch_size=60))
    assert fingerprint(encoder.network) == before
    row = read_json(tmp_path / f"finetune-{name}-encoder.json")
    assert row["train_images"] == 120 * fraction and row["probe_epochs"] == epochs
    assert row["probe_batch_size"] == min(60, row["train_images"])
    assert row["lr"] == pytest.approx(0.05 * row["probe_batch_size"] / 256)
    assert ("labels" in row) == (fraction < 1)
