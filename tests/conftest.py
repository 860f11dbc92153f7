"""Shared by all tests: Triton's interpreter where there is no GPU, backends to run on, poisoned memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many processes as cores: a thread each, in what they start as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import ladderfast
from ladderfast.ops import backend


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend on a device, and the dtypes it is tested in."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    def require(self) -> None:
        """Skip where this machine or build lacks the backend."""
        reason = backend.unavailable(self.backend, self.device, self.dtypes[0])
        if reason is not None:
            pytest.skip(f"{self.backend}: {reason}")


_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = [
    Target("reference", "cpu", (torch.float32, torch.float64)),
    Target("cpu", "cpu", (torch.float32, torch.float64)),
    Target("triton", "cpu", (torch.float32,)),
    Target("reference", "cuda", _GPU_DTYPES),
    Target("triton", "cuda", _GPU_DTYPES),
    Target("cuda", "cuda", (*_GPU_DTYPES, torch.float64)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        more = getattr(metafunc.module, "MORE_ON_CPU", ())  # dtypes that this op's CPU kernels take as well
        metafunc.parametrize(
            "target",
            [
                pytest.param(
                    dataclasses.replace(t, dtypes=(*t.dtypes, *more)) if t.backend == "cpu" else t,
                    id=f"{t.backend}-{t.device}",
                    marks=[pytest.mark.gpu] if t.device == "cuda" else [],
                )
                for t in TARGETS
            ],
            indirect=True,
        )


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend in turn, forced for the length of the test."""
    request.param.require()
    with ladderfast.use_backend(request.param.backend):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is filled with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
