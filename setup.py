# SPDX-License-Identifier: MIT
"""Builds lmtfast._C with CMake, installs kernels/ as lmtfast.kernels. Metadata: pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str, directory_attribute: str) -> str | None:
    """The tool of the Python package of that name, else the one on PATH."""
    try:
        module = importlib.import_module(name)
        packaged = shutil.which(name, path=getattr(module, directory_attribute))
    except (ImportError, AttributeError):
        packaged = None
    return packaged or shutil.which(name)


class CMakeBuild(build_ext):
    """One CMake build; CMAKE_ARGS in the environment is appended to the configure line."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise RuntimeError(
                "expected cmake >= 3.22; got none; at PATH.\n  Do this: pip install cmake"
            )
        ninja = find_tool("ninja", "BIN_DIR")
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        # A configured tree remembers its tools; those of an isolated build are gone the next time.
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DLMTFAST_PYTHON=ON",
            "-DBUILD_TESTING=OFF",
        ]
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "--parallel"], check=True)
        subprocess.run(
            [cmake, "--install", str(build), "--component", "python", "--prefix", str(destination)],
            check=True,
        )


setup(
    packages=[*find_packages(include=["lmtfast", "lmtfast.*"]), "lmtfast.kernels"],
    package_dir={"lmtfast.kernels": "kernels"},
    ext_modules=[Extension("lmtfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
