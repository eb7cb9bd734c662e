"""decode_attention against fp64 sums over a sequence's tokens, gathered one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, decode_attention
from fastrlhf_kernels._decode_attention_kernel import SPLIT
from fastrlhf_kernels.decode_attention import (
    CPU_SPLIT,
    _decode_attention_native,
    decode_attention_ref,
)

OP = "decode_attention"
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k_cache", "v_cache", "block_tables", "seq_lens")


def case(
    backend: Backend,
    lengths: list[int],
    HQ: int = 4,
    HKV: int = 2,
    D: int = 16,
    page_size: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    spare: int = 2,
    fill: float = NAN,
    seed: int = 0,
) -> list[Tensor]:
    """q, k_cache, v_cache, block_tables, seq_lens: pages in any order, `fill` where none is read.

    The tables' unused entries name no page, or one of another sequence, or one of nobody.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=generator)
    P = max(needed, default=0) + spare
    tables = torch.randint(-pages, 2 * pages, (len(lengths), P), generator=generator).int()
    caches = torch.full((2, pages, page_size, HKV, D), fill)
    taken = 0
    for b, n in enumerate(lengths):
        mine = order[taken : taken + needed[b]]
        taken += needed[b]
        tables[b, : needed[b]] = mine
        tokens = torch.randn(2, needed[b] * page_size, HKV, D, generator=generator)
        tokens[:, n:] = fill
        caches[:, mine] = tokens.view(2, needed[b], page_size, HKV, D)
    q = torch.randn(len(lengths), HQ, D, generator=generator)
    k_cache, v_cache = caches.to(dtype)
    args = (q.to(dtype), k_cache, v_cache, tables, torch.tensor(lengths, dtype=torch.int32))
    return [x.to(backend.device).clone() for x in args]


