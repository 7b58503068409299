"""Drives the one native build graph, CMakeLists.txt, from setuptools.

Nothing here looks at the hardware, downloads anything or chooses dependencies: torch is asked only
where its headers live, and every switch is an environment variable.

    PYDISTILL_NO_NATIVE=1       build the pure-Python package
    PYDISTILL_BUILD_TESTING=1   also build pydistill/_testing and the C++ tests (development only)
    PYDISTILL_BUILD_CUDA=1      also build pydistill/_cuda with nvcc
    MAX_JOBS=N                  at most N compilers at once
"""

import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def enabled(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def tool(name: str) -> str:
    """A build tool of this interpreter's environment, else of the PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SystemExit(f"pydistill needs {name} to build: pip install {name}")
    return path


def package_dir(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pydistill needs {name} to build its native code: pip install {name}")
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Configures and builds with Ninja, straight into the package directory."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"pydistill found no C++ compiler ({compiler!r}): install g++ or clang++, or set "
                "PYDISTILL_NO_NATIVE=1 to install without native code."
            )
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SystemExit(
                "pydistill found no Python.h: install Python's headers (python3-dev), or set "
                "PYDISTILL_NO_NATIVE=1 to install without native code."
            )
        # Development builds keep their tree, so that Ninja compiles only what changed; a wheel may
        # be built by another environment's CMake and torch, and starts from nothing.
        in_place = bool(self.inplace or self.editable_mode)
        build = ROOT / "build" / "native" if in_place else Path(self.build_temp).resolve()
        output = ROOT / "pydistill" if in_place else Path(self.build_lib).resolve() / "pydistill"
        testing = enabled("PYDISTILL_BUILD_TESTING") and in_place
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "PYDISTILL_OUTPUT_DIR": output,
            "PYDISTILL_BUILD_TESTING": int(testing),
            "PYDISTILL_BUILD_CUDA": int(enabled("PYDISTILL_BUILD_CUDA")),
            "TORCH_DIR": package_dir("torch"),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYTHON_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        if testing:
            definitions["PYBIND11_INCLUDE_DIR"] = package_dir("pybind11") / "include"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        if not in_place:
            configure.append("--fresh")
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        for command in (configure, [tool("cmake"), "--build", str(build), "--parallel", jobs]):
            if subprocess.call(command) != 0:
                raise SystemExit("pydistill's native build failed; the compiler's words are above.")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "pydistill").glob("_*.abi3.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = not enabled("PYDISTILL_NO_NATIVE")
setup(
    ext_modules=[Extension("pydistill._C", [], py_limited_api=True)] if native else [],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
