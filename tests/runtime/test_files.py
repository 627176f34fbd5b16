import os
from pathlib import Path

import pytest

from phi_runtime.errors import NotFoundError, PhiError
from phi_runtime.files import staged_folder, write_file


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "out"
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as stage:
        (stage / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list((tmp_path / "a").iterdir())
    with staged_folder(target) as stage:
        (stage / "one").write_text("1")
        assert not target.exists()
    assert os.listdir(target) == ["one"]
    with staged_folder(target) as stage:
        (stage / "two").write_text("2")
        assert os.listdir(target) == ["one"]
    assert os.listdir(target) == ["two"]
    assert os.listdir(target.parent) == ["out"]


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "f"
    write_file(path, "old")
    write_file(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    dead, living = tmp_path / ".out.partial-999999999-x", tmp_path / f".out.partial-{os.getpid()}-x"
    dead.mkdir()
    living.mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    assert not dead.exists()
    assert living.exists()


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(NotFoundError, match="not a folder"), staged_folder(tmp_path / "f" / "out"):
        pass


def test_a_folder_that_may_not_be_written():
    with pytest.raises(PhiError, match="/sys/"), staged_folder(Path("/sys/phi-edge-out")):
        pass


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    with staged_folder(target) as stage:
        (stage / "old").write_text("1")
    rename = os.rename

    def fail_second(a, b):
        if Path(b) == target and "partial" in str(a):
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as stage:
        (stage / "new").write_text("2")
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_between_two_renames_leaves_is_put_back(tmp_path):
    moved = tmp_path / ".out.replaced-999999999"
    moved.mkdir()
    (moved / "precious").write_text("x")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "out") == ["precious"]
