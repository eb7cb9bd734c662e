"""Builds csrc/ and nothing else; run by pip. All metadata is in pyproject.toml.

Makes two extension modules beside the kernels, torch-free, with ninja:

- `fastrlhf_kernels._cpu`: every csrc/*.cpp that declares an op is compiled once per instruction
  set, and once more for the table that dispatch reads;
- `fastrlhf_kernels._cuda`, where nvcc is found: every csrc/*.cu.

Without a C++ compiler or nvcc the install succeeds without that part. What was built, and why the
rest was not, is printed and written to `fastrlhf_kernels/_build_info.json`, for `fastrlhf doctor`.
C++ that a working compiler refuses fails the install. Environment:

    FASTRLHF_SKIP_NATIVE=1       build neither part
    FASTRLHF_CUDA_ARCHS          default "80-real;90a-real;90-virtual", as CMake writes them
    FASTRLHF_SANITIZE=address    the C++ part alone, for `make asan`: AddressSanitizer and UBSan
    CXX, CUDA_HOME               the compiler, and the toolkit that holds bin/nvcc
    MAX_JOBS                     compiles side by side; default: ninja's own choice
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
PACKAGE = "fastrlhf_kernels"

# Compiled once, for the baseline; every other csrc/*.cpp is an op.
HOST_SOURCES = ("bindings", "dispatch", "pool")
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}
# Not -ffast-math: infinities and NaN are part of what the ops promise.
CXX_FLAGS = (
    "-std=c++17 -O3 -fno-math-errno -ffp-contract=fast -fPIC -fvisibility=hidden "
    "-Wall -Wextra -Wno-psabi"
)
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -DFASTRLHF_ISA=cuda"
CUDA_ARCHS = "80-real;90a-real;90-virtual"
SANITIZE = os.environ.get("FASTRLHF_SANITIZE", "")
SANITIZE_FLAGS = "-fsanitize=address,undefined -fno-omit-frame-pointer -g -O1"


class Missing(Exception):
    """A part cannot be built on this machine; the message says why, in a sentence."""


def find_cxx() -> str:
    """The C++ compiler's command, tried on a small program with Python's header.

    Raises:
        Missing: there is none, or it does not work.
    """
    if os.name != "posix":
        raise Missing(f"the C++ part needs a POSIX system, this is {platform.system()}")
    asked = os.environ.get("CXX", "")
    found = [asked] if asked else [c for c in ("c++", "g++", "clang++") if shutil.which(c)]
    if not found:
        raise Missing("no C++ compiler found (looked for c++, g++, clang++)")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cpp")
        source.write_text("#include <Python.h>\nstatic_assert(__cplusplus >= 201703L);\n")
        command = [*shlex.split(found[0]), "-std=c++17", f"-I{sysconfig.get_path('include')}"]
        try:
            probe = subprocess.run(
                [*command, "-c", str(source), "-o", str(Path(scratch, "probe.o"))],
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise Missing(f"the C++ compiler {found[0]!r} does not start: {error}") from error
    if probe.returncode != 0:
        header = "Python.h" in probe.stderr
        wanted = "Python.h (the Python development files)" if header else "C++17"
        raise Missing(f"the C++ compiler {found[0]!r} does not compile {wanted}")
    return found[0]


def find_nvcc() -> str:
    """The path of nvcc.

    Raises:
        Missing: there is none.
    """
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    for home in filter(None, homes):
        if (path := Path(home, "bin", "nvcc")).exists():
            return str(path)
    if path_found := shutil.which("nvcc"):
        return path_found
    if (path := Path("/usr/local/cuda/bin/nvcc")).exists():
        return str(path)
    raise Missing("nvcc not found (looked in CUDA_HOME, PATH and /usr/local/cuda)")


def find_ninja() -> str:
    """The path of ninja: the Python package's, else one on PATH.

    Raises:
        Missing: there is none.
    """
    try:
        import ninja
    except ImportError:
        pass
    else:
        return str(Path(ninja.BIN_DIR, "ninja"))
    if path := shutil.which("ninja"):
        return path
    raise Missing("ninja not found (it is a build requirement: pip install ninja)")


def gencode(archs: str) -> str:
    """nvcc's flags for architectures in CMake's notation: 80 (both), 90a-real, 90-virtual."""
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        name, _, kind = arch.strip().partition("-")
        if not name or kind not in ("", "real", "virtual"):
            raise SystemExit(f"FASTRLHF_CUDA_ARCHS: {arch!r} is not 80, 90a-real or 90-virtual")
        if kind in ("", "real"):
            flags.append(f"-gencode arch=compute_{name},code=sm_{name}")
        if kind in ("", "virtual"):
            flags.append(f"-gencode arch=compute_{name},code=compute_{name}")
    return " ".join(flags)


def ninja_path(path: Path | str) -> str:
    """A path as ninja's build lines want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build.ninja under construction."""

    def __init__(self, rules: dict[str, str]) -> None:
        self.lines = []
        for name, command in rules.items():
            self.lines += [f"rule {name}", f"  command = {command}"]
            if name in ("cxx", "cu"):
                self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, out: Path, rule: str, inputs: list[Path], flags: str = "") -> Path:
        """Adds one step and returns its output."""
        self.lines.append(
            f"build {ninja_path(out)}: {rule} {' '.join(ninja_path(i) for i in inputs)}"
        )
        if flags:
            self.lines.append("  flags = " + flags.replace("$", "$$"))
        return out

    def run(self, folder: Path) -> None:
        """Writes the file and runs it; a failed step raises CalledProcessError."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [find_ninja(), "-C", str(folder)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


def python_flags() -> str:
    """Include flags for Python and pybind11."""
    import pybind11

    folders = (sysconfig.get_path("include"), pybind11.get_include())
    return " ".join("-isystem " + shlex.quote(folder) for folder in folders)


def ops(suffix: str) -> list[Path]:
    """The op files of csrc/."""
    return [f for f in sorted(CSRC.glob(f"*{suffix}")) if f.stem not in HOST_SOURCES]


def link_flags() -> str:
    """What makes a Python extension of a shared object."""
    return "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


def build_cpu(output: Path) -> dict[str, object]:
    """Compiles and links `_cpu`; returns what the record says of it."""
    cxx = find_cxx()
    sanitize = SANITIZE_FLAGS if SANITIZE else ""
    kind = "cpu-sanitized" if SANITIZE else "cpu"
    folder = BUILD / f"{kind}-{sysconfig.get_config_var('SOABI')}"
    check = f"{shlex.quote(sys.executable)} {shlex.quote(str(CSRC / 'check_symbols.py'))}"
    ninja = Ninja(
        {
            "cxx": f"{cxx} {CXX_FLAGS} {sanitize} $flags -MMD -MF $out.d -c $in -o $out",
            "check": f"{check} $out $in",
            "link": f"{cxx} {link_flags()} {sanitize} $in -o $out -pthread",
        }
    )
    objects = []
    for name in HOST_SOURCES:
        flags = python_flags() if name == "bindings" else ""
        objects.append(ninja.build(folder / f"{name}.o", "cxx", [CSRC / f"{name}.cpp"], flags))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = list(ISA_FLAGS) if x86 else ["baseline"]
    per_isa = []
    for source in ops(".cpp"):
        objects.append(ninja.build(folder / f"{source.stem}.o", "cxx", [source]))
        for isa in isas:
            flags = f"-DFASTRLHF_ISA={isa} {ISA_FLAGS[isa]}"
            per_isa.append(ninja.build(folder / f"{source.stem}.{isa}.o", "cxx", [source], flags))
    ninja.build(folder / "symbols.checked", "check", per_isa)
    library = ninja.build(folder / output.name, "link", objects + per_isa)
    ninja.run(folder)
    install(library, output)
    version = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
    compiler = version.stdout.splitlines()[0] if version.stdout else cxx
    return {"compiler": compiler, "isas": isas, **({"sanitize": SANITIZE} if SANITIZE else {})}


def build_cuda(output: Path) -> dict[str, object]:
    """Compiles and links `_cuda`; returns what the record says of it."""
    if SANITIZE:
        raise Missing(f"FASTRLHF_SANITIZE={SANITIZE} was set, which is for the C++ part")
    nvcc, cxx = find_nvcc(), find_cxx()
    archs = os.environ.get("FASTRLHF_CUDA_ARCHS") or CUDA_ARCHS
    folder = BUILD / f"cuda-{sysconfig.get_config_var('SOABI')}"
    host = f"-ccbin {shlex.quote(shlex.split(cxx)[0])}"
    ninja = Ninja(
        {
            "cxx": f"{cxx} {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
            "cu": f"{shlex.quote(nvcc)} {NVCC_FLAGS} {host} $flags -MMD -MF $out.d -c $in -o $out",
            "link": f"{shlex.quote(nvcc)} {host} -shared -cudart static $in -o $out",
        }
    )
    flags = f"-DFASTRLHF_CUDA {python_flags()}"
    objects = [ninja.build(folder / "bindings.o", "cxx", [CSRC / "bindings.cpp"], flags)]
    for source in ops(".cu"):
        objects.append(ninja.build(folder / f"{source.stem}.o", "cu", [source], gencode(archs)))
    library = ninja.build(folder / output.name, "link", objects)
    try:
        ninja.run(folder)
    except subprocess.CalledProcessError as error:
        raise Missing(
            f"{nvcc} failed for {archs} (exit status {error.returncode}; its messages are above)"
        ) from error
    install(library, output)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = [line for line in version.stdout.splitlines() if "release" in line]
    return {"compiler": release[0].strip() if release else nvcc, "archs": archs}


def install(library: Path, output: Path) -> None:
    """Puts a library in place by a rename: a process that has the old one open keeps it whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(output.name + ".new")
    shutil.copyfile(library, fresh)
    os.replace(fresh, output)


