"""Power cuts: wherever a command is cut off, and whatever the file system loses then, the store opens to the old or the new snapshot.

Every prefix of a command's calls to the disk is replayed into a file system that keeps and loses what POSIX lets it (`crash`); every
state is looked at (`cuts`). An acknowledged commit is there whatever is lost after it.
"""

import pytest
from acts import a_life, coded_life, joining_life, merge_life
from cuts import FULL, QUICK, play


EFFORTS = [pytest.param(QUICK, id="quick"), pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_life(fast_path, monkeypatch, tell, effort):
    """Each command once, in the life of one store."""
    play(fast_path, monkeypatch, a_life(), tell, effort)


@pytest.mark.parametrize("effort", EFFORTS)
def test_appends_that_join_segments(fast_path, monkeypatch, tell, effort):
    """An append that writes small segments again as one, without their dead rows."""
    play(fast_path, monkeypatch, joining_life(), tell, effort, skip=4)


@pytest.mark.parametrize("effort", EFFORTS)
def test_raw_keys_become_codes(fast_path, monkeypatch, tell, effort):
    """An append that trains the first quantizer and encodes what is there."""
    play(fast_path, monkeypatch, coded_life(), tell, effort, skip=1)


@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_merges(fast_path, monkeypatch, tell, effort, link, into):
    """Into a new store and into one that is there; the stores that are merged stay as they were."""
    (fast_path / "root").mkdir()
    play(fast_path, monkeypatch, merge_life(fast_path / "root", link=link, into=into), tell, effort, skip=into)
