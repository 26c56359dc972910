"""Folders with other versions of packages: made once, whole or not at all, and never silently absent."""

import sys

import pytest
from build_cache import root
from overlays import overlay


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A cache of this test's own, and a pip that finds nothing."""
    monkeypatch.setenv("FAST_PROMPT_TEST_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("FAST_PROMPT_TEST_OFFLINE", raising=False)
    return tmp_path


def test_what_is_there_is_not_made_again(empty_cache):
    folder = empty_cache / "overlays" / f"a==1+b==2-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True)
    assert overlay("b==2", "a==1") == folder


def test_what_pip_cannot_fetch_fails_and_leaves_no_folder(empty_cache):
    with pytest.raises(RuntimeError, match="pip could not install no-such-package"):
        overlay("no-such-package==1")
    assert not [path for path in (empty_cache / "overlays").iterdir() if not path.name.startswith(".")]


def test_only_a_machine_that_says_so_skips(empty_cache, monkeypatch):
    monkeypatch.setenv("FAST_PROMPT_TEST_OFFLINE", "1")
    with pytest.raises(pytest.skip.Exception, match="no-such-package==1"):
        overlay("no-such-package==1")


def test_the_cache_is_outside_the_checkout(monkeypatch):
    monkeypatch.delenv("FAST_PROMPT_TEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(root()) == "/elsewhere/fast_prompt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert root().parts[-2:] == (".cache", "fast_prompt")
