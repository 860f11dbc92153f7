"""The modules for pooling that keeps the where."""

from __future__ import annotations

import pytest
import torch

from ladderfast.nn import SoftPool2d, SoftUnpool2d, WhereMaxPool2d, WhereMaxUnpool2d
from ladderfast.ops import soft_pool2d, soft_unpool2d


def test_soft_modules_are_the_ops():
    z = torch.randn(2, 3, 8, 9)
    pool, unpool = SoftPool2d((4, 3), beta=2), SoftUnpool2d((4, 3))
    what, where = pool(z)
    torch.testing.assert_close((what, where), soft_pool2d(z, (4, 3), 2.0))
    torch.testing.assert_close(unpool(what, where), soft_unpool2d(what, where, (4, 3)))
    assert repr(pool) == "SoftPool2d((4, 3), beta=2)"
    assert repr(SoftUnpool2d(3)) == "SoftUnpool2d(3)"
    assert SoftPool2d(2).beta == 100


def test_hard_modules_move_maxima():
    """By hand: of equal maxima the first one, row by row."""
    z = torch.tensor([[1.0, 2, 5, 0], [3, 0, 5, 5]]).view(1, 1, 2, 4)
    what, where = WhereMaxPool2d(2)(z)
    assert what.flatten().tolist() == [3, 5]
    assert where.flatten().tolist() == [4, 2]
    out = WhereMaxUnpool2d(2)(what, where)
    assert out.flatten().tolist() == [0, 0, 5, 0, 3, 0, 0, 0]
    small = WhereMaxPool2d(2, positions=False)
    what, where = small(z)
    assert where.dtype == torch.uint8
    assert where.flatten().tolist() == [2, 0]
    assert torch.equal(WhereMaxUnpool2d(2)(what, where), out)
    assert repr(small) == "WhereMaxPool2d(2, positions=False)"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [2, 3, (1, 4), 16])
def test_ties_of_hard_pooling_go_to_the_first(kernel_size, memory_format):
    z = torch.randint(0, 2, (2, 20, 32, 48)).float().contiguous(memory_format=memory_format)
    _, where = WhereMaxPool2d(kernel_size)(z)
    rows, columns = WhereMaxPool2d(kernel_size).kernel_size
    h, w = 32 // rows, 48 // columns
    windows = (
        z[:, :, : h * rows, : w * columns].reshape(2, 20, h, rows, w, columns).transpose(3, 4).flatten(4)
    )
    first = (windows == windows.amax(-1, keepdim=True)).int().argmax(-1)
    row = torch.arange(h).view(h, 1) * rows + first // columns
    assert torch.equal(where, row * 48 + torch.arange(w) * columns + first % columns)


def test_sizes_that_do_not_divide():
    """output_size restores the rows and columns that pooling left out, as zeros; gradients pass."""
    z = torch.rand(2, 3, 11, 14, requires_grad=True)
    what, where = SoftPool2d((4, 3))(z)
    out = SoftUnpool2d((4, 3))(what, where, output_size=(11, 14))
    assert out.shape == z.shape
    torch.testing.assert_close(out[:, :, :8, :12], soft_unpool2d(what, where, (4, 3)))
    assert not out[:, :, 8:].any()
    assert not out[:, :, :, 12:].any()
    out.square().sum().backward()
    assert z.grad[:, :, :8, :12].any()
    for positions in (True, False):
        hard_what, hard_where = WhereMaxPool2d((4, 3), positions=positions)(z)
        hard = WhereMaxUnpool2d((4, 3))(hard_what, hard_where, output_size=(11, 14))
        assert hard.shape == z.shape
        assert torch.equal(hard[hard != 0], z[hard != 0])
        assert (hard != 0).sum() == hard_what.numel()


def test_errors():
    with pytest.raises(ValueError, match=r"SoftPool2d: kernel_size must be from 1 to 16; got 17"):
        SoftPool2d(17)
    with pytest.raises(
        TypeError, match=r"WhereMaxPool2d: kernel_size must be an int or a pair of ints; got 2.5"
    ):
        WhereMaxPool2d(2.5)
    with pytest.raises(ValueError, match=r"SoftPool2d: beta must be from 0"):
        SoftPool2d(2, beta=-1)
    what, where = SoftPool2d(2)(torch.randn(1, 1, 4, 4))
    for size in ((3, 4), (6, 4), (4, 6)):
        with pytest.raises(
            ValueError, match=r"SoftUnpool2d: output_size must be .* \(2, 2\) windows of \(2, 2\)"
        ):
            SoftUnpool2d(2)(what, where, output_size=size)
