"""Files that are whole or not there."""

import multiprocessing

import pytest

from mspt import files


def _write_often(path, letter):
    for _ in range(100):
        files.write(path, letter * 100_000)


def test_of_several_writers_one_comes_last(tmp_path):
    """As two tables that share a folder of runs do."""
    path, context = tmp_path / "results.json", multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 100_000, "b" * 100_000)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_to_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    files.write(path, "before")
    with pytest.raises(TypeError):
        files.write(path, 1)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
