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
#include "ladder_encoder.h"

#include <optional>
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

// ladder_encoder

const void* data_or_null(const std::optional<Tensor>& t) { return t.has_value() ? t->data_ptr() : nullptr; }

// z_pre (N, C, *), or (S, N, C, *) with `seeds`; contiguous or channels-last.
LadderEncoderShape encoder_shape(const char* op, const Tensor& z_pre, int64_t num_labelled, int64_t num_clean,
                                 bool seeds) {
    const int64_t axis = seeds ? 2 : 1;  // of the channels
    STD_TORCH_CHECK(z_pre.dim() > axis, op, ": z_pre must be (N, C, *), or (S, N, C, *) with seeds");
    const int64_t rows = z_pre.size(axis - 1);
    STD_TORCH_CHECK(num_labelled >= 0 && num_clean >= 0 && num_labelled + num_clean <= rows, op,
                    ": num_labelled and num_clean do not fit the rows of z_pre");
    LadderEncoderShape shape{seeds ? z_pre.size(0) : 1, rows,
                             z_pre.size(axis),          1,
                             num_clean > 0 ? 3 : 2,     {num_labelled, rows - num_labelled - num_clean, num_clean},
                             rows - num_clean};
    for (int64_t k = axis + 1; k < z_pre.dim(); ++k) shape.inner *= z_pre.size(k);
    if (packed(z_pre, [](int64_t k) { return k; })) return shape;
    const int64_t last = z_pre.dim() - 1;
    const bool channels_last = packed(z_pre, [=](int64_t k) { return k < axis ? k : k == last ? axis : k + 1; });
    STD_TORCH_CHECK(channels_last, op, ": z_pre must be contiguous or channels-last");
    shape.rows *= shape.inner;
    shape.noisy *= shape.inner;
    for (int64_t& part : shape.part_rows) part *= shape.inner;
    shape.inner = 1;
    return shape;
}

int64_t numel(const LadderEncoderShape& s) { return s.seeds * s.rows * s.channels * s.inner; }

// Whether t is (size), or (seeds, size) with `seeds`.
bool has_sizes(const Tensor& t, bool seeds, const LadderEncoderShape& s, int64_t size) {
    return t.dim() == (seeds ? 2 : 1) && t.size(t.dim() - 1) == size && (!seeds || t.size(0) == s.seeds);
}

// Packs beta, gamma and the state, and checks them. No noise, no state.
void pack_encoder_inputs(const char* op, const Tensor& z_pre, std::optional<Tensor>& beta, std::optional<Tensor>& gamma,
                         std::optional<Tensor>& state, double noise_std, bool seeds, const LadderEncoderShape& shape) {
    for (std::optional<Tensor>* t : {&beta, &gamma}) {
        if (!t->has_value()) continue;
        STD_TORCH_CHECK(has_sizes(**t, seeds, shape, shape.channels) && (*t)->device() == z_pre.device(), op,
                        ": beta and gamma must be (C), or (S, C) with seeds, on the device of z_pre");
        *t = torch::stable::contiguous(**t);
    }
    STD_TORCH_CHECK(!beta || !gamma || beta->scalar_type() == gamma->scalar_type(), op,
                    ": beta and gamma must have one dtype");
    if (noise_std == 0) {
        state.reset();
        return;
    }
    STD_TORCH_CHECK(state.has_value(), op, ": noise needs a noise_state");
    STD_TORCH_CHECK(has_sizes(*state, seeds, shape, 2) && state->scalar_type() == ScalarType::Long &&
                        state->device() == z_pre.device(),
                    op, ": noise_state must be (2), or (S, 2) with seeds, int64, on the device of z_pre");
    state = torch::stable::contiguous(*state);
}

Tensor new_statistics(const Tensor& z_pre, ScalarType dtype, bool seeds, const LadderEncoderShape& s) {
    return seeds ? torch::stable::new_empty(z_pre, {s.seeds, s.parts, s.channels}, dtype)
                 : torch::stable::new_empty(z_pre, {s.parts, s.channels}, dtype);
}

void check_params_dtype(const char* op, const std::optional<Tensor>& beta, const std::optional<Tensor>& gamma,
                        ScalarType dtype) {
    for (const std::optional<Tensor>* t : {&beta, &gamma})
        STD_TORCH_CHECK(!t->has_value() || (*t)->scalar_type() == dtype, op,
                        ": beta and gamma must have the dtype of z_pre on the CPU");
}

