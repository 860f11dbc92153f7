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
#include "what_where.h"

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

// z, what and where of one call have one order of axes, that of the tensor which comes first: contiguous, or the
// channels last.
bool channels_first(const Tensor& t) {
    return packed(t, [](int64_t k) { return k; });
}
bool channels_last(const Tensor& t) {
    return packed(t, [last = t.dim() - 1](int64_t k) { return k == 0 ? 0 : k == last ? int64_t{1} : k + 1; });
}

WindowShape window_shape(const char* op, const char* name, const Tensor& t, int64_t height, int64_t width,
                         int64_t kernel_h, int64_t kernel_w) {
    STD_TORCH_CHECK(kernel_h >= 1 && kernel_h <= 16 && kernel_w >= 1 && kernel_w <= 16, op,
                    ": kernel sizes must be from 1 to 16");
    if (channels_first(t)) return {t.size(0) * t.size(1), height, width, 1, kernel_h, kernel_w};
    STD_TORCH_CHECK(channels_last(t), op, ": ", name, " must be contiguous or channels-last");
    return {t.size(0), height, width, t.size(1), kernel_h, kernel_w};
}

template <size_t n>
Tensor empty_in_order(const Tensor& like, const int64_t (&size)[n], bool last) {
    using torch::headeronly::MemoryFormat;
    const MemoryFormat format = !last    ? MemoryFormat::Contiguous
                                : n == 4 ? MemoryFormat::ChannelsLast
                                         : MemoryFormat::ChannelsLast3d;
    return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size, n), like.scalar_type(), std::nullopt,
                                like.device(), std::nullopt, format);
}

// t, which must have this size, in the wanted order of axes.
template <size_t n>
Tensor in_order(const char* op, const char* name, const Tensor& t, const Tensor& like, const int64_t (&size)[n],
                bool last) {
    bool same = t.dim() == static_cast<int64_t>(n);
    for (size_t axis = 0; same && axis < n; ++axis) same = t.size(axis) == size[axis];
    STD_TORCH_CHECK(same && t.scalar_type() == like.scalar_type() && t.device() == like.device(), op, ": ", name,
                    " must have the fitting shape, and the dtype and device of the others");
    if (last ? channels_last(t) : channels_first(t)) return t;
    Tensor copy = empty_in_order(like, size, last);
    torch::stable::copy_(copy, t);
    return copy;
}

// Calls f with a null pointer to the element type of t.
template <class F>
void dispatch_cpu(const char* op, const Tensor& t, const F& f) {
    if (t.scalar_type() == ScalarType::Float) {
        f(static_cast<float*>(nullptr));
    } else {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, op, ": the CPU kernel takes float32 and float64");
        f(static_cast<double*>(nullptr));
    }
}

template <class F>
void parallel_windows(const WindowShape& s, const F& f) {
    parallel_items(ladderfast::cpu::windows_items(s), s.outer * s.height * s.width * s.inner, f);
}

// What the four functions of soft pooling and unpooling need of their arguments: z's shape and the order of axes.
struct Windows {
    WindowShape shape;
    bool last;
    int64_t n, c, h, w;

    // From z.
    static Windows of_z(const char* op, const Tensor& z, int64_t kernel_h, int64_t kernel_w) {
        STD_TORCH_CHECK(z.dim() == 4, op, ": z must be (N, C, H, W)");
        const WindowShape s = window_shape(op, "z", z, z.size(2), z.size(3), kernel_h, kernel_w);
        return {s, !channels_first(z), z.size(0), z.size(1), z.size(2) / kernel_h, z.size(3) / kernel_w};
    }
    // From what.
    static Windows of_what(const char* op, const Tensor& what, int64_t kernel_h, int64_t kernel_w) {
        STD_TORCH_CHECK(what.dim() == 4, op, ": what must be (N, C, h, w)");
        const int64_t h = what.size(2), w = what.size(3);
        const WindowShape s = window_shape(op, "what", what, h * kernel_h, w * kernel_w, kernel_h, kernel_w);
        return {s, !channels_first(what), what.size(0), what.size(1), h, w};
    }

