"""Judgements that are stopped where they keep their state, and begun again."""

from common.run import read_json
from eval import unfinished


class Stopped(Exception):
    pass


def again(monkeypatch, stops, judge):
    """Call `judge` until it ends; it is stopped after keeping its state for the n-th time."""
    keep, read, kept, stopped = unfinished.Unfinished.keep, unfinished.Unfinished._read, 0, 0

    def read_what_was_kept(self):
        state = read(self)
        assert bool(state) == bool(stopped)  # it does go on
        return state

    def keep_or_stop(self, **state):
        nonlocal kept
        keep(self, **state)
        kept += 1
        if kept in stops:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "PAUSE", 0.0)  # after every step
        patch.setattr(unfinished.Unfinished, "keep", keep_or_stop)
        patch.setattr(unfinished.Unfinished, "_read", read_what_was_kept)
        while True:
            try:
                judge()
                break
            except Stopped:
                stopped += 1
    assert stopped == len(stops)


def assert_same_records(one, other):
    """But for when and how long; and nothing unfinished is left."""
    names = sorted(path.name for path in one.iterdir())
    assert names and names == sorted(path.name for path in other.iterdir())
    for name in names:
        rows = [read_json(folder / name) for folder in (one, other)]
        for row in rows:
            del row["seconds"], row["judged"]
        assert rows[0] == rows[1]
