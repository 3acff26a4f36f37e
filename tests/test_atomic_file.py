import os

import pytest

from ring_rl.atomic_file import atomic_file


def test_a_file_appears_with_its_content_only(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_file(path, overwrite=False) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write_half_of_it():
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half_of_it()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_has_to_be_asked_for(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(FileExistsError, match="not overwritten"), atomic_file(path, overwrite=False):
        pytest.fail("the block must not run")
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch, hard_links):
    def no_links(*_):
        raise PermissionError("this file system has no hard links")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "file.txt"

    def write_beside_somebody_else():
        with atomic_file(path, overwrite=False) as temporary:
            temporary.write_text("mine")
            path.write_text("somebody's")

    with pytest.raises(FileExistsError, match="not overwritten"):
        write_beside_somebody_else()
    assert path.read_text() == "somebody's"
    assert list(tmp_path.iterdir()) == [path]


def test_it_works_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    with atomic_file(tmp_path / "file.txt", overwrite=False) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_others_may_read_it_as_far_as_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "file.txt", overwrite=False) as temporary:
            temporary.write_text("shared")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o644
