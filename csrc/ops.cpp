// Schemas, checks, allocation and dispatch of every op, on the stable ABI of torch. Arguments reach here through
// ladderfast.ops, which has checked them for people; what is checked again here protects the kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef LADDERFAST_WITH_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include "combinator.h"
#include "tagger.h"

#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which an op stays on one thread.
constexpr int64_t kGrain = 16384;

// Runs f over work items, `elements` being the size of the whole job.
template <class F>
void parallel_items(int64_t items, int64_t elements, const F& f) {
    if (items == 0) return;
    const int64_t per_item = elements / items + 1;
    torch::stable::parallel_for(0, items, (kGrain + per_item - 1) / per_item, f);
}

// Whether the axes `order` of t, slowest first, lie packed in memory.
template <class Order>
bool packed(const Tensor& t, const Order& order) {
    if (t.numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t k = t.dim() - 1; k >= 0; --k) {
        const int64_t axis = order(k);
        if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
        expected *= t.size(axis);
    }
    return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
    for (int64_t axis = 0; axis < a.dim(); ++axis)
        if (a.size(axis) != 1 && a.stride(axis) != b.stride(axis)) return false;
    return true;
}

// t itself if it lies in memory as `like` does, else a copy that does.
Tensor laid_out_like(const Tensor& t, const Tensor& like) {
    if (t.numel() == 0 || same_layout(t, like)) return t;
    Tensor copy = torch::stable::empty_like(like);
    torch::stable::copy_(copy, t);
    return copy;
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& z) {
    bool same = t.dim() == z.dim();
    for (int64_t axis = 0; same && axis < z.dim(); ++axis) same = t.size(axis) == z.size(axis);
    STD_TORCH_CHECK(same && t.scalar_type() == z.scalar_type() && t.device() == z.device(), op, ": ", name,
                    " must have the shape, dtype and device of z");
}

// z is (N, C, *) with params (10, C), or (S, N, C, *) with params (S, 10, C); contiguous or channels-last.
CombinatorShape combinator_shape(const char* op, const Tensor& z, const Tensor& u, const Tensor& params) {
    const int64_t axis = params.dim() - 1;  // of the channels
    STD_TORCH_CHECK(axis == 1 || axis == 2, op, ": params must be (10, C) or (S, 10, C)");
    STD_TORCH_CHECK(z.dim() > axis && params.size(axis - 1) == 10 && params.size(axis) == z.size(axis) &&
                        (axis == 1 || params.size(0) == z.size(0)),
                    op, ": the shapes of z and params do not fit");
    STD_TORCH_CHECK(params.device() == z.device(), op, ": params must be on the device of z");
    check_same_shape(op, "u", u, z);

    CombinatorShape shape{axis == 2 ? z.size(0) : 1, z.size(axis - 1), z.size(axis), 1};
    for (int64_t k = axis + 1; k < z.dim(); ++k) shape.inner *= z.size(k);
    if (packed(z, [](int64_t k) { return k; })) return shape;
    const int64_t last = z.dim() - 1;
    const bool channels_last = packed(z, [=](int64_t k) { return k < axis ? k : k == last ? axis : k + 1; });
    STD_TORCH_CHECK(channels_last, op, ": z must be contiguous or channels-last");
    shape.rows *= shape.inner;
    shape.inner = 1;
    return shape;
}

int64_t numel(const CombinatorShape& s) { return s.seeds * s.rows * s.channels * s.inner; }

template <class T>
void run_forward(const Tensor& z, const Tensor& u, const Tensor& params, Tensor& z_hat, bool squash_v,
                 const CombinatorShape& shape) {
    const T *zp = (const T*)z.data_ptr(), *up = (const T*)u.data_ptr(), *pp = (const T*)params.data_ptr();
    T* out = (T*)z_hat.data_ptr();
    parallel_items(ladderfast::cpu::combinator_forward_items(shape), numel(shape), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::combinator_forward<T>(zp, up, pp, out, squash_v, shape, begin, end);
    });
}

