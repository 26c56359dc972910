"""Adds the native library to the build that pyproject.toml describes.

FAST_PROMPT_BUILD=auto (the default) compiles it where torch, a C++ compiler and ninja are found, and otherwise
installs pure Python and says what is missing; 1 fails instead; 0 does not try. Build isolation hides torch, so
``pip install --no-build-isolation .`` compiles and plain ``pip install .`` does not.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
import build_native

PACKAGE = "fast_prompt"
MODE = os.environ.get("FAST_PROMPT_BUILD", "auto")


def decide() -> tuple[build_native.Toolchain | None, str | None]:
    """The tools to build with, or why there will be no library."""
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"FAST_PROMPT_BUILD: expected auto, 0 or 1, got {MODE!r}")
    if MODE == "0":
        return None, "FAST_PROMPT_BUILD=0 when it was installed"
    try:
        return build_native.find_toolchain(), None
    except build_native.BuildError as error:
        return None, give_up(error)


def give_up(error: build_native.BuildError) -> str:
    """Ends the build if the library was asked for; else says that there will be none."""
    if MODE == "1":
        raise SystemExit(f"FAST_PROMPT_BUILD=1: {error}")
    print(f"fast-prompt: installing without the native library: {error}", file=sys.stderr)
    return str(error)


tools, absence = decide()


class BuildLibrary(build_ext):
    """Runs ninja in place of setuptools' own compilation."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python: the library holds no Python symbol."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        """Builds into the wheel, or beside the sources for an editable install."""
        assert tools is not None
        self.inplace = self.inplace or self.editable_mode
        for extension in self.extensions:
            directory = Path(self.get_ext_fullpath(extension.name)).parent
            try:
                build_native.build(tools, directory)
            except build_native.BuildError as error:
                build_native.record_absence(directory, give_up(error))


class RecordAbsence(build_py):
    """Lets the installed package say why it has no library."""

    def run(self) -> None:
        """Copies the package, then writes the reason into the copy."""
        super().run()
        directory = Path(PACKAGE) if self.editable_mode else Path(self.build_lib) / PACKAGE
        build_native.record_absence(directory, absence or "")


class AnyPython(bdist_wheel):
    """Tags the wheel by platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


if tools is None:
    setup(cmdclass={"build_py": RecordAbsence})
else:
    library = Extension(f"{PACKAGE}._native", sources=[])
    setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
