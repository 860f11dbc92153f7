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

#include <tuple>

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

}  // namespace

STABLE_TORCH_LIBRARY(ladderfast, m) {
    m.def("combinator(Tensor z, Tensor u, Tensor params, bool squash_v) -> Tensor");
    m.def(
        "combinator_backward(Tensor grad_z_hat, Tensor z, Tensor u, Tensor params, bool squash_v) -> (Tensor, Tensor, "
        "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
}
#endif