Tensor combinator_cpu(Tensor z, Tensor u, Tensor params, bool squash_v) {
    const CombinatorShape shape = combinator_shape("combinator", z, u, params);
    u = laid_out_like(u, z);
    params = torch::stable::contiguous(params);
    Tensor z_hat = torch::stable::empty_like(z);
    const ScalarType dtype = z.scalar_type();
    STD_TORCH_CHECK(params.scalar_type() == dtype, "combinator: params must have the dtype of z on the CPU");
    if (dtype == ScalarType::Float) {
        run_forward<float>(z, u, params, z_hat, squash_v, shape);
    } else if (dtype == ScalarType::Double) {
        run_forward<double>(z, u, params, z_hat, squash_v, shape);
    } else {
        STD_TORCH_CHECK(false, "combinator: the CPU kernel takes float32 and float64");
    }
    return z_hat;
}

template <class T>
void run_backward(const Tensor& grad, const Tensor& z, const Tensor& u, const Tensor& params, Tensor& grad_z,
                  Tensor& grad_u, Tensor& grad_params, Tensor& workspace, bool squash_v, const CombinatorShape& shape) {
    const T *gp = (const T*)grad.data_ptr(), *zp = (const T*)z.data_ptr(), *up = (const T*)u.data_ptr(),
            *pp = (const T*)params.data_ptr();
    T *gz = (T*)grad_z.data_ptr(), *gu = (T*)grad_u.data_ptr(), *ws = (T*)workspace.data_ptr();
    T* out = (T*)grad_params.data_ptr();
    parallel_items(ladderfast::cpu::combinator_backward_items(shape), numel(shape), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::combinator_backward<T>(gp, zp, up, pp, gz, gu, ws, squash_v, shape, begin, end);
    });
    parallel_items(ladderfast::cpu::combinator_reduce_items(shape), workspace.numel(), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::combinator_reduce<T>(ws, pp, out, shape, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor> combinator_backward_cpu(Tensor grad, Tensor z, Tensor u, Tensor params,
                                                           bool squash_v) {
    const CombinatorShape shape = combinator_shape("combinator_backward", z, u, params);
    check_same_shape("combinator_backward", "grad_z_hat", grad, z);
    grad = laid_out_like(grad, z);
    u = laid_out_like(u, z);
    params = torch::stable::contiguous(params);
    Tensor grad_z = torch::stable::empty_like(z), grad_u = torch::stable::empty_like(z);
    Tensor grad_params = torch::stable::empty_like(params);
    Tensor workspace = torch::stable::new_empty(z, {ladderfast::cpu::combinator_workspace(shape)});
    const ScalarType dtype = z.scalar_type();
    STD_TORCH_CHECK(params.scalar_type() == dtype, "combinator_backward: params must have the dtype of z on the CPU");
    if (dtype == ScalarType::Float) {
        run_backward<float>(grad, z, u, params, grad_z, grad_u, grad_params, workspace, squash_v, shape);
    } else if (dtype == ScalarType::Double) {
        run_backward<double>(grad, z, u, params, grad_z, grad_u, grad_params, workspace, squash_v, shape);
    } else {
        STD_TORCH_CHECK(false, "combinator_backward: the CPU kernel takes float32 and float64");
    }
    return {grad_z, grad_u, grad_params};
}

#ifdef LADDERFAST_WITH_CUDA

// The dtype codes of the contract headers.
int dtype_code(const char* op, ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return 0;
        case ScalarType::Double:
            return 1;
        case ScalarType::BFloat16:
            return 2;
        case ScalarType::Half:
            return 3;
        default:
            STD_TORCH_CHECK(false, op, ": the CUDA kernel takes float32, float64, bfloat16 and float16");
    }
    return -1;
}

void* current_stream(const Tensor& t) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return stream;
}

Tensor combinator_cuda(Tensor z, Tensor u, Tensor params, bool squash_v) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const CombinatorShape shape = combinator_shape("combinator", z, u, params);
    u = laid_out_like(u, z);
    params = torch::stable::contiguous(params);
    Tensor z_hat = torch::stable::empty_like(z);
    STD_CUDA_CHECK((cudaError_t)ladderfast_combinator_forward_cuda(
        z.data_ptr(), u.data_ptr(), params.data_ptr(), z_hat.data_ptr(), dtype_code("combinator", z.scalar_type()),
        dtype_code("combinator", params.scalar_type()), squash_v, &shape, current_stream(z)));
    return z_hat;
}

