"""Which labels are used, what is recorded, and an encoder that keeps its own weights."""

from functools import partial

import pytest
import torch
from torch import nn

from common import encoders
from common.data import ImageSplit
from common.errors import UserError
from eval import finetune
from eval.encoder import Encoder, Preprocess
from eval.finetune import Settings, choose
from eval.identity import fingerprint
from eval.training import Order, Speed
from eval.unfinished import Unfinished
from tests.eval.harness import Network, again, assert_same_records, coloured, record_of, subject_of


def test_a_fraction_is_balanced_and_seeded():
    images = coloured(300)
    keep = choose(images, 0.1, "", 1)
    assert images.labels[keep].bincount().tolist() == [10, 10, 10]
    assert torch.equal(keep, choose(images, 0.1, "", 1))
    assert not torch.equal(keep, choose(images, 0.1, "", 2))
    assert choose(images, 1.0, "", 1).all()
    assert choose(images, 1e-6, "", 1).sum() == 3  # at least one of each class


def test_a_list_of_names(tmp_path):
    images = ImageSplit("x", ["/a/one.png", "/a/two.png", "/b/three.png"], torch.tensor([0, 0, 1]))
    names = tmp_path / "names.txt"
    names.write_text("three.png\none.png\n")
    assert choose(images, 1.0, str(names), 1).tolist() == [True, False, True]
    names.write_text("four.png\n")
    with pytest.raises(UserError, match="1 not there"):
        choose(images, 1.0, str(names), 1)
    with pytest.raises(UserError, match="cannot be read"):
        choose(images, 1.0, str(tmp_path / "none"), 1)


def test_a_list_may_name_folders_and_must_be_unambiguous(tmp_path):
    paths = ["/data/cat/1.jpg", "/data/dog/1.jpg", "/data/dog/2.jpg"]
    images = ImageSplit("x", paths, torch.tensor([0, 1, 1]), ("cat", "dog"))
    names = tmp_path / "names.txt"
    names.write_text("./cat/1.jpg\n2.jpg\n\n")
    assert choose(images, 1.0, str(names), 1).tolist() == [True, False, True]
    names.write_text("1.jpg\n")
    with pytest.raises(UserError, match="2 images are called 1"):
        choose(images, 1.0, str(names), 1)


def test_the_official_lists_find_the_hubs_names(tmp_path):
    """The Hub's ImageNet adds the class to the name that the lists have."""
    rows = [{"bytes": b"", "path": f"n01440764_{i}_n01440764.JPEG"} for i in range(3)]
    images = ImageSplit("x", rows, torch.tensor([0, 0, 0]), ("tench",))
    names = tmp_path / "1percent.txt"
    names.write_text("n01440764_0.JPEG\nn01440764_2.JPEG\n")
    assert choose(images, 1.0, str(names), 1).tolist() == [True, False, True]


@pytest.mark.parametrize(("fraction", "percent", "epochs"), [(0.01, 1, 60), (1.0, 100, 30)])
def test_the_record(tmp_path, fraction, percent, epochs):
    subject = subject_of(tmp_path)
    before = fingerprint(subject.encoder.network)
    finetune.judge(subject, Settings(label_fraction=fraction, batch_size=60))
    assert fingerprint(subject.encoder.network) == before
    row = record_of(tmp_path)
    assert row["train_images"] == max(3, 120 * fraction) and row["settings"]["epochs"] == epochs
    assert row["settings"]["batch_size"] == min(60, row["train_images"])
    rate = 0.05 * row["settings"]["batch_size"] / 256
    assert row["settings"]["lr"] == pytest.approx(rate, abs=1e-6)
    assert bool(row["settings"]["labels"]) == (fraction < 1)
    assert row["settings"]["label_percent"] == percent and row["deviations"] == []
    assert not (tmp_path / "unfinished").exists()


# ---- protocols -----------------------------------------------------------------------------------


def encoder_of(method, name="encoder", linears=2):
    metadata = {"method": method, "head": ["Linear", "ReLU"] * linears}
    return Encoder(Network(), Preprocess(12), name, metadata)


@pytest.mark.parametrize(
    ("encoder", "percent", "name", "peak", "epochs"),
    [
        (encoder_of("simclr"), 1, "simclr", 0.8, (60,)),  # B.5: 0.8 at 4096
        (encoder_of("simclr"), 10, "simclr", 0.8, (30,)),
        (encoder_of("moco"), 10, "simclr", 0.8, (30,)),
        (encoder_of("simclr", linears=3), 1, "simclr-v2", 0.16, (60,)),  # README: 0.16 at 1024
        (encoder_of("byol"), 1, "byol", 0.04, (30, 50)),
        (encoder_of("byol", "random"), 100, "simclr", 0.8, (30,)),  # the supervised baseline
    ],
)
def test_the_papers_protocols(encoder, percent, name, peak, epochs):
    found = finetune.protocol_of(encoder, Settings(), percent)
    assert (found.name, found.epochs) == (name, epochs)
    assert found.peak(found.rates[0], found.batch_size) == pytest.approx(peak)
    said = finetune.protocol_of(encoder, Settings(protocol="byol", epochs=3, base_lr=0.2), percent)
    assert (said.name, said.epochs, said.rates) == ("byol", (3,), (0.2,))


def test_simclr_v2_begins_in_the_head_where_labels_are_few():
    v2 = encoder_of("simclr", linears=3)
    assert finetune.layer_of(v2, Settings(label_fraction=0.1)) == 1
    assert finetune.layer_of(v2, Settings()) == 0
    assert finetune.layer_of(v2, Settings(label_fraction=0.1, layer=2)) == 2
    assert finetune.layer_of(encoder_of("simclr"), Settings(label_fraction=0.1)) == 0