template <class T>
void run_encoder(const Tensor& z_pre, const std::optional<Tensor>& beta, const std::optional<Tensor>& gamma,
                 const std::optional<Tensor>& state, bool want_z, bool want_h, Tensor& z, Tensor& h, Tensor& mean,
                 Tensor& var, const LadderEncoderOptions& options, const LadderEncoderShape& shape) {
    namespace cpu = ladderfast::cpu;
    Tensor workspace = torch::stable::new_empty(z_pre, {cpu::ladder_encoder_workspace(shape)});
    const cpu::LadderEncoderForward<T> pass{(const T*)z_pre.data_ptr(),
                                            (const T*)data_or_null(beta),
                                            (const T*)data_or_null(gamma),
                                            (const int64_t*)data_or_null(state),
                                            want_z ? (T*)z.data_ptr() : nullptr,
                                            want_h ? (T*)h.data_ptr() : nullptr,
                                            (T*)mean.data_ptr(),
                                            (T*)var.data_ptr(),
                                            (T*)workspace.data_ptr()};
    const int64_t items = cpu::ladder_encoder_items(shape);
    parallel_items(items, numel(shape),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_statistics<T>(pass, shape, begin, end); });
    parallel_items(cpu::ladder_encoder_merge_items(shape), workspace.numel(),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_merge<T>(pass, shape, begin, end); });
    parallel_items(items, numel(shape),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_apply<T>(pass, options, shape, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ladder_encoder_cpu(Tensor z_pre, std::optional<Tensor> beta,
                                                              std::optional<Tensor> gamma, std::optional<Tensor> state,
                                                              int64_t num_labelled, int64_t num_clean, double noise_std,
                                                              int64_t noise_stream, int64_t activation,
                                                              double negative_slope, double eps, bool want_z,
                                                              bool want_h, bool seeds) {
    const LadderEncoderShape shape = encoder_shape("ladder_encoder", z_pre, num_labelled, num_clean, seeds);
    pack_encoder_inputs("ladder_encoder", z_pre, beta, gamma, state, noise_std, seeds, shape);
    const LadderEncoderOptions options{noise_std, negative_slope, eps, noise_stream, (int)activation};
    const ScalarType dtype = z_pre.scalar_type();
    check_params_dtype("ladder_encoder", beta, gamma, dtype);
    Tensor z = want_z ? torch::stable::empty_like(z_pre) : torch::stable::new_empty(z_pre, {0});
    Tensor h = want_h ? torch::stable::empty_like(z_pre) : torch::stable::new_empty(z_pre, {0});
    Tensor mean = new_statistics(z_pre, dtype, seeds, shape), var = new_statistics(z_pre, dtype, seeds, shape);
    if (dtype == ScalarType::Float) {
        run_encoder<float>(z_pre, beta, gamma, state, want_z, want_h, z, h, mean, var, options, shape);
    } else if (dtype == ScalarType::Double) {
        run_encoder<double>(z_pre, beta, gamma, state, want_z, want_h, z, h, mean, var, options, shape);
    } else {
        STD_TORCH_CHECK(false, "ladder_encoder: the CPU kernel takes float32 and float64");
    }
    return {z, h, mean, var};
}

// The gradients of z, h, mean and var as the kernels take them.
void pack_encoder_gradients(const char* op, std::optional<Tensor>& grad_z, std::optional<Tensor>& grad_h,
                            std::optional<Tensor>& grad_mean, std::optional<Tensor>& grad_var, const Tensor& z_pre,
                            Tensor& mean, Tensor& var, bool seeds, const LadderEncoderShape& shape) {
    for (std::optional<Tensor>* t : {&grad_z, &grad_h}) {
        if (!t->has_value()) continue;
        check_same_shape(op, "grad_z and grad_h", **t, z_pre);
        *t = laid_out_like(**t, z_pre);
    }
    const auto fits = [&](const Tensor& t) {
        const int64_t axis = seeds ? 1 : 0;
        return t.dim() == axis + 2 && (!seeds || t.size(0) == shape.seeds) && t.size(axis) == shape.parts &&
               t.size(axis + 1) == shape.channels && t.device() == z_pre.device() &&
               t.scalar_type() == mean.scalar_type();
    };
    STD_TORCH_CHECK(fits(mean) && fits(var), op, ": mean and var do not fit z_pre");
    mean = torch::stable::contiguous(mean);
    var = torch::stable::contiguous(var);
    for (std::optional<Tensor>* t : {&grad_mean, &grad_var}) {
        if (!t->has_value()) continue;
        STD_TORCH_CHECK(fits(**t), op, ": grad_mean and grad_var must have the shape and dtype of mean");
        *t = torch::stable::contiguous(**t);
    }
}

// What backward allocates: for beta and gamma nothing where there are none.
Tensor empty_or_none(const Tensor& z_pre, const std::optional<Tensor>& t) {
    return t.has_value() ? torch::stable::empty_like(*t) : torch::stable::new_empty(z_pre, {0});
}

template <class T>
void run_encoder_backward(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_h,
                          const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_var,
                          const Tensor& z_pre, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& beta,
                          const std::optional<Tensor>& gamma, const std::optional<Tensor>& state, Tensor& grad_x,
                          Tensor& grad_beta, Tensor& grad_gamma, const LadderEncoderOptions& options,
                          const LadderEncoderShape& shape) {
    namespace cpu = ladderfast::cpu;
    Tensor workspace = torch::stable::new_empty(z_pre, {cpu::ladder_encoder_backward_workspace(shape)});
    const cpu::LadderEncoderBackward<T> pass{(const T*)data_or_null(grad_z),
                                             (const T*)data_or_null(grad_h),
                                             (const T*)data_or_null(grad_mean),
                                             (const T*)data_or_null(grad_var),
                                             (const T*)z_pre.data_ptr(),
                                             (const T*)mean.data_ptr(),
                                             (const T*)var.data_ptr(),
                                             (const T*)data_or_null(beta),
                                             (const T*)data_or_null(gamma),
                                             (const int64_t*)data_or_null(state),
                                             (T*)grad_x.data_ptr(),
                                             beta ? (T*)grad_beta.data_ptr() : nullptr,
                                             gamma ? (T*)grad_gamma.data_ptr() : nullptr,
                                             (T*)workspace.data_ptr()};
    const int64_t items = cpu::ladder_encoder_items(shape);
    parallel_items(items, numel(shape), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_backward_sums<T>(pass, options, shape, begin, end);
    });
    parallel_items(cpu::ladder_encoder_reduce_items(shape), workspace.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_reduce<T>(pass, options, shape, begin, end);
    });
    parallel_items(items, numel(shape), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_backward_apply<T>(pass, options, shape, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor> ladder_encoder_backward_cpu(
    std::optional<Tensor> grad_z, std::optional<Tensor> grad_h, std::optional<Tensor> grad_mean,
    std::optional<Tensor> grad_var, Tensor z_pre, Tensor mean, Tensor var, std::optional<Tensor> beta,
    std::optional<Tensor> gamma, std::optional<Tensor> state, int64_t num_labelled, int64_t num_clean, double noise_std,
    int64_t noise_stream, int64_t activation, double negative_slope, double eps, bool seeds) {
    const char* op = "ladder_encoder_backward";
    const LadderEncoderShape shape = encoder_shape(op, z_pre, num_labelled, num_clean, seeds);
    pack_encoder_inputs(op, z_pre, beta, gamma, state, noise_std, seeds, shape);
    pack_encoder_gradients(op, grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, seeds, shape);
    const LadderEncoderOptions options{noise_std, negative_slope, eps, noise_stream, (int)activation};
    const ScalarType dtype = z_pre.scalar_type();
    check_params_dtype(op, beta, gamma, dtype);
    STD_TORCH_CHECK(mean.scalar_type() == dtype, op, ": mean must have the dtype of z_pre on the CPU");
    Tensor grad_x = torch::stable::empty_like(z_pre);
    Tensor grad_beta = empty_or_none(z_pre, beta), grad_gamma = empty_or_none(z_pre, gamma);
    if (dtype == ScalarType::Float) {
        run_encoder_backward<float>(grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma, state, grad_x,
                                    grad_beta, grad_gamma, options, shape);
    } else if (dtype == ScalarType::Double) {
        run_encoder_backward<double>(grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma, state, grad_x,
                                     grad_beta, grad_gamma, options, shape);
    } else {
        STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32 and float64");
    }
    return {grad_x, grad_beta, grad_gamma};
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

// float32, or float64 where z_pre is.
ScalarType statistics_dtype(const Tensor& z_pre) {
    return z_pre.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int params_code(const char* op, const Tensor& z_pre, const std::optional<Tensor>& beta,
                const std::optional<Tensor>& gamma) {
    return dtype_code(op, beta ? beta->scalar_type() : gamma ? gamma->scalar_type() : z_pre.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ladder_encoder_cuda(Tensor z_pre, std::optional<Tensor> beta,
                                                               std::optional<Tensor> gamma, std::optional<Tensor> state,
                                                               int64_t num_labelled, int64_t num_clean,
                                                               double noise_std, int64_t noise_stream,
                                                               int64_t activation, double negative_slope, double eps,
                                                               bool want_z, bool want_h, bool seeds) {
    const char* op = "ladder_encoder";
    const torch::stable::accelerator::DeviceGuard guard(z_pre.get_device_index());
    const LadderEncoderShape shape = encoder_shape(op, z_pre, num_labelled, num_clean, seeds);
    pack_encoder_inputs(op, z_pre, beta, gamma, state, noise_std, seeds, shape);
    const LadderEncoderOptions options{noise_std, negative_slope, eps, noise_stream, (int)activation};
    Tensor z = want_z ? torch::stable::empty_like(z_pre) : torch::stable::new_empty(z_pre, {0});
    Tensor h = want_h ? torch::stable::empty_like(z_pre) : torch::stable::new_empty(z_pre, {0});
    Tensor mean = new_statistics(z_pre, statistics_dtype(z_pre), seeds, shape);
    Tensor var = new_statistics(z_pre, statistics_dtype(z_pre), seeds, shape);
    Tensor workspace =
        torch::stable::new_empty(z_pre, {ladderfast_ladder_encoder_workspace_cuda(&shape)}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_encoder_forward_cuda(
        z_pre.data_ptr(), data_or_null(beta), data_or_null(gamma), (const int64_t*)data_or_null(state),
        want_z ? z.data_ptr() : nullptr, want_h ? h.data_ptr() : nullptr, mean.data_ptr(), var.data_ptr(),
        workspace.data_ptr(), dtype_code(op, z_pre.scalar_type()), params_code(op, z_pre, beta, gamma), &options,
        &shape, current_stream(z_pre)));
    return {z, h, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> ladder_encoder_backward_cuda(
    std::optional<Tensor> grad_z, std::optional<Tensor> grad_h, std::optional<Tensor> grad_mean,
    std::optional<Tensor> grad_var, Tensor z_pre, Tensor mean, Tensor var, std::optional<Tensor> beta,
    std::optional<Tensor> gamma, std::optional<Tensor> state, int64_t num_labelled, int64_t num_clean, double noise_std,
    int64_t noise_stream, int64_t activation, double negative_slope, double eps, bool seeds) {
    const char* op = "ladder_encoder_backward";
    const torch::stable::accelerator::DeviceGuard guard(z_pre.get_device_index());
    const LadderEncoderShape shape = encoder_shape(op, z_pre, num_labelled, num_clean, seeds);
    pack_encoder_inputs(op, z_pre, beta, gamma, state, noise_std, seeds, shape);
    pack_encoder_gradients(op, grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, seeds, shape);
    STD_TORCH_CHECK(mean.scalar_type() == statistics_dtype(z_pre), op,
                    ": mean must be float32, or float64 where z_pre is");
    const LadderEncoderOptions options{noise_std, negative_slope, eps, noise_stream, (int)activation};
    Tensor grad_x = torch::stable::empty_like(z_pre);
    Tensor grad_beta = empty_or_none(z_pre, beta), grad_gamma = empty_or_none(z_pre, gamma);
    Tensor workspace =
        torch::stable::new_empty(z_pre, {ladderfast_ladder_encoder_backward_workspace_cuda(&shape)}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_encoder_backward_cuda(
        data_or_null(grad_z), data_or_null(grad_h), data_or_null(grad_mean), data_or_null(grad_var), z_pre.data_ptr(),
        mean.data_ptr(), var.data_ptr(), data_or_null(beta), data_or_null(gamma), (const int64_t*)data_or_null(state),
        grad_x.data_ptr(), beta ? grad_beta.data_ptr() : nullptr, gamma ? grad_gamma.data_ptr() : nullptr,
        workspace.data_ptr(), dtype_code(op, z_pre.scalar_type()), params_code(op, z_pre, beta, gamma), &options,
        &shape, current_stream(z_pre)));
    return {grad_x, grad_beta, grad_gamma};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY(ladderfast, m) {
    m.def("combinator(Tensor z, Tensor u, Tensor params, bool squash_v) -> Tensor");
    m.def(
        "combinator_backward(Tensor grad_z_hat, Tensor z, Tensor u, Tensor params, bool squash_v) -> (Tensor, Tensor, "
        "Tensor)");
    // What is not wanted, and the gradients of what is not given, have no elements.
    m.def(
        "ladder_encoder(Tensor z_pre, Tensor? beta, Tensor? gamma, Tensor? noise_state, int num_labelled, int "
        "num_clean, float noise_std, int noise_stream, int activation, float negative_slope, float eps, bool want_z, "
        "bool want_h, bool seeds) -> (Tensor z, Tensor h, Tensor mean, Tensor var)");
    m.def(
        "ladder_encoder_backward(Tensor? grad_z, Tensor? grad_h, Tensor? grad_mean, Tensor? grad_var, Tensor z_pre, "
        "Tensor mean, Tensor var, Tensor? beta, Tensor? gamma, Tensor? noise_state, int num_labelled, int num_clean, "
        "float noise_std, int noise_stream, int activation, float negative_slope, float eps, bool seeds) -> (Tensor "
        "grad_z_pre, Tensor grad_beta, Tensor grad_gamma)");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
    m.impl("ladder_encoder", TORCH_BOX(&ladder_encoder_cpu));
    m.impl("ladder_encoder_backward", TORCH_BOX(&ladder_encoder_backward_cpu));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
    m.impl("ladder_encoder", TORCH_BOX(&ladder_encoder_cuda));
    m.impl("ladder_encoder_backward", TORCH_BOX(&ladder_encoder_backward_cuda));
}
#endif
