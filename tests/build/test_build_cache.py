"""The tests' cache of what they compile, with a shell in the place of a compiler."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import build_cache


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FAST_PROMPT_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


def checkout(folder):
    """A source, and the folder with the headers that it includes, one by the other."""
    headers = folder / "headers"
    headers.mkdir(parents=True)
    (folder / "kernel.cu").write_text('#include "one.h"\n#  include <vector>\n')
    (headers / "one.h").write_text("#include <two.h>\n")
    (headers / "two.h").write_text("two\n")
    return folder / "kernel.cu", headers


def compile_there(source, headers, script="echo compiled; cat $0 > out; echo run >> ../runs"):
    return build_cache.cached(["bash", "-c", script, str(source), f"-I{headers}"], [source], [headers])


def runs(cache):
    return len((cache / "runs").read_text().splitlines())


def test_the_same_content_is_compiled_once_wherever_it_lies(cache, tmp_path):
    first = compile_there(*checkout(tmp_path / "a"))
    again = compile_there(*checkout(tmp_path / "another"))
    assert first == again and runs(cache) == 1
    assert (first / "log").read_text() == "compiled\n" and "one.h" in (first / "out").read_text()


def test_any_change_of_content_is_compiled_anew(cache, tmp_path):
    source, headers = checkout(tmp_path / "a")
    compile_there(source, headers)
    (headers / "two.h").write_text("changed\n")
    compile_there(source, headers)
    compile_there(source, headers, "echo another command; echo run >> ../runs")
    assert runs(cache) == 3


def test_what_fails_leaves_nothing_behind(cache, tmp_path):
    source, headers = checkout(tmp_path / "a")
    with pytest.raises(build_cache.CompilationError, match="no such thing"):
        compile_there(source, headers, "echo no such thing >&2; exit 1")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_what_changes_meanwhile_is_not_kept(cache, tmp_path):
    source, headers = checkout(tmp_path / "a")
    with pytest.raises(build_cache.CompilationError, match="changed while"):
        compile_there(source, headers, f"echo changed > {headers}/two.h")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_one_of_many_at_once_compiles(cache, tmp_path):
    source, headers = checkout(tmp_path / "a")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: compile_there(source, headers, "sleep 0.1; echo run >> ../runs"), range(8)))
    assert len(folders) == 1 and runs(cache) == 1


def test_what_no_run_wants_any_more_is_removed(tmp_path):
    source, headers = checkout(tmp_path / "a")
    old = compile_there(source, headers)
    os.utime(old, (0, 0))
    assert compile_there(source, headers) == old  # wanted again
    (headers / "two.h").write_text("changed\n")
    newer = compile_there(source, headers)
    os.utime(old, (0, 0))
    (headers / "two.h").write_text("changed again\n")
    compile_there(source, headers)
    assert not old.exists() and newer.exists()
