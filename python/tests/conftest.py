"""The suite takes ``--device cuda`` where there is a GPU, and ``--device emulated`` where the package
was built with the feature ``emulator``: then tensors lie on the CPU and GPU kernels run there."""

import os

# Hubs are asked for nothing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu, cuda, cuda:N or emulated")


@pytest.fixture(scope="session")
def device(request):
    """Where tensors lie."""
    torch = pytest.importorskip("torch")
    name = request.config.getoption("--device")
    if name == "emulated":
        from sata import _native, _torch

        if not _native.HAS_EMULATOR:
            pytest.exit("the package was built without the feature emulator", 2)
        _torch._emulate = True
        return torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit("torch has no GPU here", 2)
    return torch.device(name)


@pytest.fixture(scope="session")
def on_cpu(request):
    """Whether the CPU engine is what answers."""
    return request.config.getoption("--device") == "cpu"


@pytest.fixture(scope="session")
def state_device(request):
    """Where states lie."""
    return request.config.getoption("--device")