def oracle(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition; and what rounding is measured against: a sum's terms by their sizes.

    A score's rounding, of the size of its own terms, moves a weight by as much.
    """
    B, HQ, D = q.shape
    page_size, HKV = k_cache.shape[1:3]
    q, k_cache, v_cache = (x.double().cpu() for x in (q, k_cache, v_cache))
    tables, lengths = block_tables.tolist(), seq_lens.tolist()
    factor = 1.0 / math.sqrt(D) if scale is None else scale
    out, sizes = torch.zeros(B, HQ, D).double(), torch.zeros(B, HQ, D).double()
    for b in range(B):
        tokens = range(max(0, lengths[b] - (window or lengths[b])), lengths[b])
        places = [(tables[b][t // page_size], t % page_size) for t in tokens]
        for h in range(HQ if places else 0):
            k = torch.stack([k_cache[page, i, h * HKV // HQ] for page, i in places])
            v = torch.stack([v_cache[page, i, h * HKV // HQ] for page, i in places])
            s = factor * (k * q[b, h]).sum(-1)
            if softcap is not None:
                s = softcap * (s / softcap).tanh()
            every = s if sinks is None else torch.cat([s, sinks[h : h + 1].double().cpu()])
            p = (s - every.logsumexp(0)).exp()
            out[b, h] = (p[:, None] * v).sum(0)
            spread = 1.0 + abs(factor) * (k * q[b, h]).abs().sum(-1)
            sizes[b, h] = ((p * spread)[:, None] * v.abs()).sum(0)
    return out, sizes


def check(backend: Backend, args: list[Tensor], **settings) -> Tensor:
    actual = decode_attention(*args, **settings, backend=backend.name)
    reference = decode_attention_ref(*args, **settings)
    expected, sizes = oracle(*args, **settings)
    assert actual.is_contiguous()
    assert not actual.requires_grad
    wide = args[0].dtype == torch.float32
    assert_accurate(
        actual, reference, expected, interpreted=backend.interpreted, terms=sizes if wide else 0.0
    )
    return actual


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 17, 63, 64, 65, 130, 257, 300]), max_size=3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1), (7, 7), (20, 1)]),
    D=st.sampled_from([1, 2, 7, 16, 40, 64, 80, 128]),
    page_size=st.sampled_from([1, 5, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.5, -0.1]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    window=st.sampled_from([None, 1, 40, 128, 1000]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, lengths, heads, D, page_size, dtype, scale, softcap, window, has_sinks, seed
) -> None:
    HQ, HKV = heads
    if backend.interpreted:
        lengths = lengths[:2]
    args = case(backend, lengths, HQ, HKV, D, page_size, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sinks = 2.0 * torch.randn(HQ, generator=generator) if has_sinks else None
    settings = {
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "sinks": None if sinks is None else sinks.to(backend.device, dtype),
    }
    check(backend, args, **settings)


@pytest.mark.parametrize("D", [1, 3, 24, 96, 192, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(backend: Backend, D: int, dtype: torch.dtype) -> None:
    check(backend, case(backend, [70, 3], 3, 1, D, 16, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65])
def test_group_sizes(backend: Backend, group: int) -> None:
    for dtype in (torch.float32, torch.float16):
        check(backend, case(backend, [75], group, 1, 20, 16, dtype=dtype))


@pytest.mark.parametrize("length", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * CPU_SPLIT + 1, 2500])
def test_about_the_splits(backend: Backend, length: int) -> None:
    args = case(backend, [length], 2, 1, 8, 32)
    check(backend, args)
    for window in (SPLIT - 1, SPLIT, SPLIT + 1, max(length - SPLIT, 1), length):
        check(backend, args, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_attended_to_reaches_nothing(
    backend: Backend, bad: float, dtype: torch.dtype
) -> None:
    """Pages of nobody, slots past the end, tokens before the window."""
    lengths = [33, 0, 150]
    for window in (None, 20):
        clean, spoilt = (case(backend, lengths, dtype=dtype, fill=fill) for fill in (0.0, bad))
        if window is not None:
            page_size = spoilt[1].shape[1]
            for b, n in enumerate(lengths):
                for t in range(n - window):
                    page = int(spoilt[3][b, t // page_size])
                    spoilt[1][page, t % page_size] = bad
                    spoilt[2][page, t % page_size] = bad
                spoilt[3][b, : max(n - window, 0) // page_size] = -1  # given back to the pool
        found = decode_attention(*spoilt, window=window, backend=backend.name)
        assert_same_bits(found, decode_attention(*clean, window=window, backend=backend.name))
        assert not bool(found[1].any())


def test_a_nan_that_is_attended_to_stays_in_its_heads(backend: Backend) -> None:
    args = case(backend, [40, 200, 5], 4, 2)
    clean = decode_attention(*args, backend=backend.name)
    args[1][args[3][1, 9], 3, 1, 0] = NAN  # a key of head 1: query heads 2 and 3
    args[0][2, 0, 1] = NAN
    found = decode_attention(*args, backend=backend.name)
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1, 2:] = bad[2, 0] = True
    assert bool(found[bad].isnan().all())
    assert_same_bits(found[~bad], clean[~bad])


def test_nothing_and_next_to_nothing(backend: Backend) -> None:
    sinks = torch.randn(4, device=backend.device)
    for settings in ({}, {"sinks": sinks}, {"window": 3}):
        check(backend, case(backend, [], spare=0), **settings)
        check(backend, case(backend, [0, 0], spare=0), **settings)
        check(backend, case(backend, [0, 0], spare=3), **settings)
        check(backend, case(backend, [1], spare=0, page_size=1), **settings)
    args = case(backend, [0, 0])
    args[1], args[2] = args[1][:0], args[2][:0]
    assert not bool(decode_attention(*args, backend=backend.name).any())
    args = case(backend, [1, 300])
    args[1].nan_to_num_()
    found = decode_attention(*args, scale=0.0, backend=backend.name)
    expected, _ = oracle(*args, scale=0.0)  # the mean; one token gives its own value
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert_same_bits(found[0, 0], args[2][args[3][0, 0], 0, 0])


def test_sinks(backend: Backend) -> None:
    """-inf is no sink; a large one takes all; the logits' dtype does not matter."""
    args = case(backend, [40, 150])
    none = decode_attention(*args, backend=backend.name)
    sinks = torch.full((4,), -INF, device=backend.device)
    assert_same_bits(decode_attention(*args, sinks=sinks, backend=backend.name), none)
    nan = decode_attention(*args, sinks=torch.full_like(sinks, NAN), backend=backend.name)
    assert bool(nan.isnan().all())
    sinks = torch.tensor([1e4, 1.0, -1e4, 3.0], device=backend.device)
    found = check(backend, args, sinks=sinks)
    assert not bool(found[:, 0].any())
    spread = torch.stack([sinks, sinks], 1).bfloat16()[:, 0]
    again = decode_attention(*args, sinks=spread, backend=backend.name)
    assert_same_bits(again, decode_attention(*args, sinks=spread.float(), backend=backend.name))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of Triton's interpreter
def test_impossible_tokens(backend: Backend) -> None:
    """Scores of -inf: tokens of weight 0, whole splits of them too; nothing but them is NaN."""
    args = case(backend, [300, 300], 2, 2, 8)
    q, k_cache, _, tables, _ = args
    q[:] = q.abs() + 0.1
    for b, head, tokens in ((0, 0, range(200)), (0, 1, range(130, 300)), (1, 0, range(300))):
        for t in tokens:
            k_cache[tables[b, t // 16], t % 16, head, 3] = -INF
    for sinks in (None, torch.zeros(2, device=backend.device)):
        found = decode_attention(*args, sinks=sinks, backend=backend.name)
        expected, _ = oracle(*args, sinks=sinks)
        torch.testing.assert_close(
            found.cpu().double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
        )
        assert bool(found[1, 0].isnan().all()) == (sinks is None)


def test_large_scores_keep_their_digits(backend: Backend) -> None:
    """Scores of thousands, of either sign, in every split: exp alone would overflow."""
    args = case(backend, [400], 2, 2, 8)
    for scale in (300.0, -300.0):
        check(backend, args, scale=scale)


def test_offsets_past_two_to_31(backend: Backend) -> None:
    """4 GiB of addresses; on a CPU only the pages that hold a token are ever touched."""
    lengths, page_size = [7, 3], 3
    args = case(backend, lengths, page_size=page_size, dtype=torch.bfloat16)
    expected = decode_attention(*args, backend=backend.name)
    pages, _, HKV, D = args[1].shape
    size = 2**31 + page_size * HKV * D
    storage = torch.empty(size, dtype=torch.bfloat16, device=backend.device)
    far = 2**31 // (pages - 1)
    for i in (1, 2):
        changed = list(args)
        wide = storage.as_strided(args[i].shape, (far, HKV * D, D, 1))
        changed[i] = wide.copy_(args[i])
        assert_same_bits(decode_attention(*changed, backend=backend.name), expected)
    two = storage.as_strided((2, page_size, HKV, D), (2**31, HKV * D, D, 1))
    tables, short = torch.tensor([[1], [0]]), torch.tensor([3, 2])
    where = [x.to(backend.device) for x in (tables, short)]
    two.copy_(args[1][args[3][0, :2].long()])
    near = two.clone()
    assert_same_bits(
        decode_attention(args[0], two, two, *where, backend=backend.name),
        decode_attention(args[0], near, near, *where, backend=backend.name),
    )


def test_strides(backend: Backend) -> None:
    """A slice of a fused product, caches by head, keys and values in one, and odd tables."""
    for dtype in (torch.float32, torch.float16):
        args = case(backend, [33, 150], 6, 2, 16, dtype=dtype)
        q, k_cache, v_cache, tables, lengths = args
        expected = decode_attention(*args, backend=backend.name)
        queries = [
            torch.cat([q.flatten(1), q.flatten(1)], 1)[:, : q[0].numel()].view(q.shape),
            q.transpose(0, 1).contiguous().transpose(0, 1),
            torch.stack([q, q], -1)[..., 0],
        ]
        caches = [
            [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)],
            list(torch.stack([k_cache, v_cache], 1).unbind(1)),
            [torch.nn.functional.pad(x, (0, 5))[..., :16] for x in (k_cache, v_cache)],
            [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) for x in (k_cache, v_cache)],
        ]
        integers = [
            (torch.cat([tables, tables], 1)[:, : tables.shape[1]], lengths.long()),
            (tables.T.contiguous().T, torch.stack([lengths, lengths], 1)[:, 0]),
            (tables.long(), lengths),
        ]
        odd = [[x, *args[1:]] for x in queries]
        odd += [[q, *pair, *args[3:]] for pair in caches]
        odd += [[*args[:3], *pair] for pair in integers]
        for changed in odd:
            assert_same_bits(decode_attention(*changed, backend=backend.name), expected)


@pytest.mark.not_on("ref", "torch's products promise no such thing")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_depend_on_the_batch(backend: Backend, dtype: torch.dtype) -> None:
    """Alone, in another order, with wider tables, in other pages, again: the same bits."""
    some = [600, 0, 1, 129, 256, 1000, 64]
    lengths = some[:4] if backend.interpreted else [*some, *range(5, 780, 30)]
    args = case(backend, lengths, 6, 2, 40, dtype=dtype)
    q, k_cache, v_cache, tables, seq_lens = args
    for settings in ({}, {"window": 200, "softcap": 5.0}):
        together = decode_attention(*args, **settings, backend=backend.name)
        assert_same_bits(decode_attention(*args, **settings, backend=backend.name), together)
        for b in range(len(lengths)):
            row = slice(b, b + 1)
            needed = -(-lengths[b] // 16)
            alone = decode_attention(
                q[row], k_cache, v_cache, tables[row, :needed], seq_lens[row],
                **settings, backend=backend.name,
            )  # fmt: skip
            assert_same_bits(alone, together[row])
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
        order = order.to(backend.device)
        moved = torch.randperm(len(k_cache), generator=torch.Generator().manual_seed(2))
        moved = moved.to(backend.device)
        wider = torch.nn.functional.pad(tables, (0, 9), value=-1)[order].long()
        there = (wider >= 0) & (wider < len(moved))
        elsewhere = torch.where(there, moved[wider.clamp(0, len(moved) - 1)], wider)
        shuffled = [torch.empty_like(x).index_copy_(0, moved, x) for x in (k_cache, v_cache)]
        found = decode_attention(
            q[order], *shuffled, elsewhere, seq_lens[order], **settings, backend=backend.name
        )
        assert_same_bits(found, together[order])


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_thread_count_changes_no_bit(dtype: torch.dtype) -> None:
    """With few heads for many threads, splits are shared out, which changes no bit either."""
    args = case(Backend("cpu", "cpu"), [3000, 10, 700], 8, 2, 64, dtype=dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append(decode_attention(*args, window=2500, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_fp64_stays_fp64() -> None:
    for name in sorted({"ref", "cpu"} & set(available_backends())):
        args = case(Backend(name, "cpu"), [3, 0, 700], 6, 2, 19, dtype=torch.float64)
        sinks = torch.linspace(-1.0, 2.0, 6).double()
        for settings in ({}, {"softcap": 2.0, "sinks": sinks}, {"window": 300}):
            found = decode_attention(*args, **settings, backend=name)
            expected, _ = oracle(*args, **settings)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_the_way_without_checks() -> None:
    args = case(Backend("cpu", "cpu"), [33, 150])
    expected = decode_attention(*args, backend="cpu")
    out = torch.empty_like(args[0])
    found = _decode_attention_native(*args, 0.25, 0.0, 0, None, out=out)
    assert found is out
    assert_same_bits(found, expected)
    args[3][0, 0] = -1
    with pytest.raises(ValueError, match="block_tables must be in"):
        _decode_attention_native(*args, 0.25, 0.0, 0, None)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_pages_and_lengths_out_of_range(backend: Backend, bad: int) -> None:
    """Refused for CPU tensors; on a GPU not read, and no harm to other sequences."""
    expected = decode_attention(*case(backend, [33, 150]), backend=backend.name)
    for name in ("block_tables", "seq_lens"):
        args = case(backend, [33, 150])
        if name == "block_tables":
            args[3][0, 1] = bad
        else:
            args[4][0] = bad
        if backend.device == "cpu":
            with pytest.raises(ValueError, match=f"decode_attention: {name} must be in"):
                decode_attention(*args, backend=backend.name)
        else:
            found = decode_attention(*args, backend=backend.name)
            assert_same_bits(found[1], expected[1])


def test_arguments_keep_their_values(backend: Backend) -> None:
    args = case(backend, [33, 150])
    before = [x.clone() for x in args]
    decode_attention(*args, backend=backend.name)
    for x, y in zip(args, before, strict=True):
        assert_same_bits(x, y)


def test_opcheck_and_compile(backend: Backend) -> None:
    args = case(backend, [33, 150], fill=0.0)
    sinks = torch.zeros(4, device=backend.device)
    if backend.name != "ref":
        for more in ((0.25, 0.0, 0, None), (0.25, 3.0, 20, sinks)):
            torch.library.opcheck(
                torch.ops.fastrlhf.decode_attention.default, (*args, *more, backend.name)
            )

    def step(q: Tensor, *rest: Tensor) -> Tensor:
        return decode_attention(2.0 * q, *rest, window=40, backend=backend.name) + 1.0

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*args), step(*args))


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "sinks"])
def test_gradients_are_refused(backend: Backend, name: str) -> None:
    arguments = dict(zip(NAMES, case(backend, [33, 150]), strict=True))
    arguments["sinks"] = torch.zeros(4, device=backend.device)
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        decode_attention(**arguments, backend=backend.name)
    with torch.no_grad():
        assert not decode_attention(**arguments, backend=backend.name).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype: torch.dtype) -> None:
    """Captured once, it follows lengths and tables that change afterwards."""
    backend = Backend("triton", "cuda")
    args = case(backend, [900, 0, 33], 8, 2, 64, dtype=dtype)
    other = case(backend, [5, 700, 900], 8, 2, 64, dtype=dtype, seed=1)
    pages = max(len(args[1]), len(other[1]))
    for one in (args, other):
        for i in (1, 2):
            padded = one[i].new_zeros((pages, *one[i].shape[1:]))
            padded[: len(one[i])] = one[i]
            one[i] = padded
    decode_attention(*args, backend="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(*args, backend="triton")
    for one in (args, other):
        expected = decode_attention(*one, backend="triton")
        for x, y in zip(args, [y.clone() for y in one], strict=True):
            x.copy_(y)
        graph.replay()
        assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, r"q must have shape \(B, Hq, D\), got \(2, 8\)"),
        ({"q": torch.zeros(2, 4, 7)}, r"q and k_cache must have the same D in \[1, 256\], got 7"),
        ({"q": torch.zeros(2, 3, 8)}, "q must have a multiple of k_cache's 2 heads, got 3"),
        ({"q": torch.zeros(2, 4, 8).half()}, "k_cache must be torch.float16 like q"),
        ({"v_cache": torch.zeros(3, 5, 2, 8).half()}, "v_cache must be torch.float32 like k_cache"),
        ({"v_cache": torch.zeros(3, 5, 2, 7)}, r"v_cache must have shape \(3, 5, 2, 8\)"),
        ({"block_tables": torch.zeros(2, 4)}, "block_tables must be int64 or int32"),
        ({"block_tables": torch.zeros(3, 4).int()}, r"block_tables must have shape \(2, 4\)"),
        ({"block_tables": torch.full((2, 4), 3)}, r"block_tables must be in \[0, pages"),
        ({"seq_lens": torch.zeros(3).int()}, r"seq_lens must have shape \(2,\), got \(3,\)"),
        ({"seq_lens": torch.tensor([21, 1])}, r"seq_lens must be in \[0, P \* page_size"),
        ({"seq_lens": torch.tensor([-1, 1])}, r"seq_lens must be in \[0, P \* page_size"),
        ({"scale": NAN}, "scale must be in"),
        ({"softcap": 0.0}, "softcap must be in"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2.0}, "window must be an integer, got 2.0"),
        ({"sinks": torch.zeros(2)}, r"sinks must have shape \(4,\), got \(2,\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(3, 5, 2, 8),
        "v_cache": torch.zeros(3, 5, 2, 8),
        "block_tables": torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0]]),
        "seq_lens": torch.tensor([7, 20]),
    } | change
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)
