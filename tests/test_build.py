"""The native core: instruction sets, vector functions, thread pool, bindings and the build."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf_kernels import _native, logprobs_from_logits
from fastrlhf_kernels.gae import gae_ref

ROOT = Path(__file__).resolve().parents[1]
ISAS: tuple[str, ...] = _native.cpu.isas() if _native.cpu is not None else ("not built",)

OPENMP = _native.cpu is not None and _native.cpu.borrows_threads()
needs_cpu = pytest.mark.skipif(
    _native.cpu is None, reason=f"the C++ part is not built: {_native.cpu_missing}"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("nm") is None, reason="no C++ compiler and nm here"
)


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The extension, on each instruction set in turn."""
    if _native.cpu is None:
        pytest.skip(f"the C++ part is not built: {_native.cpu_missing}")
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield _native.cpu
    _native.cpu.set_isa(before)


# ---- the vector functions


def apply(function: int, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.full_like(x, 7.0)
    _native.cpu.test_math(x.ctypes.data, y.ctypes.data, x.size, function)
    return y


def error_in_ulp(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units in the last place of the exact result, fp32's spacing."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / spacing))


CASES = [  # function, its number, fp64's own, ranges, the bound that vec.h documents
    ("exp2", 0, np.exp2, [(-149.0, 127.9), (-2.0, 2.0), (-149.0, -126.0)], 1.1),
    ("exp", 1, np.exp, [(-103.2, 88.7), (-1.0, 1.0), (-103.2, -87.0)], 1.1),
    ("log", 2, np.log, [(0.25, 4.0), (1e-38, 3e38), (0.999, 1.001), (1e-45, 1e-38)], 1.0),
]


@pytest.mark.parametrize(("name", "function", "exact", "ranges", "bound"), CASES)
def test_vector_functions_are_as_exact_as_documented(
    cpu: Any, name: str, function: int, exact: Any, ranges: list[Any], bound: float
) -> None:
    rng = np.random.default_rng(0)
    for low, high in ranges:
        x = rng.uniform(low, high, 200_003).astype(np.float32)
        if name == "log":  # as many in each binade
            x = np.exp(rng.uniform(np.log(low), np.log(high), 200_003)).astype(np.float32)
        error = error_in_ulp(apply(function, x), exact(x.astype(np.float64)))
        assert error <= bound, f"{name} on [{low}, {high}]: {error} ulp"


def test_vector_functions_at_special_values(cpu: Any) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([-inf, inf, nan, 0.0, -0.0, 3e38, -3e38], dtype=np.float32)
    np.testing.assert_array_equal(apply(0, x), [0, inf, nan, 1, 1, inf, 0])
    np.testing.assert_array_equal(apply(1, x), [0, inf, nan, 1, 1, inf, 0])
    np.testing.assert_array_equal(apply(0, [128.0, -149.0, -151.0, 10.0]), [inf, 2**-149, 0, 1024])
    np.testing.assert_array_equal(
        apply(2, [inf, nan, 0.0, -0.0, -1.0, -inf, 1.0]), [inf, nan, -inf, -inf, nan, nan, 0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversions_are_torchs(cpu: Any, dtype: torch.dtype) -> None:
    """Every half-precision number there and back, then floats that must be rounded."""
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = every.view(dtype).float() if dtype != torch.float32 else torch.randn(65536)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_001,), generator=generator, dtype=torch.int64)
    ties = exact[exact.isfinite()].float() * (1 + 2.0**-9 + 2.0**-12)
    for x in (exact, bits.to(torch.int32).view(torch.float32), ties):
        x = x.contiguous()
        h, y = torch.empty(x.numel(), dtype=dtype), torch.empty(x.numel())
        cpu.test_convert(x.data_ptr(), h.data_ptr(), y.data_ptr(), x.numel(), cpu.DTYPES[name])
        torch.testing.assert_close(h, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_reductions_at_every_tail_length(cpu: Any, dtype: torch.dtype) -> None:
    x = torch.randint(-8, 8, (70,), generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in range(3):  # unaligned too
        for n in range(1, 67):
            part, y = x[start : start + n], torch.empty(2, dtype=torch.float64)
            tag = cpu.DTYPES[str(dtype).removeprefix("torch.")]
            cpu.test_reduce(part.data_ptr(), y.data_ptr(), n, tag)
            assert y.tolist() == [part.double().sum().item(), part.double().max().item()]


# ---- an op on every instruction set


def run_gae(
    cpu: Any,
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    value_mask: torch.Tensor | None,
    mode: int,
    nthreads: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, time = rewards.shape
    outputs = torch.full((2, batch, time), 7.0, dtype=rewards.dtype)
    cpu.gae(
        rewards=rewards.data_ptr(),
        values=values.data_ptr(),
        mask=mask.data_ptr(),
        value_mask=_native.pointer(value_mask),
        adv=outputs[0].data_ptr(),
        ret=outputs[1].data_ptr(),
        B=batch,
        T=time,
        rewards_stride=rewards.stride(0),
        values_stride=values.stride(0),
        mask_stride=mask.stride(0),
        value_mask_stride=0 if value_mask is None else value_mask.stride(0),
        adv_stride=time,
        ret_stride=time,
        gamma=0.97,
        lam=0.9,
        mode=mode,
        dtype=cpu.DTYPES[str(rewards.dtype).removeprefix("torch.")],
        nthreads=nthreads,
    )
    return outputs[0], outputs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mode", "masked"), [(0, "skip"), (1, "decay"), (1, "value_mask")])
def test_gae_on_every_set(cpu: Any, dtype: torch.dtype, mode: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 9, 150, generator=generator, dtype=dtype)
    rewards, values = wide[0, :, 3:136], wide[1, :, 5:138]  # rows further apart than they are long
    mask = torch.rand(9, 133, generator=generator) < 0.7
    value_mask = mask | (torch.rand(9, 133, generator=generator) < 0.5)
    lives = value_mask if masked == "value_mask" else mask
    rewards[~mask], values[~lives] = torch.nan, torch.nan
    also = value_mask if masked == "value_mask" else None
    name = "skip" if mode == 0 else "decay"

    got = run_gae(cpu, rewards, values, mask, also, mode)
    settings_ = {"gamma": 0.97, "lam": 0.9, "masked": name, "value_mask": also}
    oracle = gae_ref(rewards.double(), values.double(), mask, **settings_)
    plain = gae_ref(rewards, values, mask, **settings_)
    for ours, theirs, exact in zip(got, plain, oracle, strict=True):
        allowed = 2 * (theirs - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
    assert (got[0][~mask] == 0).all()
    assert (got[1][~lives] == 0).all()
    alone = run_gae(
        cpu, rewards[4:5], values[4:5], mask[4:5], None if also is None else also[4:5], mode
    )
    assert torch.equal(alone[0][0], got[0][4])


def test_gae_varlen_equals_gae_of_each_sequence(cpu: Any) -> None:
    lengths = [0, 5, 1, 64, 0, 33]
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    rewards, values = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(3))
    outputs = torch.full((2, sum(lengths)), 7.0)
    cpu.gae_varlen(
        rewards.data_ptr(), values.data_ptr(), offsets.data_ptr(), outputs[0].data_ptr(),
        outputs[1].data_ptr(), len(lengths), 0.97, 0.9, cpu.DTYPES["float32"], 2,
    )  # fmt: skip
    for i, n in enumerate(lengths):
        part = slice(int(offsets[i]), int(offsets[i]) + n)
        if n:
            mask = torch.ones(1, n, dtype=torch.bool)
            adv, ret = run_gae(cpu, rewards[None, part], values[None, part], mask, None, 0)
            assert torch.equal(outputs[0, part], adv[0])
            assert torch.equal(outputs[1, part], ret[0])


# ---- the pool


def parallel_is_right(n: int, grain: int, nthreads: int) -> bool:
    y = torch.zeros(n, dtype=torch.int64)
    _native.cpu.test_parallel(y.data_ptr(), n, grain, nthreads)
    return torch.equal(y, torch.arange(1, n + 1))


@needs_cpu
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 700), st.integers(1, 9))
def test_pool_does_each_item_once(n: int, grain: int, nthreads: int) -> None:
    assert parallel_is_right(n, grain, nthreads)


@needs_cpu
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rewards, values = torch.randn(2, 300, 90, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(300, 90, dtype=torch.bool)
    one = run_gae(_native.cpu, rewards, values, mask, None, 0)
    for nthreads in (2, 3, 8):
        many = run_gae(_native.cpu, rewards, values, mask, None, 0, nthreads)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@needs_cpu
def test_pool_serves_several_python_threads() -> None:
    right: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: right.extend(parallel_is_right(997, 3, 4) for _ in range(20))
        )
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 100


@needs_cpu
@pytest.mark.parametrize("borrowed", [False, True])
def test_pool_survives_a_fork(borrowed: bool) -> None:
    """In a process of its own: forking beside pytest's and torch's threads proves less."""
    script = f"""
import os, torch
from fastrlhf_kernels import _native
_native.cpu.borrow_threads({borrowed})
own = 0 if {borrowed} and {OPENMP} else 3
torch.set_num_threads(4)
def right():
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # starts torch's own threads
    return threads_are_right()
def threads_are_right():
    y = torch.zeros(1000, dtype=torch.int64)
    _native.cpu.test_parallel(y.data_ptr(), 1000, 10, 4)
    return torch.equal(y, torch.arange(1, 1001))
assert right() and _native.cpu.pool_threads() == own, _native.cpu.pool_threads()
child = os.fork()
if child == 0:
    started_empty = _native.cpu.pool_threads() == 0
    grandchild = os.fork() if threads_are_right() else 0
    if grandchild == 0:
        os._exit(0 if threads_are_right() and _native.cpu.pool_threads() == 3 else 1)
    os._exit(0 if started_empty and os.waitpid(grandchild, 0)[1] == 0 else 1)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
assert right(), "the parent failed after the fork"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@needs_cpu
@pytest.mark.parametrize("borrowed", [False, True])
def test_threads_of_either_kind_give_the_same_bits(borrowed: bool) -> None:
    rewards, values = torch.randn(2, 300, 90, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(300, 90, dtype=torch.bool)
    alone = run_gae(_native.cpu, rewards, values, mask, None, 0)
    try:
        _native.cpu.borrow_threads(borrowed)
        assert parallel_is_right(997, 3, 4)
        many = run_gae(_native.cpu, rewards, values, mask, None, 0, 4)
    finally:
        _native.cpu.borrow_threads(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is another there")
def test_torchs_threads_are_found() -> None:
    assert OPENMP


# ---- the bindings and the choice of instruction set


@needs_cpu
def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(4)
    p = x.data_ptr()
    with pytest.raises(TypeError, match=r"test_math takes 4 arguments .*float\* y.*, got 3"):
        _native.cpu.test_math(p, p, 4)
    with pytest.raises(TypeError, match="test_math: argument function is missing"):
        _native.cpu.test_math(p, p, 4, functoin=0)
    with pytest.raises(TypeError, match=r"argument n must be a 64-bit int, got 4\.5"):
        _native.cpu.test_math(p, p, 4.5, 0)
    with pytest.raises(TypeError, match="argument x must be an address"):
        _native.cpu.test_math(x, p, 4, 0)
    with pytest.raises(ValueError, match="test_reduce: unsupported dtype tag"):
        _native.cpu.test_reduce(p, p, 4, 9)


@needs_cpu
def test_unknown_instruction_set_is_refused() -> None:
    before = _native.cpu.isa()
    with pytest.raises(ValueError, match="'mmx' is not available; this build has baseline"):
        _native.cpu.set_isa("mmx")
    assert _native.cpu.isa() == before


WHICH = "from fastrlhf_kernels import _native as n; print(n.cpu and n.cpu.isa())"


def import_kernels(isa: str, code: str = WHICH) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTRLHF_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_cpu
def test_ops_run_on_the_instruction_set_of_the_environment() -> None:
    """Sums over vectors of another width differ in their last bits."""
    code = (
        "import torch; from fastrlhf_kernels import _native as n, logprobs_from_logits as f; "
        "x = torch.randn(64, 1031, generator=torch.Generator().manual_seed(0)); "
        "print(n.cpu.isa(), f(x, torch.arange(64), backend='cpu').view(torch.int32).tolist())"
    )
    found = {}
    for isa in ISAS:
        done = import_kernels(isa, code)
        assert done.stdout.startswith(f"{isa} "), done.stderr
        found[isa] = done.stdout.removeprefix(f"{isa} ")
        before = _native.cpu.isa()
        _native.cpu.set_isa(isa)
        x = torch.randn(64, 1031, generator=torch.Generator().manual_seed(0))
        here = logprobs_from_logits(x, torch.arange(64), backend="cpu").view(torch.int32)
        _native.cpu.set_isa(before)
        assert found[isa].strip() == str(here.tolist())
    assert len(ISAS) == 1 or len(set(found.values())) > 1


@needs_cpu
def test_environment_selects_the_instruction_set() -> None:
    for isa in ISAS:
        good = import_kernels(isa)
        assert good.stdout.strip() == isa, good.stderr
    assert import_kernels("").stdout.strip() == ISAS[-1]  # the widest that the processor has
    bad = import_kernels("sse9")
    assert bad.returncode != 0
    last = bad.stderr.strip().splitlines()[-1]
    assert "FASTRLHF_CPU_ISA" in last
    assert "sse9" in last
    assert "baseline" in last


# ---- the build


def test_every_package_is_listed() -> None:
    """The list in pyproject.toml is by hand; a folder left out is missing from wheels alone."""
    listed = re.search(
        r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    roots = {"fastrlhf": ROOT / "fastrlhf", "fastrlhf_kernels": ROOT / "kernels/fastrlhf_kernels"}
    found = {
        ".".join((name, *init.parent.relative_to(root).parts))
        for name, root in roots.items()
        for init in root.rglob("__init__.py")
    }
    assert listed is not None
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == found


def copy_tree(folder: Path) -> Path:
    """What an install needs, without what it makes."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    made = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "kernels", "fastrlhf"):
        shutil.copytree(ROOT / name, folder / name, ignore=made)
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**keep, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nonexistent"}, "no C++ compiler found"),
        ({"CXX": "/nonexistent/c++"}, "the C++ compiler '/nonexistent/c++' does not start"),
        ({"CXX": "false"}, "the C++ compiler 'false' does not compile C++17"),
        ({"FASTRLHF_SKIP_NATIVE": "1"}, "FASTRLHF_SKIP_NATIVE=1 was set"),
    ],
)
def test_build_without_a_compiler_succeeds_and_says_so(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    done = build(copy_tree(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    assert f"the C++ part (_cpu): NOT built: {reason}" in done.stderr
    package = tmp_path / "kernels" / "fastrlhf_kernels"
    info = json.loads((package / "_build_info.json").read_text())
    assert not info["cpu"]["built"]
    assert not info["cuda"]["built"]
    assert reason in info["cpu"]["reason"]
    assert not list(package.glob("*.so"))


@needs_compiler
def test_a_compile_error_fails_the_build(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    for source in (tmp_path / "csrc").glob("*.c*"):
        source.unlink()
    for name in ("bindings", "dispatch", "pool"):
        (tmp_path / "csrc" / f"{name}.cpp").write_text('#error "deliberate"\n')
    done = build(tmp_path)
    assert done.returncode != 0
    assert "deliberate" in done.stdout + done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("code", "weak"),
    [
        ("static inline int f() { return 1; }\nint g() { return f(); }", False),
        ("template <class T> T f(T x) { return x; }\nint (*g)(int) = &f<int>;", True),
    ],
)
def test_weak_symbols_are_refused(tmp_path: Path, code: str, weak: bool) -> None:
    source, made, stamp = tmp_path / "x.cpp", tmp_path / "x.o", tmp_path / "stamp"
    source.write_text(code)
    subprocess.run(["c++", "-c", source, "-o", made], check=True)
    checker = [sys.executable, ROOT / "csrc" / "check_symbols.py", stamp, made]
    checked = subprocess.run(checker, capture_output=True, text=True)
    assert checked.returncode == int(weak)
    assert stamp.exists() != weak
    assert ("int f<int>(int)" in checked.stdout) == weak


@needs_compiler
@pytest.mark.slow
def test_wheel_carries_the_cpu_core(tmp_path: Path) -> None:
    tree, wheels, site = (tmp_path / name for name in ("tree", "wheels", "site"))
    tree.mkdir()
    copy_tree(tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", str(tree), *offline, "-w", str(wheels)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import fastrlhf_kernels, sys; from fastrlhf_kernels import _native; "
        "print(fastrlhf_kernels.__file__, ' '.join(_native.cpu.isas()))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = [{str(site)!r}, *{sys.path!r}]; {code}",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(site / "fastrlhf_kernels" / "__init__.py"), *ISAS]
