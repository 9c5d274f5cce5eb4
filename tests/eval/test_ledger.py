"""What a long evaluation has finished is not made again; what belongs to another job is."""

import pytest

from molora.eval.ledger import Ledger, quiet


def _never():
    raise AssertionError("made again")


def test_a_run_that_was_cut_off_goes_on_with_what_it_has(tmp_path):
    path, job = tmp_path / "out" / "progress.jsonl", {"seed": 0, "adapter": "abc"}
    first = Ledger(path, job)
    assert first.piece("uniform", lambda: [1.5, 2]) == [1.5, 2]
    with path.open("a") as file:
        file.write('{"key": "shuffled", "val')  # the line that was being written
    second = Ledger(path, job)
    assert second.piece("uniform", _never) == [1.5, 2]
    assert second.piece("shuffled", lambda: 3) == 3
    assert Ledger(path, job).piece("shuffled", _never) == 3
    second.close()
    assert not list(path.parent.iterdir())


def test_what_another_job_has_finished_does_not_count(tmp_path):
    path = tmp_path / "progress.jsonl"
    Ledger(path, {"seed": 0}).piece("uniform", lambda: 1)
    assert Ledger(path, {"seed": 1}).piece("uniform", lambda: 2) == 2
    assert Ledger(path, {"seed": 0}).piece("uniform", lambda: 3) == 3


def test_a_piece_that_fails_is_not_kept(tmp_path):
    path = tmp_path / "progress.jsonl"
    with pytest.raises(ZeroDivisionError):
        Ledger(path).piece("a", lambda: 1 / 0)
    assert Ledger(path).piece("a", lambda: 1) == 1


def test_without_a_file_values_are_made_once():
    ledger = Ledger()
    assert [ledger.piece("a", lambda: 1), ledger.piece("a", _never)] == [1, 1]
    assert list(quiet([1, 2], "looking")) == [1, 2]