@pytest.mark.parametrize(
    ("count", "size", "asked", "batch"),
    [
        (128_116, 224, 0, 4096), (12_811, 224, 0, 4096), (5_000, 224, 0, 256),
        (50_000, 32, 0, 256), (50_000, 32, 4096, 4096), (100, 32, 0, 100),
    ],
)  # fmt: skip
def test_the_batch_on_few_or_small_images(count, size, asked, batch):
    settings = Settings(batch_size=asked)
    assert finetune.batch_of(finetune.SIMCLR, settings, count, size) == batch


def test_a_sweep_chooses_on_held_out_images(tmp_path, monkeypatch):
    tried = []

    def instead(subject, images, protocol, settings, unfinished, progress):
        tried.append((protocol.rates[0], protocol.epochs[0], len(images)))
        model = nn.Sequential(Network(), nn.Linear(3, 3))
        nn.init.zeros_(model[1].bias)
        right = protocol.rates == (0.05,) and protocol.epochs == (50,)
        with torch.no_grad():
            model[1].weight.copy_(torch.eye(3) if right else -torch.eye(3))
        return model.eval(), Speed(1.0, 0.0)

    monkeypatch.setattr(finetune, "fine_tune", instead)
    finetune.judge(subject_of(tmp_path, method="byol"), Settings())
    assert len(tried) == 10 and {images for *_, images in tried} == {108}
    row = record_of(tmp_path)
    assert row["metrics"]["top1"] == 100.0 and row["settings"]["chosen_of"] == 10
    assert row["settings"]["epochs"] == 50
    assert row["settings"]["lr"] == pytest.approx(0.05 * 108 / 256, abs=1e-6)


def test_few_labels_are_all_trained_on_where_others_can_choose(tmp_path, monkeypatch):
    """BYOL's local validation is of other training images than the 1 % that are trained on."""
    tuned = finetune.fine_tune
    seen = []

    def watched(subject, images, *rest):
        seen.append(images)
        return tuned(subject, images, *rest)

    monkeypatch.setattr(finetune, "fine_tune", watched)
    subject = subject_of(tmp_path, method="byol")
    finetune.judge(subject, Settings(label_fraction=0.1, epochs=1))
    assert len(seen) == 5 and {len(images) for images in seen} == {12}


def test_large_batches_go_through_in_parts(tmp_path, monkeypatch):
    """Without BatchNorm the parts are the whole."""

    class Plain(Network):
        def forward(self, images):
            return images.mean((2, 3)) * self.norm.weight

    found = []
    for part in (7, 100):
        monkeypatch.setattr(finetune, "Order", partial(Order, part=part))
        protocol = finetune.Protocol("x", (0.5,), (2,), 40)
        subject, nothing = subject_of(tmp_path, network=Plain()), Unfinished(None, "", "")
        images = subject.splits()[0]
        tuned, _ = finetune.fine_tune(subject, images, protocol, Settings(), nothing, {})
        found.append(tuned[1].weight.detach())
    assert torch.allclose(*found, rtol=0, atol=1e-6)


def test_lars_adapts_neither_the_classifier_nor_vectors():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    optimizer = finetune.optimizer_of(model, finetune.SIMCLR_V2, 0.0)
    adapted = {id(p) for g in optimizer.param_groups if g["lars_adaptation"] for p in g["params"]}
    assert adapted == {id(model[0][0].weight)}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(list(model.parameters()))


# ---- frozen layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "count"), [("resnet18-cifar", 3), ("demo", 2), ("demo", 0)])
def test_frozen_layers_do_not_move_and_the_others_do(tmp_path, arch, count):
    network = encoders.build(arch)
    subject = subject_of(tmp_path, network=network)
    settings = Settings(freeze=count, base_lr=5.0, epochs=1, batch_size=60)
    protocol = finetune.Protocol("x", (5.0,), (1,), 60)
    nothing = Unfinished(None, "", "")
    tuned, _ = finetune.fine_tune(subject, coloured(120), protocol, settings, nothing, {})
    for i, (before, after) in enumerate(
        zip(finetune.stages(network), finetune.stages(tuned[0]), strict=True)
    ):
        olds = [v for module in before for v in module.state_dict().values()]
        news = [v for module in after for v in module.state_dict().values()]
        same = [torch.equal(old, new) for old, new in zip(olds, news, strict=True)]
        assert all(same) if i < count else not any(same)


def test_stages_that_an_encoder_lacks(tmp_path):
    subject = subject_of(tmp_path, network=encoders.build("demo"))
    with pytest.raises(UserError, match="--freeze 5: the encoder has 4 stages"):
        finetune.judge(subject, Settings(freeze=5))
    with pytest.raises(UserError, match="only a ResNet and the demo network have stages"):
        finetune.judge(subject_of(tmp_path), Settings(freeze=1))


@pytest.mark.parametrize("protocol", ["simclr", "simclr-v2", "byol"])
def test_stopped_and_started_again_it_ends_the_same(tmp_path, monkeypatch, protocol):
    settings = Settings(protocol=protocol, epochs=2, batch_size=30)
    finetune.judge(subject_of(tmp_path / "whole"), settings)
    stops = {4, 11, 23} if protocol == "byol" else {4}  # within and between the rates
    again(monkeypatch, stops, lambda: finetune.judge(subject_of(tmp_path / "stopped"), settings))
    assert_same_records(tmp_path / "whole", tmp_path / "stopped")
