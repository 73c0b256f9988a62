"""Build fastddpm._C with CMake (see CMakeLists.txt). All other settings of the package are in pyproject.toml.

The build does not need torch. If the native build fails, the package is installed as pure Python, and
fastddpm/_build_info.json records the reason. With FASTDDPM_REQUIRE_NATIVE=1, or a FASTDDPM_CUDA_ARCHS that requires CUDA
kernels, the failure is an error instead. CMakeLists.txt checks the value of FASTDDPM_CUDA_ARCHS.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = os.environ.get("FASTDDPM_CUDA_ARCHS", "")


class CMakeBuild(build_ext):
    """A build_ext that runs CMake for the extension and records the outcome next to it, in _build_info.json."""

    def run(self):
        (ext,) = self.extensions
        if self.inplace:
            module = ROOT / "fastddpm" / Path(self.get_ext_filename(ext.name)).name
        else:
            module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        reason = None
        try:
            staged = module.with_name(module.name + ".new")
            shutil.copy2(self.build_native(module.name), staged)
            os.replace(staged, module)  # atomic, because a running process may have mapped the old module
        except Exception as error:
            if os.environ.get("FASTDDPM_REQUIRE_NATIVE") == "1" or CUDA_ARCHS not in ("", "auto", "off"):
                raise
            module.unlink(missing_ok=True)  # do not keep the module of an earlier build
            reason = str(error)
            # Use Python's warnings instead of setuptools', because pip shows them.
            warnings.warn(f"fastddpm installs without its compiled module: {reason}", stacklevel=1)
        info = {"native": reason is None, "reason": reason}
        (module.parent / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build_native(self, name: str) -> Path:
        import pybind11  # imported here, so that a missing pybind11 only skips the native build

        build = Path(self.build_temp).resolve() / "cmake"
        output = build / "output"
        # --fresh: the tools of an isolated build are in a folder that no longer exists in the next build.
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [
            f"-DFASTDDPM_VERSION={self.distribution.get_version()}",
            f"-DFASTDDPM_OUTPUT_DIR={output}",
            f"-DFASTDDPM_CUDA_ARCHS={CUDA_ARCHS}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        self.call("configuring", configure)
        self.call("compiling", ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        return output / name

    def call(self, what: str, command: list[str]):
        start, lines = time.monotonic(), []
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line.strip())
        except OSError as error:
            raise CompileError(f"{what} the native code needs {command[0]}: {error}") from error
        print(f"{what} the native code took {time.monotonic() - start:.0f} s", flush=True)
        if process.returncode:
            lines = [line for line in lines if line and not line.startswith("--")]
            # The first error names the cause. Later ones are its consequences.
            first = next((i for i, line in enumerate(lines) if re.search(r"CMake Error|error:", line)), -4)
            cause = re.sub(r"^CMake Error at .*?\): ", "", " ".join(lines[first:][:5]))
            raise CompileError(f"{what} the native code failed: {cause}")

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self):
        return {}  # an editable build writes directly into the source tree


setup(ext_modules=[Extension("fastddpm._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
