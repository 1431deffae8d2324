"""Tables whose columns have other names than usual: the flags that name them."""

import io

import datasets
import pytest
from PIL import Image

import eval.knn
import eval.linear
import eval.transfer
from common.files import read_json
from tests import helpers
from tests.eval.harness import save_run

COMMANDS = {
    "knn-weighted-k3": (eval.knn, "--k", "3"),
    "linear-features": (eval.linear, "--protocol", "features", "--epochs", "1"),
    "transfer-logistic": (eval.transfer, "--iterations", "2"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two columns of images and two of labels, none of a usual name."""
    folder = tmp_path_factory.mktemp("table")
    for split, count in (("train", 30), ("test", 12)):
        rows: dict = {"photo": [], "mask": [], "kind": [], "shade": []}
        for i in range(count):
            for column, place in (("photo", i % 3), ("mask", i % 2)):
                colour, file = [10 + i] * 3, io.BytesIO()
                colour[place] = 200
                Image.new("RGB", (16, 16), tuple(colour)).save(file, "PNG")
                rows[column].append({"bytes": file.getvalue(), "path": None})
            rows["kind"].append("abc"[i % 3])
            rows["shade"].append("xy"[i % 2])
        images, texts = datasets.Image(), datasets.Value("string")
        kinds = {"photo": images, "mask": images, "kind": texts, "shade": texts}
        table = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def judged(tmp_path):
    """A command on a run of the given config, to the records by their names."""

    def call(config, protocol, *argv):
        run = tmp_path / config["label_column"]
        if not run.exists():
            save_run(run, **config)
        module, *flags = COMMANDS[protocol]
        helpers.evaluate(module, run, *flags, *argv)
        return {path.stem: read_json(path) for path in (run / "results").iterdir()}

    return call


@pytest.mark.parametrize("protocol", COMMANDS)
def test_columns_of_another_source_are_named(judged, source, protocol, capsys):
    config = {"data": "demo", "image_column": "img", "label_column": "fine"}  # not of this source
    with pytest.raises(SystemExit):
        judged(config, protocol, "--data", source)
    with pytest.raises(SystemExit):
        judged(config, protocol, "--data", source, "--image-column", "photo")
    first, second = capsys.readouterr().err.splitlines()
    assert "(photo, mask)" in first and "--image-column NAME" in first
    assert "has no labels" in second and "--label-column NAME" in second
    columns = ("--image-column", "photo", "--label-column", "kind")
    ((name, row),) = judged(config, protocol, "--data", source, *columns).items()
    assert name.startswith(f"{protocol}-encoder-on-") and row["data"] == source
    assert row["columns"] == {"image_column": "photo", "label_column": "kind"}
    assert (row["train_images"], row["test_images"]) == (30, 12)


@pytest.mark.parametrize("protocol", COMMANDS)
def test_other_columns_of_the_runs_source_have_a_record_of_their_own(judged, source, protocol):
    config = {"data": source, "image_column": "photo", "label_column": "kind"}
    (first,) = judged(config, protocol)
    assert judged(config, protocol, "--label-column", "kind").keys() == {first}  # the same
    found = judged(config, protocol, "--image-column", "mask", "--label-column", "shade")
    columns = sorted(tuple(row["columns"].values()) for row in found.values())
    assert columns == [("mask", "shade"), ("photo", "kind")]
