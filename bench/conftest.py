"""Facts about the machine in every result, and two threads."""

from __future__ import annotations

import platform

import pytest
import torch
from measuring import GPU
from torch._functorch import config as functorch_config

THREADS = 2


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["node"] = "-"
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = THREADS
    machine_info["platform"] = platform.platform()
    if GPU:
        machine_info["gpu"] = torch.cuda.get_device_name(0)
        machine_info["cuda"] = torch.version.cuda


@pytest.fixture(autouse=True)
def _two_threads():
    """So many on the CPU, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _graph_to_go_over_again(request):
    """Backward alone is timed on one graph: there, and only there, torch.compile may not put results where the graph's
    memory was, as it does by itself."""
    again = hasattr(request.node, "callspec") and request.node.callspec.params.get("phase") == "backward"
    with functorch_config.patch(donated_buffer=functorch_config.donated_buffer and not again):
        yield