std::tuple<Tensor, Tensor, Tensor> combinator_backward_cuda(Tensor grad, Tensor z, Tensor u, Tensor params,
                                                            bool squash_v) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const CombinatorShape shape = combinator_shape("combinator_backward", z, u, params);
    check_same_shape("combinator_backward", "grad_z_hat", grad, z);
    grad = laid_out_like(grad, z);
    u = laid_out_like(u, z);
    params = torch::stable::contiguous(params);
    Tensor grad_z = torch::stable::empty_like(z), grad_u = torch::stable::empty_like(z);
    Tensor grad_params = torch::stable::empty_like(params);
    Tensor workspace = torch::stable::new_empty(z, {ladderfast_combinator_workspace_cuda(&shape)}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_combinator_backward_cuda(
        grad.data_ptr(), z.data_ptr(), u.data_ptr(), params.data_ptr(), grad_z.data_ptr(), grad_u.data_ptr(),
        grad_params.data_ptr(), workspace.data_ptr(), dtype_code("combinator_backward", z.scalar_type()),
        dtype_code("combinator_backward", params.scalar_type()), squash_v, &shape, current_stream(z)));
    return {grad_z, grad_u, grad_params};
}

#endif

// tagger

// t itself if neighbours along its last axis are neighbours in memory, else a copy of which that is true.
Tensor unit_stride(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

TaggerInput tagger_input(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.dim() == 3 ? t.stride(1) : 0}; }

// The tensors of a call, kept alive for the kernels, and where they lie.
struct TaggerCall {
    Tensor x, z, m, scalar;
    TaggerShape shape;
    TaggerInputs in;

    TaggerCall(const char* op, const Tensor& x_, const Tensor& z_, const Tensor& m_, const Tensor* scalar_)
        : x(unit_stride(x_)), z(unit_stride(z_)), m(unit_stride(m_)) {
        STD_TORCH_CHECK(z.dim() == 3 && z.size(1) > 0, op, ": z must be (N, K, D) with at least one group");
        check_same_shape(op, "m", m, z);
        STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == z.size(0) && x.size(1) == z.size(2) &&
                            x.scalar_type() == z.scalar_type() && x.device() == z.device(),
                        op, ": x must be (N, D), with the dtype and device of z");
        shape = {z.size(0), z.size(1), z.size(2), 1};
        in = {tagger_input(x), tagger_input(z), tagger_input(m), nullptr};
        if (scalar_ == nullptr) return;
        scalar = torch::stable::contiguous(*scalar_);
        shape.seeds = scalar.numel();
        STD_TORCH_CHECK(scalar.dim() <= 1 && (shape.seeds > 0 ? shape.rows % shape.seeds == 0 : shape.rows == 0), op,
                        ": the scalar must be () or (S,), with S a divisor of N");
        STD_TORCH_CHECK(scalar.device() == z.device(), op, ": the scalar must be on the device of z");
        in.scalar = scalar.data_ptr();
    }

    int64_t elements() const { return shape.rows * shape.groups * shape.pixels; }
    Tensor like_pixels() const { return torch::stable::new_empty(z, {shape.rows, shape.pixels}); }
    Tensor like_groups() const { return torch::stable::new_empty(z, {shape.rows, shape.groups, shape.pixels}); }

    // A gradient of the shape of z or, with two axes, of x.
    Tensor gradient(const char* op, const char* name, const Tensor& grad, int64_t axes) const {
        check_same_shape(op, name, grad, axes == 3 ? z : x);
        return unit_stride(grad);
    }
};

// Calls f with a value of the CPU kernels' element type.
template <class F>
void tagger_cpu_dispatch(const char* op, const TaggerCall& call, const F& f) {
    const ScalarType dtype = call.z.scalar_type();
    STD_TORCH_CHECK(call.in.scalar == nullptr || call.scalar.scalar_type() == dtype, op,
                    ": the scalar must have the dtype of z on the CPU");
    if (dtype == ScalarType::Float) {
        f(float{});
    } else if (dtype == ScalarType::Double) {
        f(double{});
    } else {
        STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32 and float64");
    }
}

