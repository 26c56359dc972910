"""Adds the native library to the build that pyproject.toml describes; what the environment says is in build_native.

Build isolation hides torch, so ``pip install --no-build-isolation .`` compiles and plain ``pip install .`` does not.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
import build_native
from build_native import PACKAGE

planned = build_native.plan()


class BuildLibrary(build_ext):
    """Runs ninja in place of setuptools' own compilation."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python: the library holds no Python symbol."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        """Builds into the wheel, or beside the sources for an editable install."""
        self.inplace = self.inplace or self.editable_mode
        for extension in self.extensions:
            directory = Path(self.get_ext_fullpath(extension.name)).parent
            build_native.carry_out(planned, directory, for_this_machine=bool(self.inplace))


class RecordAbsence(build_py):
    """Lets the installed package say why it has no library."""

    def run(self) -> None:
        """Copies the package, then writes the reason into the copy."""
        super().run()
        directory = Path(PACKAGE) if self.editable_mode else Path(self.build_lib) / PACKAGE
        build_native.record_absence(directory, str(planned))


class AnyPython(bdist_wheel):
    """Tags the wheel by platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


if isinstance(planned, str):
    setup(cmdclass={"build_py": RecordAbsence})
else:
    library = Extension(f"{PACKAGE}._native", sources=[])
    setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