class BuildNative(build_ext):
    """build_ext by ninja: both parts, each with its record."""

    def run(self) -> None:
        """Builds what this machine can build and writes down what it cannot."""
        # An editable install copies from the build folder to the tree by itself, record excepted.
        here = self.inplace or getattr(self, "editable_mode", False)
        if SANITIZE not in ("", "address"):
            raise SystemExit(f"FASTRLHF_SANITIZE must be address, got {SANITIZE!r}")
        if SANITIZE and here:
            raise SystemExit("FASTRLHF_SANITIZE: not in place of the normal build; see `make asan`")
        record: dict[str, dict[str, object]] = {}
        for part, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            output = Path(self.get_ext_fullpath(f"{PACKAGE}._{part}")).resolve()
            try:
                if os.environ.get("FASTRLHF_SKIP_NATIVE", "0") == "1":
                    raise Missing("FASTRLHF_SKIP_NATIVE=1 was set")
                record[part] = {"built": True, **build(output)}
            except Missing as reason:
                output.unlink(missing_ok=True)
                record[part] = {"built": False, "reason": str(reason)}
        package = ROOT / "kernels" / PACKAGE if here else Path(self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
        for part, entry in record.items():
            name = {"cpu": "the C++ part (_cpu)", "cuda": "the CUDA part (_cuda)"}[part]
            said = "built" if entry["built"] else f"NOT built: {entry['reason']}"
            print(f"fastrlhf: {name}: {said}", file=sys.stderr)


setup(
    ext_modules=[
        Extension(f"{PACKAGE}._cpu", sources=[], optional=True),
        Extension(f"{PACKAGE}._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
)