std::tuple<Tensor, Tensor> tagger_inputs_cpu(const char* op, bool gaussian, const TaggerCall& call) {
    Tensor dz = call.like_groups(), likelihood = call.like_groups();
    tagger_cpu_dispatch(op, call, [&](auto type) {
        using T = decltype(type);
        T *dzp = (T*)dz.data_ptr(), *lp = (T*)likelihood.data_ptr();
        parallel_items(ladderfast::cpu::tagger_items(call.shape), call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_inputs<T>(gaussian, call.in, dzp, lp, call.shape, begin, end);
        });
    });
    return {dz, likelihood};
}

Tensor tagger_nll_cpu(const char* op, bool gaussian, const TaggerCall& call) {
    Tensor nll = call.like_pixels();
    tagger_cpu_dispatch(op, call, [&](auto type) {
        using T = decltype(type);
        T* out = (T*)nll.data_ptr();
        parallel_items(ladderfast::cpu::tagger_items(call.shape), call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_nll<T>(gaussian, call.in, out, call.shape, begin, end);
        });
    });
    return nll;
}

// Gradients of x, z, m and, where it is asked for, the scalar. grad_b is null for a mixture cost.
struct TaggerGradients {
    Tensor x, z, m, scalar;
};

TaggerGradients tagger_backward_cpu(const char* op, bool gaussian, const TaggerCall& call, const Tensor& grad_a,
                                    const Tensor* grad_b) {
    const Tensor a = call.gradient(op, "grad", grad_a, grad_b == nullptr ? 2 : 3);
    const Tensor b = grad_b == nullptr ? a : call.gradient(op, "grad_likelihood", *grad_b, 3);
    const TaggerInput ga = tagger_input(a), gb = tagger_input(b);
    TaggerGradients out{call.like_pixels(), call.like_groups(), call.like_groups(), Tensor()};
    const int64_t items = ladderfast::cpu::tagger_items(call.shape);
    std::vector<double> partials(gaussian ? items : 0);
    if (gaussian) out.scalar = torch::stable::empty_like(call.scalar);
    tagger_cpu_dispatch(op, call, [&](auto type) {
        using T = decltype(type);
        T *gx = (T*)out.x.data_ptr(), *gz = (T*)out.z.data_ptr(), *gm = (T*)out.m.data_ptr();
        parallel_items(items, call.elements(), [&](int64_t begin, int64_t end) {
            if (grad_b == nullptr)
                ladderfast::cpu::tagger_nll_backward<T>(gaussian, ga, call.in, gx, gz, gm, partials.data(), call.shape,
                                                        begin, end);
            else
                ladderfast::cpu::tagger_inputs_backward<T>(gaussian, ga, gb, call.in, gx, gz, gm, partials.data(),
                                                           call.shape, begin, end);
        });
        if (gaussian)
            ladderfast::cpu::tagger_sum<T>(partials.data(), (const T*)call.in.scalar, (T*)out.scalar.data_ptr(),
                                           call.shape);
    });
    return out;
}

#ifdef LADDERFAST_WITH_CUDA

// The dtype codes of a call, and what else its launches take.
struct TaggerLaunch {
    int dtype, scalar_dtype;
    void* stream;

    TaggerLaunch(const char* op, const TaggerCall& call)
        : dtype(dtype_code(op, call.z.scalar_type())),
          scalar_dtype(call.in.scalar == nullptr ? dtype : dtype_code(op, call.scalar.scalar_type())),
          stream(current_stream(call.z)) {}
};

std::tuple<Tensor, Tensor> tagger_inputs_cuda(const char* op, bool gaussian, const TaggerCall& call) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    Tensor dz = call.like_groups(), likelihood = call.like_groups();
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_inputs_cuda(gaussian, &call.in, dz.data_ptr(), likelihood.data_ptr(),
                                                              to.dtype, to.scalar_dtype, &call.shape, to.stream));
    return {dz, likelihood};
}

Tensor tagger_nll_cuda(const char* op, bool gaussian, const TaggerCall& call) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    Tensor nll = call.like_pixels();
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_nll_cuda(gaussian, &call.in, nll.data_ptr(), to.dtype,
                                                           to.scalar_dtype, &call.shape, to.stream));
    return nll;
}

