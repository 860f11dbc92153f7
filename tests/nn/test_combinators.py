"""The combinators as modules: formulas unit by unit, start values, shapes, and the maker by name."""

import copy
import math

import pytest
import torch

from ladderfast.nn import COMBINATORS, GaussianCombinator, make_combinator

NAMES = [name for name in COMBINATORS if name != "none"]


def s(x):
    return 1 / (1 + math.exp(-x))


def n(x, b1, w1, w2, w3, b2):
    return w2 * s(b1 + w1 * x) + w3 * x + b2


# One unit, one sample, the rows of `weight` as arguments: the formulas as the papers print them.
FORMULAS = {
    "gaussian": lambda z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10: (
        (z - (a1 * s(a2 * u + a3) + a4 * u + a5)) * (a6 * s(a7 * u + a8) + a9 * u + a10)
        + (a1 * s(a2 * u + a3) + a4 * u + a5)
    ),
    "gaussian_squashed": lambda z, u, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10: (
        (z - (a1 * s(a2 * u + a3) + a4 * u + a5)) * s(a6 * s(a7 * u + a8) + a9 * u + a10)
        + (a1 * s(a2 * u + a3) + a4 * u + a5)
    ),
    "sigmoid": lambda z, u, a1, a2, a3, a4, b1, c1, c2, c3, c4: (
        a1 + a2 * z + a3 * u + a4 * z * u + b1 * s(c1 + c2 * z + c3 * u + c4 * z * u)
    ),
    "sigmoid_no_product": lambda z, u, a1, a2, a3, b1, c1, c2, c3: (
        a1 + a2 * z + a3 * u + b1 * s(c1 + c2 * z + c3 * u)
    ),
    "bilinear": lambda z, u, a1, a2, a3, a4: a1 + a2 * z + a3 * u + a4 * z * u,
    "additive": lambda z, u, b1, *rest: n(z, b1, *rest[:4]) + n(u, b1, *rest[4:]),
}

# What each gives before any training.
AT_START = {
    "gaussian": lambda z, u: torch.zeros_like(z),
    "gaussian_squashed": lambda z, u: z / 2,
    "sigmoid": lambda z, u: z + torch.sigmoid(z),
    "sigmoid_no_product": lambda z, u: z + torch.sigmoid(z),
    "bilinear": lambda z, u: z,
    "additive": lambda z, u: torch.sigmoid(z) + torch.sigmoid(u),
}


def randomised(name, num_features, **kwargs):
    module = make_combinator(name, num_features, **kwargs)
    with torch.no_grad():
        module.weight.normal_()
    return module


@pytest.mark.parametrize("squash_v", [False, True])
def test_published_start_values_of_the_gaussian(squash_v):
    """a2 = a7 = 1, the others 0: at the start the output shows nothing of a2 and a7, but gradients of a1 and a6 do."""
    module = GaussianCombinator(3, squash_v=squash_v)
    expected = torch.zeros(10, 3)
    expected[1] = expected[6] = 1
    assert torch.equal(module.weight.detach(), expected)
    torch.nn.init.normal_(module.weight)
    module.reset_parameters()
    assert torch.equal(module.weight.detach(), expected)


def test_every_name_has_its_formula_here():
    assert set(FORMULAS) == set(AT_START) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 2, 2), (1, 1), (0, 3)])
def test_formula_unit_by_unit(name, shape):
    torch.manual_seed(0)
    module = randomised(name, shape[1], dtype=torch.float64)
    z, u = torch.randn(2, *shape, dtype=torch.float64)
    out = module(z, u)
    assert out.shape == z.shape
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        place = tuple(index)
        rows = module.weight[:, place[1]].tolist()
        assert out[place].item() == pytest.approx(FORMULAS[name](z[place].item(), u[place].item(), *rows))


@pytest.mark.parametrize("name", NAMES)
def test_start_values(name):
    torch.manual_seed(0)
    z, u = torch.randn(2, 7, 3)
    module = make_combinator(name, 3)
    torch.testing.assert_close(module(z, u), AT_START[name](z, u))
    with torch.no_grad():
        module.weight.normal_()
    module.reset_parameters()
    torch.testing.assert_close(module(z, u), AT_START[name](z, u))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    torch.manual_seed(0)
    module = randomised(name, 3, dtype=torch.float64)
    z, u = (torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(z, u, weight):
        return torch.func.functional_call(module, {"weight": weight}, (z, u))

    assert torch.autograd.gradcheck(call, (z, u, module.weight))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_and_strided_inputs(name):
    torch.manual_seed(0)
    module = randomised(name, 5)
    z, u = torch.randn(2, 3, 5, 4, 4)
    expected = module(z, u)
    torch.testing.assert_close(
        module(z.to(memory_format=torch.channels_last), u.transpose(2, 3).contiguous().transpose(2, 3)),
        expected,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gaussian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_once(name, dtype):
    torch.manual_seed(0)
    module = randomised(name, 5).to(dtype)
    z, u = torch.randn(2, 64, 5, dtype=dtype)
    exact = copy.deepcopy(module).double()(z.double(), u.double())
    out = module(z, u)
    assert out.dtype == dtype
    # Half a unit in the last place, and float32's own error where a sum cancels.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((out.double() - exact).abs() <= bound).all()


def test_none_makes_no_combinator():
    assert make_combinator("none", 4) is None


def test_gaussian_is_the_module_of_that_name():
    assert isinstance(make_combinator("gaussian", 4), GaussianCombinator)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"gaussian, gaussian_squashed, sigmoid, .*additive, none, got 'gausian'"
    ):
        make_combinator("gausian", 4)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gaussian")])
def test_wrong_shapes(name):
    module = make_combinator(name, 4)
    with pytest.raises(ValueError, match=r"z must have shape \(N, 4, \*\), got \(2, 3\)"):
        module(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"u must have the shape of z, \(2, 4\), got \(1, 4\)"):
        module(torch.zeros(2, 4), torch.zeros(1, 4))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_dtypes(name):
    module, x = make_combinator(name, 4), torch.ones(2, 4)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"z must be float32.*; got {dtype}"):
            module(x.to(dtype), x)
        with pytest.raises(TypeError, match=f"u must be float32.*; got {dtype}"):
            module(x, x.to(dtype))
    with pytest.raises(TypeError, match="u must be a tensor; got list"):
        module(x, x.tolist())


def test_squash_v_is_a_bool():
    with pytest.raises(TypeError, match="squash_v must be a bool; got str"):
        GaussianCombinator(4, squash_v="no")


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_and_repr(name):
    torch.manual_seed(0)
    module = randomised(name, 4)
    other = make_combinator(name, 4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert "4" in repr(module)


@pytest.mark.parametrize("name", ["gaussian", "additive"])
def test_a_number_of_features_that_is_none(name):
    with pytest.raises(TypeError, match="num_features must be a whole number, got '5'"):
        make_combinator(name, "5")
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_features must be at least 1, got {number}"):
            make_combinator(name, number)