    Tensor empty_z(const Tensor& like) const {
        const int64_t size[] = {n, c, shape.height, shape.width};
        return empty_in_order(like, size, last);
    }
    Tensor empty_what(const Tensor& like) const {
        const int64_t size[] = {n, c, h, w};
        return empty_in_order(like, size, last);
    }
    Tensor empty_where(const Tensor& like) const {
        const int64_t size[] = {n, c, 2, h, w};
        return empty_in_order(like, size, last);
    }
    Tensor as_z(const char* op, const char* name, const Tensor& t, const Tensor& like) const {
        const int64_t size[] = {n, c, shape.height, shape.width};
        return in_order(op, name, t, like, size, last);
    }
    Tensor as_what(const char* op, const char* name, const Tensor& t, const Tensor& like) const {
        const int64_t size[] = {n, c, h, w};
        return in_order(op, name, t, like, size, last);
    }
    Tensor as_where(const char* op, const char* name, const Tensor& t, const Tensor& like) const {
        const int64_t size[] = {n, c, 2, h, w};
        return in_order(op, name, t, like, size, last);
    }
};

std::tuple<Tensor, Tensor> soft_pool2d_cpu(Tensor z, int64_t kernel_h, int64_t kernel_w, double beta) {
    const Windows windows = Windows::of_z("soft_pool2d", z, kernel_h, kernel_w);
    Tensor what = windows.empty_what(z), where = windows.empty_where(z);
    dispatch_cpu("soft_pool2d", z, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* zp = (const T*)z.data_ptr();
        T *to_what = (T*)what.data_ptr(), *to_where = (T*)where.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::soft_pool_forward<T>(zp, to_what, to_where, beta, windows.shape, begin, end);
        });
    });
    return {what, where};
}

Tensor soft_pool2d_backward_cpu(Tensor grad_what, Tensor grad_where, Tensor z, int64_t kernel_h, int64_t kernel_w,
                                double beta) {
    const char* op = "soft_pool2d_backward";
    const Windows windows = Windows::of_z(op, z, kernel_h, kernel_w);
    grad_what = windows.as_what(op, "grad_what", grad_what, z);
    grad_where = windows.as_where(op, "grad_where", grad_where, z);
    Tensor grad_z = torch::stable::empty_like(z);
    dispatch_cpu(op, z, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *gp = (const T*)grad_what.data_ptr(), *hp = (const T*)grad_where.data_ptr(),
                *zp = (const T*)z.data_ptr();
        T* out = (T*)grad_z.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::soft_pool_backward<T>(gp, hp, zp, out, beta, windows.shape, begin, end);
        });
    });
    return grad_z;
}

Tensor soft_unpool2d_cpu(Tensor what, Tensor where, int64_t kernel_h, int64_t kernel_w) {
    const char* op = "soft_unpool2d";
    const Windows windows = Windows::of_what(op, what, kernel_h, kernel_w);
    where = windows.as_where(op, "where", where, what);
    Tensor z = windows.empty_z(what);
    dispatch_cpu(op, what, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *mp = (const T*)what.data_ptr(), *pp = (const T*)where.data_ptr();
        T* out = (T*)z.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::soft_unpool_forward<T>(mp, pp, out, windows.shape, begin, end);
        });
    });
    return z;
}

std::tuple<Tensor, Tensor> soft_unpool2d_backward_cpu(Tensor grad_z, Tensor what, Tensor where, int64_t kernel_h,
                                                      int64_t kernel_w) {
    const char* op = "soft_unpool2d_backward";
    const Windows windows = Windows::of_what(op, what, kernel_h, kernel_w);
    grad_z = windows.as_z(op, "grad_z", grad_z, what);
    where = windows.as_where(op, "where", where, what);
    Tensor grad_what = torch::stable::empty_like(what), grad_where = windows.empty_where(what);
    dispatch_cpu(op, what, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *gp = (const T*)grad_z.data_ptr(), *mp = (const T*)what.data_ptr(), *pp = (const T*)where.data_ptr();
        T *to_what = (T*)grad_what.data_ptr(), *to_where = (T*)grad_where.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::soft_unpool_backward<T>(gp, mp, pp, to_what, to_where, windows.shape, begin, end);
        });
    });
    return {grad_what, grad_where};
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

std::tuple<Tensor, Tensor> soft_pool2d_cuda(Tensor z, int64_t kernel_h, int64_t kernel_w, double beta) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const Windows windows = Windows::of_z("soft_pool2d", z, kernel_h, kernel_w);
    Tensor what = windows.empty_what(z), where = windows.empty_where(z);
    STD_CUDA_CHECK((cudaError_t)ladderfast_soft_pool_forward_cuda(z.data_ptr(), what.data_ptr(), where.data_ptr(), beta,
                                                                  dtype_code("soft_pool2d", z.scalar_type()),
                                                                  &windows.shape, current_stream(z)));
    return {what, where};
}

