"""Files that a kill cannot tear, and logs that go on where their checkpoint is."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    append_row,
    atomic_write,
    keep_rows_before,
    path_of,
    read_json,
    remove_leftovers,
    to_json,
    utf8_name,
)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    for error, raised in ((OSError, UserError), (KeyboardInterrupt, KeyboardInterrupt)):
        with pytest.raises(raised), atomic_write(target) as aside:
            aside.write_text("half")
            assert target.read_text() == "old"
            raise error
        assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with atomic_write(target) as aside:
        aside.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match=r"file/sub: cannot be written \("):  # a file, no folder
        append_row(target / "sub", {"step": 1})


def test_what_a_kill_left_aside_goes_and_nothing_else(tmp_path):
    left, others = (".config.json.123", ".a.pt.45"), (".config.json.mine", ".vimrc.x1", "a.1")
    for name in (*left, *others):
        (tmp_path / name).write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_rows_from_a_step_on_and_torn_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_rows_before(path, 3)
    assert not path.exists()
    for step in range(6):
        append_row(path, {"step": step, "loss": 1.5})
    whole = path.read_bytes()
    assert whole.startswith(b'{"step": 0, "loss": 1.5}\n{"step": 1,')
    path.write_bytes(whole + b'{"step": 2, "lo')
    keep_rows_before(path, 4)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    path.write_bytes(whole + b'{"step": 1}')  # whole but for its end: written again
    keep_rows_before(path, 9)
    assert path.read_bytes() == whole


def test_json_that_is_none(tmp_path):
    for content in (b'{"a": ', b"\xff", b""):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json: cannot be read"):
            read_json(tmp_path / "a.json")


# ---- names that are not UTF-8 --------------------------------------------------------------------


def test_a_record_shows_what_is_not_utf_8_and_the_path_is_found_again(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9")
    written = to_json({"data": str(folder), os.fsdecode(b"\xff"): [(str(folder),), 1, None]})
    shown = f"{tmp_path}/caf\\xe9 \u00e9"
    assert json.loads(written) == {"data": shown, "\\xff": [[shown], 1, None]}
    assert path_of(shown) == shown  # nothing is there
    folder.mkdir()
    assert path_of(shown) == str(folder) and path_of(str(folder)) == str(folder)
    assert path_of(f"{tmp_path}/plain") == f"{tmp_path}/plain"
    Path(shown).mkdir()
    with pytest.raises(UserError, match="there are two"):
        path_of(shown)
    assert path_of(str(folder)) == str(folder)


def test_a_library_that_takes_utf_8_alone_opens_any_file(tmp_path):
    for name in (b"plain", b"caf\xe9"):
        path = tmp_path / os.fsdecode(name)
        path.write_text("content")
        utf8_name(path).encode()
        assert Path(utf8_name(path)).read_text() == "content"
    assert utf8_name(tmp_path / "plain") == str(tmp_path / "plain")
