"""What CMakeLists.txt and setup.py make of FASTDDPM_CUDA_ARCHS. Scripts stand in for nvcc and nvidia-smi."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Configured:
    """CMake's answers, in one folder, where it looks for the C++ compiler once."""

    def __init__(self, folder):
        self.folder = folder
        self.nvcc = self.program("nvcc", "printf 'compute_%s\\n' 75 80 90 100 110 103")

    def program(self, name, script):
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def __call__(self, archs, nvcc=True):
        pybind11 = pytest.importorskip("pybind11")
        settings = {
            "FASTDDPM_CUDA_ARCHS": archs,
            "CMAKE_CUDA_COMPILER": self.nvcc if nvcc else "",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        command = ["cmake", "-G", "Unix Makefiles", "-S", ROOT, "-B", self.folder / "build"]
        command += [f"-D{name}={value}" for name, value in settings.items()]
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        return " ".join((done.stdout + done.stderr).split())  # CMake breaks a long message into lines

    def module_knows(self, text):
        return any(text in path.read_text() for path in self.folder.glob("build/CMakeFiles/_C.dir/build.make"))


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    if shutil.which("cmake") is None or shutil.which("make") is None:
        pytest.skip("no cmake, or no make")
    return Configured(tmp_path_factory.mktemp("cmake"))


@pytest.mark.parametrize(("asked", "wrong"), [
    ("35", "35"), ("80;35", "35"), ("999", "999"),
])  # fmt: skip
def test_an_unknown_architecture_is_refused(configured, asked, wrong):
    said = configured(asked)
    assert f'FASTDDPM_CUDA_ARCHS is "{asked}", but this nvcc does not compile for "{wrong}". Expected is native' in said
    assert "of: 75, 80, 90, 100, 110, 103." in said
    assert "Compiling" not in said


@pytest.mark.parametrize("nvcc", [True, False])
@pytest.mark.parametrize("asked", ["OFF", "banana", "sm90", "9.0", "90a", ",", "80;90,", "80 native"])
def test_a_malformed_value_is_refused(configured, asked, nvcc):
    said = configured(asked, nvcc)
    assert f'FASTDDPM_CUDA_ARCHS is "{asked}". Expected is native, off, auto, or a list such as 80;90.' in said
    assert "Compiling" not in said


@pytest.mark.parametrize(("asked", "gpus"), [
    ("", "75 80 90 100"), ("90", "90"), ("80;90", "80 90"), ("80 90", "80 90"),
    ("90, 80", "80 90"), ("80,,90", "80 90"), ("110;103;110", "103 110"),
])  # fmt: skip
def test_what_is_compiled(configured, asked, gpus):
    assert re.search(rf"Compiling for CPUs \(generic[^)]*\) and GPUs \({gpus}\): \d+ to \d+ seconds", configured(asked))


def test_native_is_the_gpus_that_are_here(configured):
    configured.program("nvidia-smi", "printf '9.0\\n8.0\\n9.0\\n'")
    assert "and GPUs (80 90)" in configured("native")
    configured.program("nvidia-smi", "echo 7.0")
    assert 'is "native", but this nvcc does not compile for "70".' in configured("native")
    configured.program("nvidia-smi", "echo No devices were found; exit 6")
    said = configured("native")
    assert 'is "native", but nvidia-smi finds no GPU (6 No devices were found): name an architecture' in said


def test_auto_is_the_gpus_that_are_here_and_never_an_error(configured):
    configured.program("nvidia-smi", "echo 8.0")
    assert "and GPUs (80)" in configured("auto")
    configured.program("nvidia-smi", "echo 13.0")  # newer than nvcc: PTX serves it
    assert "and GPUs (75 80 90 100)" in configured("auto")
    configured.program("nvidia-smi", "exit 6")
    assert "and GPUs (90)" in configured("auto")
    assert "and GPUs (none)" in configured("auto", nvcc=False)
    assert configured.module_knows("no working CUDA compiler was found when fastddpm was built")


def test_a_build_without_cuda_kernels_knows_why(configured):
    assert "and GPUs (none)" in configured("off")
    assert configured.module_knows("built with FASTDDPM_CUDA_ARCHS=off (install again without it)")
    assert "and GPUs (none)" in configured("", nvcc=False)
    assert configured.module_knows("no working CUDA compiler was found when fastddpm was built")
    assert 'is "90", but no working CUDA compiler was found: put nvcc on the PATH' in configured("90", nvcc=False)


@pytest.mark.parametrize("archs", [None, "auto", "off", "90"])
def test_a_build_that_fails(tmp_path, archs):
    """Pure Python serves without CUDA kernels: who asks for some gets them or an error. There is no cmake on the PATH here."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTDDPM_CUDA_ARCHS", "FASTDDPM_REQUIRE_NATIVE")}
    environment |= {"PATH": str(tmp_path)} | ({} if archs is None else {"FASTDDPM_CUDA_ARCHS": archs})
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if archs != "90":
        assert done.returncode == 0, done.stderr
        assert "UserWarning: fastddpm installs without its compiled module: configuring" in done.stderr
        reason = json.loads((tmp_path / "lib" / "fastddpm" / "_build_info.json").read_text())["reason"]
        assert reason.startswith("configuring the native code needs cmake")
    else:
        assert done.returncode == 1
        assert "error: configuring the native code needs cmake" in done.stderr
