import cuda_shim
import pytest


@pytest.fixture(scope="module")
def lib(request: pytest.FixtureRequest) -> cuda_shim.Library:
    """The CUDA kernels that a test file names as KERNELS, compiled for the host."""
    return cuda_shim.load(request.module.KERNELS)