Tensor soft_pool2d_backward_cuda(Tensor grad_what, Tensor grad_where, Tensor z, int64_t kernel_h, int64_t kernel_w,
                                 double beta) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const char* op = "soft_pool2d_backward";
    const Windows windows = Windows::of_z(op, z, kernel_h, kernel_w);
    grad_what = windows.as_what(op, "grad_what", grad_what, z);
    grad_where = windows.as_where(op, "grad_where", grad_where, z);
    Tensor grad_z = torch::stable::empty_like(z);
    STD_CUDA_CHECK((cudaError_t)ladderfast_soft_pool_backward_cuda(
        grad_what.data_ptr(), grad_where.data_ptr(), z.data_ptr(), grad_z.data_ptr(), beta,
        dtype_code(op, z.scalar_type()), &windows.shape, current_stream(z)));
    return grad_z;
}

Tensor soft_unpool2d_cuda(Tensor what, Tensor where, int64_t kernel_h, int64_t kernel_w) {
    const torch::stable::accelerator::DeviceGuard guard(what.get_device_index());
    const char* op = "soft_unpool2d";
    const Windows windows = Windows::of_what(op, what, kernel_h, kernel_w);
    where = windows.as_where(op, "where", where, what);
    Tensor z = windows.empty_z(what);
    STD_CUDA_CHECK((cudaError_t)ladderfast_soft_unpool_forward_cuda(what.data_ptr(), where.data_ptr(), z.data_ptr(),
                                                                    dtype_code(op, what.scalar_type()), &windows.shape,
                                                                    current_stream(what)));
    return z;
}

std::tuple<Tensor, Tensor> soft_unpool2d_backward_cuda(Tensor grad_z, Tensor what, Tensor where, int64_t kernel_h,
                                                       int64_t kernel_w) {
    const torch::stable::accelerator::DeviceGuard guard(what.get_device_index());
    const char* op = "soft_unpool2d_backward";
    const Windows windows = Windows::of_what(op, what, kernel_h, kernel_w);
    grad_z = windows.as_z(op, "grad_z", grad_z, what);
    where = windows.as_where(op, "where", where, what);
    Tensor grad_what = torch::stable::empty_like(what), grad_where = windows.empty_where(what);
    STD_CUDA_CHECK((cudaError_t)ladderfast_soft_unpool_backward_cuda(
        grad_z.data_ptr(), what.data_ptr(), where.data_ptr(), grad_what.data_ptr(), grad_where.data_ptr(),
        dtype_code(op, what.scalar_type()), &windows.shape, current_stream(what)));
    return {grad_what, grad_where};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY(ladderfast, m) {
    m.def("combinator(Tensor z, Tensor u, Tensor params, bool squash_v) -> Tensor");
    m.def(
        "combinator_backward(Tensor grad_z_hat, Tensor z, Tensor u, Tensor params, bool squash_v) -> (Tensor, Tensor, "
        "Tensor)");
    m.def("soft_pool2d(Tensor z, int kernel_h, int kernel_w, float beta) -> (Tensor, Tensor)");
    m.def(
        "soft_pool2d_backward(Tensor grad_what, Tensor grad_where, Tensor z, int kernel_h, int kernel_w, float beta) "
        "-> Tensor");
    m.def("soft_unpool2d(Tensor what, Tensor where, int kernel_h, int kernel_w) -> Tensor");
    m.def(
        "soft_unpool2d_backward(Tensor grad_z, Tensor what, Tensor where, int kernel_h, int kernel_w) -> (Tensor, "
        "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
    m.impl("soft_pool2d", TORCH_BOX(&soft_pool2d_cpu));
    m.impl("soft_pool2d_backward", TORCH_BOX(&soft_pool2d_backward_cpu));
    m.impl("soft_unpool2d", TORCH_BOX(&soft_unpool2d_cpu));
    m.impl("soft_unpool2d_backward", TORCH_BOX(&soft_unpool2d_backward_cpu));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
    m.impl("soft_pool2d", TORCH_BOX(&soft_pool2d_cuda));
    m.impl("soft_pool2d_backward", TORCH_BOX(&soft_pool2d_backward_cuda));
    m.impl("soft_unpool2d", TORCH_BOX(&soft_unpool2d_cuda));
    m.impl("soft_unpool2d_backward", TORCH_BOX(&soft_unpool2d_backward_cuda));
}
#endif
