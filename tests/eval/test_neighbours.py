"""The picture of nearest neighbours: what stands in it, how it is framed, and without labels."""

import pytest
import torch
from PIL import Image, ImageColor

import eval.neighbours
from eval.neighbours import FRAME, GAP, HEAD, OTHER, OWN, SIDE, shares
from tests.eval.harness import save_images, save_run
from tests.helpers import evaluate

STEP = SIDE + 2 * FRAME


def frames(path, rows, k, block=0):
    """The colour of every neighbour's frame, (rows, k), as (R, G, B)."""
    picture = Image.open(path).convert("RGB")
    left = STEP + GAP + block * (k * STEP + GAP)
    return [
        [picture.getpixel((left + i * STEP + 1, HEAD + row * STEP + 1)) for i in range(k)]
        for row in range(rows)
    ]


def test_a_neighbour_of_the_own_class_is_green(tmp_path, capsys):
    """Raw pixels tell the three colours apart; names that disagree with them are all red."""
    run = save_run(tmp_path / "run", data=str(save_images(tmp_path / "source")))
    flags = ("--weights", "pixels", "--rows", "5", "--k", "4")
    evaluate(eval.neighbours, run, *flags)
    green, red = ImageColor.getrgb(OWN), ImageColor.getrgb(OTHER)
    assert frames(run / "neighbours.png", 5, 4) == [[green] * 4] * 5
    said = capsys.readouterr().out
    assert "pixels    100.0 % of an image's 4 nearest are of its class (at random: 31.0 %)" in said
    assert "among 30 of 30 images" in said

    train = tmp_path / "source" / "train"
    for i, path in enumerate(sorted(train.rglob("*.png"))):  # every image alone in its class
        (train / f"alone{i}").mkdir()
        path.rename(train / f"alone{i}" / path.name)
    evaluate(eval.neighbours, run, *flags, "--baselines", "random", "--out", tmp_path / "new" / "p")
    assert frames(tmp_path / "new" / "p", 5, 4) == [[red] * 4] * 5
    assert frames(tmp_path / "new" / "p", 5, 4, block=1) == [[red] * 4] * 5  # the baseline's


def test_images_without_labels_have_no_frames(tmp_path, capsys):
    source = tmp_path / "flat"
    source.mkdir()
    for i, colour in enumerate(["red", "#fe0000", "blue", "#0000fe"]):
        Image.new("RGB", (30, 20), colour).save(source / f"{i}.png")
    (source / "4.png").write_bytes(b"damaged")
    run = save_run(tmp_path / "run", data=str(source))
    evaluate(eval.neighbours, run, "--weights", "pixels", "--k", "9")
    picture = Image.open(run / "neighbours.png").convert("RGB")
    centre = HEAD + STEP // 2
    first, nearest = (picture.getpixel((x + STEP // 2, centre)) for x in (0, STEP + GAP))
    assert (first, nearest) == ((255, 0, 0), (254, 0, 0))  # and not itself
    assert frames(run / "neighbours.png", 4, 3) == [[(255, 255, 255)] * 3] * 4
    assert picture.size == (STEP + GAP + 3 * STEP + GAP, HEAD + 4 * STEP)
    said = capsys.readouterr().out
    assert "of its class" not in said and "among 4 of 5 images" in said


def test_shares_by_hand():
    labels = torch.tensor([0, 0, 1, 0, 1])
    index = torch.tensor([0, 1, 2, 4])  # the fourth could not be decoded
    near = torch.tensor([[1, 2], [0, 4], [4, 0], [2, 1]])
    assert shares(labels, index, near) == (50.0, pytest.approx(100 * 4 / 12))


def test_one_image_has_no_neighbours(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(SystemExit):
        evaluate(eval.neighbours, "--weights", "random:demo", "--data", tmp_path / "flat")
    assert "one image; neighbours need two or more" in capsys.readouterr().err
