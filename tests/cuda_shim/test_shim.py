"""The shim itself: a warp's operations, barriers and shared memory do what CUDA's do, and every fault is found."""

from __future__ import annotations

import pytest
import torch

import cuda_shim

pytestmark = cuda_shim.needs_compiler


@pytest.fixture(scope="module")
def lib() -> cuda_shim.Library:
    return cuda_shim.load(cuda_shim.HERE / "selftest.cu")


def test_warp_operations(lib: cuda_shim.Library) -> None:
    threads = 64
    values = torch.randint(0, 1000, (threads,), dtype=torch.int32)
    out = lib.empty((threads, 8), torch.int32)
    assert lib.call("run_warp_operations", lib.copy(values), out, threads) == 0
    odd = int((values % 2).sum())
    for thread in range(threads):
        lane, warp = thread % 32, values[thread // 32 * 32 :][:32].tolist()
        ballot = sum(1 << i for i, v in enumerate(warp) if v % 3 == 0)
        expected = [
            warp[5],
            warp[lane // 8 * 8 + (lane + 1) % 8],
            warp[lane - 3] if lane % 16 >= 3 else warp[lane],
            warp[lane + 3] if lane % 16 < 13 else warp[lane],
            warp[lane ^ 9],
            ballot - (ballot >> 31 << 32),
            0 if lane % 2 else warp[4],
            odd,
        ]
        assert out[thread].tolist() == expected


def test_block_sums(lib: cuda_shim.Library) -> None:
    values = torch.randn(5, 256, dtype=torch.float64)
    given = lib.copy(values)
    for seed in (0, 1, 2):
        out = lib.empty((5,), torch.float64)
        with lib.order(seed):
            assert lib.call("run_block_sums", given, out, 0, 5, 256) == 0
        torch.testing.assert_close(out, values.sum(1))


@pytest.mark.parametrize("broken", [1, 2])
def test_a_missing_barrier_shows(lib: cuda_shim.Library, broken: int) -> None:
    values = lib.copy(torch.randn(5, 256, dtype=torch.float64))
    out = lib.empty((5,), torch.float64)
    assert lib.call("run_block_sums", values, out, broken, 5, 256) == 0
    assert out.isnan().all()


def test_dependence_on_the_order_of_blocks_shows(lib: cuda_shim.Library) -> None:
    seen = set()
    for seed in range(5):
        out = lib.empty((1,), torch.int32)
        with lib.order(seed):
            assert lib.call("run_last_block", out, 50) == 0
        seen.add(out.item())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"ended without reaching the barrier at selftest.cu:\d+"),
        (2, r"waits in the barrier at selftest.cu:\d+ while others wait at selftest.cu:\d+"),
        (3, r"selftest.cu:\d+ with mask 0xffffffff is not reached by every lane"),
        (4, r"thread \(3, 0, 0\) of block \(0, 0, 0\): invalid access: 12 bytes past the end of result"),
        (5, r"invalid access: 16384 bytes past the end of given"),
        (6, r"invalid access: byte 0 of given, which is only to be read"),
        (7, r"selftest.cu:\d+: access to .*float4.* not aligned"),
        (8, r"thread \(63, 0, 0\).*selftest.cu:\d+: array index 64 out of bounds"),
        (10, r"division"),
        (11, r"in no buffer of the test"),
        (12, r"run_faulty wrote beside result"),
    ],
)
def test_faults_are_found(lib: cuda_shim.Library, fault: int, message: str) -> None:
    # Off a multiple of 16 by a float, so that float4 is misaligned.
    result = lib.empty((64,), torch.float32, name="result", misalignment=4)
    given = lib.copy(torch.zeros(64), name="given")
    with pytest.raises(cuda_shim.LaunchError, match=message):
        lib.call("run_faulty", fault, result, given, 64)
    if fault not in (4, 12):
        assert lib.call("run_faulty", 0, result, given, 64) == 0  # the library goes on working


def test_unwritten_memory_is_nan(lib: cuda_shim.Library) -> None:
    result, given = lib.empty((64,), torch.float32), lib.copy(torch.zeros(64))
    assert result.isnan().all()
    result.zero_()
    assert lib.call("run_faulty", 9, result, given, 64) == 0
    assert result.isnan().all()


def test_impossible_launches(lib: cuda_shim.Library) -> None:
    for blocks, threads in ((0, 32), (1, 0), (1, 1025)):
        assert lib.call("run_nothing", blocks, threads) == 9  # cudaErrorInvalidConfiguration


def test_conversions(lib: cuda_shim.Library) -> None:
    """16-bit rounding against torch: every exponent, ties, subnormals, overflow, NaN."""
    bits = torch.cat(
        [torch.randint(-(2**31), 2**31, (50_000,)), torch.arange(0, 2**16) << 16, torch.arange(0, 2**12)]
    )
    ties = (torch.randint(0, 2**18, (20_000,)) << 13) + (0x33000000 + (1 << 12))
    values = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    values = torch.cat(
        [values, torch.tensor([65519.99, 65520.0, 65504.0, float("inf"), 2**-25, 2**-24, -0.0])]
    )
    n = values.numel()
    bfloat16, float16 = lib.empty((n,), torch.int32), lib.empty((n,), torch.int32)
    lib.call("convert", lib.copy(values), bfloat16, float16, n, restype=None)
    for packed, dtype in ((bfloat16, torch.bfloat16), (float16, torch.float16)):
        pairs = packed.view(torch.int16).view(n, 2).view(dtype)
        for column, expected in ((0, values.to(dtype)), (1, (-values).to(dtype))):
            finite = ~values.isnan()
            assert torch.equal(pairs[:, column][finite].view(torch.int16), expected[finite].view(torch.int16))
            assert pairs[:, column][~finite].isnan().all()
    widened = lib.empty((65536,), torch.float32)
    lib.call("widen", widened, restype=None)
    expected = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16).float()
    assert torch.equal(widened.isnan(), expected.isnan())
    assert torch.equal(widened[~widened.isnan()], expected[~expected.isnan()])


def test_approximations(lib: cuda_shim.Library) -> None:
    """As far off as documented, no further: two units in the last place for 2^x, one for 1/x; then the limits."""
    x = torch.cat(
        [torch.linspace(-126, 127, 30_001), torch.tensor([0.0, float("inf"), -float("inf"), 200.0, -200.0])]
    )
    power, reciprocal = lib.empty((x.numel(),), torch.float32), lib.empty((x.numel(),), torch.float32)
    lib.call("approximations", lib.copy(x), power, reciprocal, x.numel(), restype=None)
    assert power[-4:].tolist() == [float("inf"), 0.0, float("inf"), 0.0]
    assert reciprocal[-5:-2].tolist() == [float("inf"), 0.0, 0.0]
    for actual, exact, allowed in ((power, x.double().exp2(), 2), (reciprocal, 1 / x.double(), 1)):
        ulp = torch.exp2(torch.floor(torch.log2(exact[:-5].abs())) - 23)
        error = ((actual[:-5].double() - exact[:-5]) / ulp).abs()
        assert error.max() <= allowed
        assert error.max() > 0.9 * allowed
