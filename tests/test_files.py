"""Files and folders are whole or not there, whoever else writes them and whatever was left."""

import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from mspt import files
from mspt.errors import UserError

MANY = multiprocessing.get_context("fork")


def overwrite(path, letter, enough):
    while not enough.is_set():
        files.write(path, letter * 300_000)
        time.sleep(0.002)  # a lock goes to whoever asks as it gets free: to one that never pauses nearly always


def test_processes_that_write_one_file_at_once(tmp_path):
    """What is read meanwhile is of one of them, and nothing stays beside it."""
    path, enough = tmp_path / "deep" / "file", MANY.Event()
    files.write(path, "z" * 300_000)
    writers = [MANY.Process(target=overwrite, args=(path, letter, enough)) for letter in "abc"]
    for writer in writers:
        writer.start()
    # For a second at least, and until all have had their turn, which may take long where much else runs.
    seen, begin = set(), time.monotonic()
    while time.monotonic() < begin + (60 if len(seen - {"z"}) < 3 else 1):
        text = path.read_text()
        assert len(text) == 300_000 and len(set(text)) == 1
        seen.add(text[0])
    enough.set()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and len(seen - {"z"}) == 3
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_no_such_file_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be written .*; give another name"):
            files.write(path, "y")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", [".", "file/below", "x" * 300])
def test_no_such_name_can_be(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(UserError, match=r"give (another|a) name"):
        files.write(name, "y")
    with pytest.raises(UserError, match=r"give (another|a) name"), files.new_folder(name):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def fill_slowly(path, begun):
    with files.new_folder(path) as aside:
        (aside / "part").write_text("half")
        begun.set()
        time.sleep(60)


def test_a_folder_that_another_process_is_writing(tmp_path):
    """It is left alone as long as that lives; of a killed one nothing stays."""
    path, begun = tmp_path / "out", MANY.Event()
    other = MANY.Process(target=fill_slowly, args=(path, begun))
    other.start()
    assert begun.wait(30)
    with pytest.raises(UserError, match="out: another process is writing it"), files.new_folder(path):
        pass
    assert [each.read_text() for each in tmp_path.glob(".out.partial/part")] == ["half"]
    other.kill()
    other.join()
    assert other.exitcode == -signal.SIGKILL and not path.exists()
    with files.new_folder(path) as aside:
        (aside / "whole").touch()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in path.iterdir()] == ["whole"]
