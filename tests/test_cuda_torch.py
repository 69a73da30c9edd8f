# SPDX-License-Identifier: Apache-2.0
"""torch's view of calls on a GPU, without one: fake tensors of CUDA devices, as compilers and exports use them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402 - torch may be missing

import tvmdcn  # noqa: E402
from tvmdcn.arrays import arrays_of  # noqa: E402
from tvmdcn.cuda_arrays import TorchCudaArrays  # noqa: E402
from tvmdcn.errors import SpecTypeError  # noqa: E402


@pytest.fixture
def fake():
    """Return what makes a fake tensor on a device, and the mode."""
    mode = FakeTensorMode()

    def make(*shape, device="cuda:1", memory_format=torch.contiguous_format):
        meta = torch.empty(*shape, device="meta", dtype=torch.half).contiguous(memory_format=memory_format)
        return FakeTensor(mode, meta, torch.device(device))

    with mode:
        yield make


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shape_memory_and_device_follow_the_input(fake, memory_format):
    input = fake(2, 8, 9, 10, memory_format=memory_format)
    output = tvmdcn.deform_conv2d(input, fake(2, 18, 9, 10), fake(4, 8, 3, 3), padding=1)
    assert output.device == torch.device("cuda:1")
    assert output.shape == (2, 4, 9, 10)
    assert output.is_contiguous(memory_format=memory_format)
    others = fake(2, 18, 9, 10), fake(4, 8, 3, 3)
    found = torch.ops.tvmdcn.deform_conv2d_backward(output, input, *others, padding=(1, 1, 1, 1))
    assert [gradient.shape for gradient in found] == [input.shape, *(tensor.shape for tensor in others), (4,), (0,)]
    assert all(gradient.device == torch.device("cuda:1") for gradient in found)
    assert found[0].is_contiguous(memory_format=memory_format)
    with pytest.raises(SpecTypeError, match="grad_output is on device cuda:0, and input on cuda:1"):
        torch.ops.tvmdcn.deform_conv2d_backward(fake(2, 4, 9, 10, device="cuda:0"), input, *others, padding=(1,) * 4)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_tensors_of_several_devices_are_refused(fake, device):
    with pytest.raises(SpecTypeError, match=f"weight is on device {device}, and input on cuda:1: bring it there"):
        tvmdcn.deform_conv2d(fake(2, 8, 9, 10), fake(2, 18, 9, 10), fake(4, 8, 3, 3, device=device), padding=1)


def test_kind_of_arrays(fake):
    arrays = arrays_of(fake(1, 2))
    assert isinstance(arrays, TorchCudaArrays)
    assert arrays.place(fake(1, 2)) == 1
    assert arrays.gpu(fake(1, 2)) == (1, False)
    assert not isinstance(arrays_of(fake(1, 2, device="cpu")), TorchCudaArrays)
    # A fake tensor is no plain one: torch has to see the call.
    assert not arrays.is_plain_call(fake(1, 2))
    assert arrays.key(fake(1, 2)) != arrays.key(fake(1, 2, device="cuda:0"))
    with pytest.raises(SpecTypeError, match="mask is on device cpu, and input is on a GPU"):
        arrays.check("mask", fake(1, 2, device="cpu"))
    with pytest.raises(SpecTypeError, match=r"mask is on device cuda:1, and others are on the CPU. Pass mask.cpu\(\)"):
        arrays_of(torch.empty(1, device="meta")).check("mask", fake(1, 2))


def test_determinism_is_what_torchs_operators_are_asked_for():
    arrays = TorchCudaArrays(torch)
    assert not arrays.wants_determinism()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert arrays.wants_determinism()
    finally:
        torch.use_deterministic_algorithms(False)


def test_tf32_is_what_torchs_convolutions_are_allowed(fake, monkeypatch):
    arrays = TorchCudaArrays(torch)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert arrays.allows_tf32() is allowed
        assert arrays.gpu(fake(1, 2).float()) == (1, allowed)