TaggerGradients tagger_backward_cuda(const char* op, bool gaussian, const TaggerCall& call, const Tensor& grad_a,
                                     const Tensor* grad_b) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    const Tensor a = call.gradient(op, "grad", grad_a, grad_b == nullptr ? 2 : 3);
    const Tensor b = grad_b == nullptr ? a : call.gradient(op, "grad_likelihood", *grad_b, 3);
    const TaggerInput ga = tagger_input(a), gb = tagger_input(b);
    TaggerGradients out{call.like_pixels(), call.like_groups(), call.like_groups(), Tensor()};
    Tensor workspace;
    void *scalar = nullptr, *scratch = nullptr;
    if (gaussian) {
        out.scalar = torch::stable::empty_like(call.scalar);
        workspace = torch::stable::new_empty(call.z, {ladderfast_tagger_workspace_cuda(&call.shape)}, ScalarType::Byte);
        scalar = out.scalar.data_ptr();
        scratch = workspace.data_ptr();
    }
    void *gx = out.x.data_ptr(), *gz = out.z.data_ptr(), *gm = out.m.data_ptr();
    const int error =
        grad_b == nullptr
            ? ladderfast_tagger_nll_backward_cuda(gaussian, &ga, &call.in, gx, gz, gm, scalar, scratch, to.dtype,
                                                  to.scalar_dtype, &call.shape, to.stream)
            : ladderfast_tagger_inputs_backward_cuda(gaussian, &ga, &gb, &call.in, gx, gz, gm, scalar, scratch,
                                                     to.dtype, to.scalar_dtype, &call.shape, to.stream);
    STD_CUDA_CHECK((cudaError_t)error);
    return out;
}

#endif

// The ops of one device: inputs, nll and backward are its three functions above.
template <auto inputs, auto nll, auto backward>
struct TaggerOps {
    static std::tuple<Tensor, Tensor> gaussian_inputs(Tensor x, Tensor z, Tensor m, Tensor variance) {
        const char* op = "gaussian_group_inputs";
        return inputs(op, true, TaggerCall(op, x, z, m, &variance));
    }
    static std::tuple<Tensor, Tensor> bernoulli_inputs(Tensor x, Tensor z, Tensor m, Tensor flip_prob) {
        const char* op = "bernoulli_group_inputs";
        return inputs(op, false, TaggerCall(op, x, z, m, &flip_prob));
    }
    static Tensor gaussian_nll(Tensor x, Tensor z, Tensor m, Tensor variance) {
        const char* op = "gaussian_mixture_nll";
        return nll(op, true, TaggerCall(op, x, z, m, &variance));
    }
    static Tensor bernoulli_nll(Tensor x, Tensor z, Tensor m) {
        const char* op = "bernoulli_mixture_nll";
        return nll(op, false, TaggerCall(op, x, z, m, nullptr));
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_inputs_backward(Tensor grad_dz, Tensor grad_likelihood,
                                                                               Tensor x, Tensor z, Tensor m,
                                                                               Tensor variance) {
        const char* op = "gaussian_group_inputs_backward";
        const TaggerGradients g = backward(op, true, TaggerCall(op, x, z, m, &variance), grad_dz, &grad_likelihood);
        return {g.x, g.z, g.m, g.scalar};
    }
    static std::tuple<Tensor, Tensor, Tensor> bernoulli_inputs_backward(Tensor grad_dz, Tensor grad_likelihood,
                                                                        Tensor x, Tensor z, Tensor m,
                                                                        Tensor flip_prob) {
        const char* op = "bernoulli_group_inputs_backward";
        const TaggerGradients g = backward(op, false, TaggerCall(op, x, z, m, &flip_prob), grad_dz, &grad_likelihood);
        return {g.x, g.z, g.m};
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m,
                                                                            Tensor variance) {
        const char* op = "gaussian_mixture_nll_backward";
        const TaggerGradients g = backward(op, true, TaggerCall(op, x, z, m, &variance), grad, nullptr);
        return {g.x, g.z, g.m, g.scalar};
    }
    static std::tuple<Tensor, Tensor, Tensor> bernoulli_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m) {
        const char* op = "bernoulli_mixture_nll_backward";
        const TaggerGradients g = backward(op, false, TaggerCall(op, x, z, m, nullptr), grad, nullptr);
        return {g.x, g.z, g.m};
    }
};

