"""The state of a long judgement: taken up by the same judgement alone."""

import pytest
import torch

from eval import unfinished
from eval.unfinished import Unfinished


def run(folder, first=0, last=None, key="k", total=10):
    """The steps done; stopped after step `last`."""
    it = Unfinished(folder, "x", key)
    assert it.state.get("step", 0) == first
    done = list(it.state.get("done", []))

    for step in it.steps(total, "x", lambda: {"done": done}, it.state.get("step", 0)):
        done.append(step)
        if step == last:
            return done, it
    it.remove()
    return done, it


def test_no_step_twice_and_none_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "PAUSE", 0.0)
    done, _ = run(tmp_path, last=4)
    assert done == [0, 1, 2, 3, 4]
    done, _ = run(tmp_path, first=4, last=7)  # step 4 was done, but not saved before the stop
    assert done == [0, 1, 2, 3, 4, 5, 6, 7]
    done, _ = run(tmp_path, first=7)
    assert done == list(range(10)) and not (tmp_path / "unfinished").exists()


def test_of_another_judgement_or_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unfinished, "PAUSE", 0.0)
    run(tmp_path, last=4)
    assert Unfinished(tmp_path, "x", "other").state == {}
    assert Unfinished(tmp_path, "y", "k").state == {}
    path = tmp_path / "unfinished" / "x.pt"
    path.write_bytes(path.read_bytes()[:50])
    assert Unfinished(tmp_path, "x", "k").state == {}
    assert "cannot be read" in capsys.readouterr().err


def test_time_counts_on(tmp_path):
    one = Unfinished(tmp_path, "x", "k")
    one.began -= 100
    one.save(step=1)
    assert Unfinished(tmp_path, "x", "k").seconds() == pytest.approx(100, abs=5)


def test_without_a_folder_nothing_is_kept(tmp_path):
    it = Unfinished(None, "x", "k")
    it.save(step=1)
    it.remove()
    assert not list(tmp_path.iterdir())


def test_no_code_is_run_from_it(tmp_path, capsys):
    class Bad:
        def __reduce__(self):
            return print, ("code ran",)

    (tmp_path / "unfinished").mkdir()
    torch.save({"key": "k", "bad": Bad()}, tmp_path / "unfinished" / "x.pt")
    assert Unfinished(tmp_path, "x", "k").state == {}
    assert "code ran" not in capsys.readouterr().out