using TaggerCpu = TaggerOps<tagger_inputs_cpu, tagger_nll_cpu, tagger_backward_cpu>;
#ifdef LADDERFAST_WITH_CUDA
using TaggerCuda = TaggerOps<tagger_inputs_cuda, tagger_nll_cuda, tagger_backward_cuda>;
#endif

}  // namespace

STABLE_TORCH_LIBRARY(ladderfast, m) {
    m.def("combinator(Tensor z, Tensor u, Tensor params, bool squash_v) -> Tensor");
    m.def(
        "combinator_backward(Tensor grad_z_hat, Tensor z, Tensor u, Tensor params, bool squash_v) -> (Tensor, Tensor, "
        "Tensor)");
    m.def("gaussian_group_inputs(Tensor x, Tensor z, Tensor m, Tensor variance) -> (Tensor, Tensor)");
    m.def(
        "gaussian_group_inputs_backward(Tensor grad_dz, Tensor grad_likelihood, Tensor x, Tensor z, Tensor m, Tensor "
        "variance) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("bernoulli_group_inputs(Tensor x, Tensor z, Tensor m, Tensor flip_prob) -> (Tensor, Tensor)");
    m.def(
        "bernoulli_group_inputs_backward(Tensor grad_dz, Tensor grad_likelihood, Tensor x, Tensor z, Tensor m, Tensor "
        "flip_prob) -> (Tensor, Tensor, Tensor)");
    m.def("gaussian_mixture_nll(Tensor x, Tensor z, Tensor m, Tensor variance) -> Tensor");
    m.def(
        "gaussian_mixture_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m, Tensor variance) -> (Tensor, Tensor, "
        "Tensor, Tensor)");
    m.def("bernoulli_mixture_nll(Tensor x, Tensor z, Tensor m) -> Tensor");
    m.def("bernoulli_mixture_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
    m.impl("gaussian_group_inputs", TORCH_BOX(&TaggerCpu::gaussian_inputs));
    m.impl("gaussian_group_inputs_backward", TORCH_BOX(&TaggerCpu::gaussian_inputs_backward));
    m.impl("bernoulli_group_inputs", TORCH_BOX(&TaggerCpu::bernoulli_inputs));
    m.impl("bernoulli_group_inputs_backward", TORCH_BOX(&TaggerCpu::bernoulli_inputs_backward));
    m.impl("gaussian_mixture_nll", TORCH_BOX(&TaggerCpu::gaussian_nll));
    m.impl("gaussian_mixture_nll_backward", TORCH_BOX(&TaggerCpu::gaussian_nll_backward));
    m.impl("bernoulli_mixture_nll", TORCH_BOX(&TaggerCpu::bernoulli_nll));
    m.impl("bernoulli_mixture_nll_backward", TORCH_BOX(&TaggerCpu::bernoulli_nll_backward));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
    m.impl("gaussian_group_inputs", TORCH_BOX(&TaggerCuda::gaussian_inputs));
    m.impl("gaussian_group_inputs_backward", TORCH_BOX(&TaggerCuda::gaussian_inputs_backward));
    m.impl("bernoulli_group_inputs", TORCH_BOX(&TaggerCuda::bernoulli_inputs));
    m.impl("bernoulli_group_inputs_backward", TORCH_BOX(&TaggerCuda::bernoulli_inputs_backward));
    m.impl("gaussian_mixture_nll", TORCH_BOX(&TaggerCuda::gaussian_nll));
    m.impl("gaussian_mixture_nll_backward", TORCH_BOX(&TaggerCuda::gaussian_nll_backward));
    m.impl("bernoulli_mixture_nll", TORCH_BOX(&TaggerCuda::bernoulli_nll));
    m.impl("bernoulli_mixture_nll_backward", TORCH_BOX(&TaggerCuda::bernoulli_nll_backward));
}
#endif
