// Schemas, checks, allocation and dispatch of every op, on the stable ABI of torch. Arguments reach here through
// ladderfast.ops, which has checked them for people; what is checked again here protects the kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
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
#include "ladder_decoder.h"
#include "what_where.h"
#include "tagger.h"
#include "tagger_step.h"
#include "ln_convlstm.h"
#include "layout.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which an op stays on one thread.
constexpr int64_t kGrain = 16384;

constexpr int64_t kMostAxes = 8;  // of a tensor that is made without an op

// Runs f over work items, `elements` being the size of the whole job.
template <class F>
void parallel_items(int64_t items, int64_t elements, const F& f) {
    if (items == 0) return;
    const int64_t per_item = elements / items + 1;
    torch::stable::parallel_for(0, items, (kGrain + per_item - 1) / per_item, f);
}

// torch::stable's functions look their op up by its name at each call; these do not, or only where they have to. On the
// CPU they do without any op.
Tensor new_packed(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  std::optional<ScalarType> of = std::nullopt) {
    int32_t dtype = of.has_value() ? (int32_t)*of : 0, device_type, index;
    if (!of.has_value()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    const int64_t axes = (int64_t)sizes.size();
    int64_t strides[kMostAxes];
    AtenTensorHandle made;
    if (device_type == aoti_torch_device_type_cpu() && axes <= kMostAxes) {
        int64_t stride = 1;
        for (int64_t axis = axes - 1; axis >= 0; --axis) {
            strides[axis] = stride;
            stride *= std::max<int64_t>(sizes[axis], 1);
        }
        TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(axes, sizes.data(), strides, dtype, device_type, index, &made));
    } else {
        int32_t layout;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
        TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), axes, &dtype, &layout, &device_type,
                                                         index, nullptr, &made));
    }
    return Tensor(made);
}

// parallel_items in as many ranges as there are threads, each with `scratch` elements of T of its own, null of none:
// f(begin, end, its scratch).
template <class T, class F>
void parallel_items_with_scratch(const Tensor& like, int64_t scratch, int64_t items, int64_t elements, const F& f) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), elements / kGrain);
    const int64_t ranges = std::max<int64_t>(std::min(items, threads), 1);
    T* first = nullptr;
    Tensor all;
    if (scratch > 0) {
        constexpr int64_t kLine = 64 / sizeof(T);
        scratch = (scratch + kLine - 1) / kLine * kLine;
        all = new_packed(like, {ranges * scratch + kLine});
        first = (T*)(((uintptr_t)all.data_ptr() + 63) / 64 * 64);
    }
    torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            f(items * i / ranges, items * (i + 1) / ranges, first == nullptr ? nullptr : first + i * scratch);
    });
}

Tensor new_like(const Tensor& t) { return t.is_contiguous() ? new_packed(t, t.sizes()) : torch::stable::empty_like(t); }
Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

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

const void* pointer(const std::optional<Tensor>& t) { return t.has_value() ? t->data_ptr() : nullptr; }

// t itself if it lies in memory as `like` does, else a copy that does.
Tensor laid_out_like(const Tensor& t, const Tensor& like) {
    if (t.numel() == 0 || same_layout(t, like)) return t;
    Tensor copy = new_like(like);
    torch::stable::copy_(copy, t);
    return copy;
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& z, const char* of = "z") {
    bool same = t.dim() == z.dim();
    for (int64_t axis = 0; same && axis < z.dim(); ++axis) same = t.size(axis) == z.size(axis);
    STD_TORCH_CHECK(same && t.scalar_type() == z.scalar_type() && t.device() == z.device(), op, ": ", name,
                    " must have the shape, dtype and device of ", of);
}

// Of z, (N, C, *) with params (10, C) or (S, N, C, *) with params (S, 10, C), contiguous or channels-last.
CombinatorShape packed_shape(const char* op, const char* name, const Tensor& z, const Tensor& params) {
    const int64_t axis = params.dim() - 1;  // of the channels
    STD_TORCH_CHECK(axis == 1 || axis == 2, op, ": params must be (10, C) or (S, 10, C)");
    STD_TORCH_CHECK(z.dim() > axis && params.size(axis - 1) == 10 && params.size(axis) == z.size(axis) &&
                        (axis == 1 || params.size(0) == z.size(0)),
                    op, ": the shapes of ", name, " and params do not fit");
    STD_TORCH_CHECK(params.device() == z.device(), op, ": params must be on the device of ", name);

    CombinatorShape shape{axis == 2 ? z.size(0) : 1, z.size(axis - 1), z.size(axis), 1};
    for (int64_t k = axis + 1; k < z.dim(); ++k) shape.inner *= z.size(k);
    if (packed(z, [](int64_t k) { return k; })) return shape;
    const int64_t last = z.dim() - 1;
    const bool channels_last = packed(z, [=](int64_t k) { return k < axis ? k : k == last ? axis : k + 1; });
    STD_TORCH_CHECK(channels_last, op, ": ", name, " must be contiguous or channels-last");
    shape.rows *= shape.inner;
    shape.inner = 1;
    return shape;
}

CombinatorShape combinator_shape(const char* op, const Tensor& z, const Tensor& u, const Tensor& params) {
    check_same_shape(op, "u", u, z);
    return packed_shape(op, "z", z, params);
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
    params = as_contiguous(params);
    Tensor z_hat = new_like(z);
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
                  Tensor& grad_u, Tensor& grad_params, bool squash_v, const CombinatorShape& shape) {
    const int64_t scratch = ladderfast::cpu::combinator_workspace(shape);
    std::optional<Tensor> workspace;
    if (scratch > 0) workspace = new_packed(z, {scratch});
    const T *gp = (const T*)grad.data_ptr(), *zp = (const T*)z.data_ptr(), *up = (const T*)u.data_ptr(),
            *pp = (const T*)params.data_ptr();
    T *gz = (T*)grad_z.data_ptr(), *gu = (T*)grad_u.data_ptr(), *ws = (T*)pointer(workspace);
    T* out = (T*)grad_params.data_ptr();
    parallel_items(ladderfast::cpu::combinator_backward_items(shape), numel(shape), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::combinator_backward<T>(gp, zp, up, pp, gz, gu, out, ws, squash_v, shape, begin, end);
    });
    parallel_items(ladderfast::cpu::combinator_reduce_items(shape), scratch, [&](int64_t begin, int64_t end) {
        ladderfast::cpu::combinator_reduce<T>(ws, pp, out, shape, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor> combinator_backward_cpu(Tensor grad, Tensor z, Tensor u, Tensor params,
                                                           bool squash_v) {
    const CombinatorShape shape = combinator_shape("combinator_backward", z, u, params);
    check_same_shape("combinator_backward", "grad_z_hat", grad, z);
    grad = laid_out_like(grad, z);
    u = laid_out_like(u, z);
    params = as_contiguous(params);
    Tensor grad_z = new_like(z), grad_u = new_like(z);
    Tensor grad_params = new_like(params);
    const ScalarType dtype = z.scalar_type();
    STD_TORCH_CHECK(params.scalar_type() == dtype, "combinator_backward: params must have the dtype of z on the CPU");
    if (dtype == ScalarType::Float) {
        run_backward<float>(grad, z, u, params, grad_z, grad_u, grad_params, squash_v, shape);
    } else if (dtype == ScalarType::Double) {
        run_backward<double>(grad, z, u, params, grad_z, grad_u, grad_params, squash_v, shape);
    } else {
        STD_TORCH_CHECK(false, "combinator_backward: the CPU kernel takes float32 and float64");
    }
    return {grad_z, grad_u, grad_params};
}

// ladder_encoder

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
        *t = as_contiguous(**t);
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
    state = as_contiguous(*state);
}

// What is computed, and statistics are kept, in.
ScalarType wide_of(const Tensor& t) {
    return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_statistics(const Tensor& z_pre, ScalarType dtype, bool seeds, const LadderEncoderShape& s) {
    return seeds ? new_packed(z_pre, {s.seeds, s.parts, s.channels}, dtype)
                 : new_packed(z_pre, {s.parts, s.channels}, dtype);
}

void check_params_dtype(const char* op, const std::optional<Tensor>& beta, const std::optional<Tensor>& gamma,
                        ScalarType dtype) {
    for (const std::optional<Tensor>* t : {&beta, &gamma})
        STD_TORCH_CHECK(!t->has_value() || (*t)->scalar_type() == dtype, op,
                        ": beta and gamma must have the dtype of z_pre on the CPU, float32 beside bfloat16");
}

template <class S>
void run_encoder(const Tensor& z_pre, const std::optional<Tensor>& beta, const std::optional<Tensor>& gamma,
                 const std::optional<Tensor>& state, bool want_z, bool want_h, Tensor& z, Tensor& h, Tensor& mean,
                 Tensor& var, const LadderEncoderOptions& options, const LadderEncoderShape& shape) {
    namespace cpu = ladderfast::cpu;
    using T = ladderfast::Wide<S>;
    Tensor workspace = new_packed(z_pre, {cpu::ladder_encoder_workspace(shape)}, wide_of(z_pre));
    const cpu::LadderEncoderForward<S> pass{(const S*)z_pre.data_ptr(),
                                            (const T*)pointer(beta),
                                            (const T*)pointer(gamma),
                                            (const int64_t*)pointer(state),
                                            want_z ? (S*)z.data_ptr() : nullptr,
                                            want_h ? (S*)h.data_ptr() : nullptr,
                                            (T*)mean.data_ptr(),
                                            (T*)var.data_ptr(),
                                            (T*)workspace.data_ptr()};
    const int64_t items = cpu::ladder_encoder_items(shape);
    parallel_items(items, numel(shape),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_statistics<S>(pass, shape, begin, end); });
    parallel_items(cpu::ladder_encoder_merge_items(shape), workspace.numel(),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_merge<S>(pass, shape, begin, end); });
    parallel_items(items, numel(shape),
                   [&](int64_t begin, int64_t end) { cpu::ladder_encoder_apply<S>(pass, options, shape, begin, end); });
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
    const ScalarType dtype = z_pre.scalar_type(), wide = wide_of(z_pre);
    check_params_dtype("ladder_encoder", beta, gamma, wide);
    Tensor z = want_z ? new_like(z_pre) : new_packed(z_pre, {0});
    Tensor h = want_h ? new_like(z_pre) : new_packed(z_pre, {0});
    Tensor mean = new_statistics(z_pre, wide, seeds, shape), var = new_statistics(z_pre, wide, seeds, shape);
    if (dtype == ScalarType::Float) {
        run_encoder<float>(z_pre, beta, gamma, state, want_z, want_h, z, h, mean, var, options, shape);
    } else if (dtype == ScalarType::Double) {
        run_encoder<double>(z_pre, beta, gamma, state, want_z, want_h, z, h, mean, var, options, shape);
    } else if (dtype == ScalarType::BFloat16) {
        run_encoder<ladderfast::BFloat16>(z_pre, beta, gamma, state, want_z, want_h, z, h, mean, var, options, shape);
    } else {
        STD_TORCH_CHECK(false, "ladder_encoder: the CPU kernel takes float32, float64 and bfloat16");
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
    mean = as_contiguous(mean);
    var = as_contiguous(var);
    for (std::optional<Tensor>* t : {&grad_mean, &grad_var}) {
        if (!t->has_value()) continue;
        STD_TORCH_CHECK(fits(**t), op, ": grad_mean and grad_var must have the shape and dtype of mean");
        *t = as_contiguous(**t);
    }
}

// What backward allocates: for beta and gamma nothing where there are none.
Tensor empty_or_none(const Tensor& z_pre, const std::optional<Tensor>& t) {
    return t.has_value() ? new_like(*t) : new_packed(z_pre, {0});
}

template <class S>
void run_encoder_backward(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_h,
                          const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_var,
                          const Tensor& z_pre, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& beta,
                          const std::optional<Tensor>& gamma, const std::optional<Tensor>& state, Tensor& grad_x,
                          Tensor& grad_beta, Tensor& grad_gamma, const LadderEncoderOptions& options,
                          const LadderEncoderShape& shape) {
    namespace cpu = ladderfast::cpu;
    using T = ladderfast::Wide<S>;
    Tensor workspace = new_packed(z_pre, {cpu::ladder_encoder_backward_workspace(shape)}, wide_of(z_pre));
    const Tensor reaching = sizeof(S) == sizeof(T) ? grad_x : new_packed(z_pre, {numel(shape)}, wide_of(z_pre));
    const cpu::LadderEncoderBackward<S> pass{(const S*)pointer(grad_z),
                                             (const S*)pointer(grad_h),
                                             (const T*)pointer(grad_mean),
                                             (const T*)pointer(grad_var),
                                             (const S*)z_pre.data_ptr(),
                                             (const T*)mean.data_ptr(),
                                             (const T*)var.data_ptr(),
                                             (const T*)pointer(beta),
                                             (const T*)pointer(gamma),
                                             (const int64_t*)pointer(state),
                                             (S*)grad_x.data_ptr(),
                                             (T*)reaching.data_ptr(),
                                             beta ? (T*)grad_beta.data_ptr() : nullptr,
                                             gamma ? (T*)grad_gamma.data_ptr() : nullptr,
                                             (T*)workspace.data_ptr()};
    const int64_t items = cpu::ladder_encoder_items(shape);
    parallel_items(items, numel(shape), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_backward_sums<S>(pass, options, shape, begin, end);
    });
    parallel_items(cpu::ladder_encoder_reduce_items(shape), workspace.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_reduce<S>(pass, options, shape, begin, end);
    });
    parallel_items(items, numel(shape), [&](int64_t begin, int64_t end) {
        cpu::ladder_encoder_backward_apply<S>(pass, options, shape, begin, end);
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
    check_params_dtype(op, beta, gamma, wide_of(z_pre));
    STD_TORCH_CHECK(mean.scalar_type() == wide_of(z_pre), op,
                    ": mean must have the dtype of z_pre on the CPU, float32 beside bfloat16");
    Tensor grad_x = new_like(z_pre);
    Tensor grad_beta = empty_or_none(z_pre, beta), grad_gamma = empty_or_none(z_pre, gamma);
    if (dtype == ScalarType::Float) {
        run_encoder_backward<float>(grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma, state, grad_x,
                                    grad_beta, grad_gamma, options, shape);
    } else if (dtype == ScalarType::Double) {
        run_encoder_backward<double>(grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma, state, grad_x,
                                     grad_beta, grad_gamma, options, shape);
    } else if (dtype == ScalarType::BFloat16) {
        run_encoder_backward<ladderfast::BFloat16>(grad_z, grad_h, grad_mean, grad_var, z_pre, mean, var, beta, gamma,
                                                   state, grad_x, grad_beta, grad_gamma, options, shape);
    } else {
        STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32, float64 and bfloat16");
    }
    return {grad_x, grad_beta, grad_gamma};
}

// ladder_decoder: arguments that its two ops share, as its kernels take them. u is as z above; z and clean_z are laid
// out as u is. Without clean_z, mean and var are not looked at.
struct DecoderTensors {
    Tensor u, z, params;
    std::optional<Tensor> clean_z, mean, var;
    LadderDecoderShape shape;
    LadderDecoderOptions options;

    DecoderTensors(const char* op, const Tensor& u_, const Tensor& z_, const Tensor& params_,
                   const std::optional<Tensor>& clean_z_, const std::optional<Tensor>& mean_,
                   const std::optional<Tensor>& var_, bool squash_v, double eps)
        : u(u_), z(z_), params(as_contiguous(params_)), options{eps, squash_v} {
        const CombinatorShape s = packed_shape(op, "u", u, params);
        shape = {s.seeds, s.rows, s.channels, s.inner};
        check_same_shape(op, "z", z, u, "u");
        z = laid_out_like(z, u);
        if (!clean_z_.has_value()) return;
        check_same_shape(op, "clean_z", *clean_z_, u, "u");
        clean_z = laid_out_like(*clean_z_, u);
        STD_TORCH_CHECK(mean_.has_value() == var_.has_value(), op, ": mean and var must be given together");
        if (!mean_.has_value()) return;
        mean = of_channels(op, "mean", *mean_);
        var = of_channels(op, "var", *var_);
    }

    // (C) or (S, C): a packed tensor of the statistics' dtype.
    Tensor of_channels(const char* op, const char* name, const Tensor& t) const {
        const bool seeds = params.dim() == 3;
        STD_TORCH_CHECK(t.dim() == params.dim() - 1 && t.size(t.dim() - 1) == shape.channels &&
                            (!seeds || t.size(0) == shape.seeds) && t.scalar_type() == wide() &&
                            t.device() == u.device(),
                        op, ": ", name, " must be one value for each channel, wide and on the device of u");
        return as_contiguous(t);
    }

    // The dtype of statistics and cost.
    ScalarType wide() const { return wide_of(u); }

    Tensor new_wide(std::initializer_list<int64_t> size) const { return new_packed(u, size, wide()); }

    Tensor new_statistics() const {
        return params.dim() == 3 ? new_wide({shape.seeds, shape.channels}) : new_wide({shape.channels});
    }

    // 0-dim or (S); no elements without a cost.
    Tensor new_cost() const {
        return !clean_z.has_value() ? new_wide({0}) : params.dim() == 3 ? new_wide({shape.seeds}) : new_wide({});
    }

    int64_t numel() const { return shape.seeds * shape.rows * shape.channels * shape.inner; }
};

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
    return t.has_value() ? (const T*)t->data_ptr() : nullptr;
}

// Of an output that may have no elements because nobody wants it.
template <class T>
T* wanted_pointer(bool wanted, const Tensor& t) {
    return wanted ? (T*)t.data_ptr() : nullptr;
}

template <class S>
void run_decoder(const DecoderTensors& d, Tensor& z_hat, Tensor& cost, Tensor& u_mean, Tensor& u_var) {
    namespace cpu = ladderfast::cpu;
    using T = ladderfast::Wide<S>;
    const S *u = (const S*)d.u.data_ptr(), *z = (const S*)d.z.data_ptr(), *clean_z = pointer<S>(d.clean_z);
    const T *params = (const T*)d.params.data_ptr(), *mean = pointer<T>(d.mean), *var = pointer<T>(d.var);
    const Tensor scratch = d.new_wide({cpu::ladder_decoder_workspace(d.shape)});
    T* workspace = (T*)scratch.data_ptr();
    S* out = (S*)z_hat.data_ptr();
    T *um = (T*)u_mean.data_ptr(), *uv = (T*)u_var.data_ptr();
    const int64_t items = cpu::ladder_decoder_apply_items(d.shape);
    parallel_items(items, d.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_statistics<S>(u, workspace, d.shape, begin, end);
    });
    parallel_items(cpu::ladder_decoder_reduce_items(d.shape), scratch.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_moments<S>(u, workspace, um, uv, d.shape, begin, end);
    });
    parallel_items(items, d.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_apply<S>(u, z, params, clean_z, mean, var, um, uv, out, workspace, d.options, d.shape,
                                     begin, end);
    });
    if (d.clean_z.has_value()) cpu::ladder_decoder_cost<S>(workspace, (T*)cost.data_ptr(), d.shape, 0, d.shape.seeds);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ladder_decoder_cpu(Tensor u, Tensor z, Tensor params,
                                                              std::optional<Tensor> clean_z, std::optional<Tensor> mean,
                                                              std::optional<Tensor> var, bool squash_v, double eps) {
    const DecoderTensors d("ladder_decoder", u, z, params, clean_z, mean, var, squash_v, eps);
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(params.scalar_type() == d.wide(),
                    "ladder_decoder: params must have the dtype of u on the CPU, float32 beside bfloat16");
    Tensor z_hat = new_like(u), cost = d.new_cost();
    Tensor u_mean = d.new_statistics(), u_var = d.new_statistics();
    if (dtype == ScalarType::Float) {
        run_decoder<float>(d, z_hat, cost, u_mean, u_var);
    } else if (dtype == ScalarType::Double) {
        run_decoder<double>(d, z_hat, cost, u_mean, u_var);
    } else if (dtype == ScalarType::BFloat16) {
        run_decoder<ladderfast::BFloat16>(d, z_hat, cost, u_mean, u_var);
    } else {
        STD_TORCH_CHECK(false, "ladder_decoder: the CPU kernel takes float32, float64 and bfloat16");
    }
    return {z_hat, cost, u_mean, u_var};
}

// Arguments and outputs of ladder_decoder_backward. Outputs that nobody wants have no elements; without a gradient of
// the cost those of clean_z, mean and var are not wanted.
struct DecoderGradients {
    const DecoderTensors d;
    std::optional<Tensor> grad_z_hat, grad_cost;
    Tensor u_mean, u_var;
    bool want_z, want_clean_z, want_statistics;
    Tensor grad_u, grad_z, grad_params, grad_clean_z, grad_mean, grad_var;

    DecoderGradients(const char* op, const std::optional<Tensor>& grad_z_hat_, const std::optional<Tensor>& grad_cost_,
                     DecoderTensors tensors, const Tensor& u_mean_, const Tensor& u_var_, bool z, bool clean_z,
                     bool statistics)
        : d(std::move(tensors)),
          u_mean(d.of_channels(op, "u_mean", u_mean_)),
          u_var(d.of_channels(op, "u_var", u_var_)),
          want_z(z) {
        if (grad_z_hat_.has_value()) {
            check_same_shape(op, "grad_z_hat", *grad_z_hat_, d.u, "u");
            grad_z_hat = laid_out_like(*grad_z_hat_, d.u);
        }
        if (grad_cost_.has_value() && d.clean_z.has_value()) {
            const bool seeds = d.params.dim() == 3;
            STD_TORCH_CHECK(grad_cost_->dim() == (seeds ? 1 : 0) && grad_cost_->numel() == d.shape.seeds &&
                                grad_cost_->scalar_type() == d.wide() && grad_cost_->device() == d.u.device(),
                            op, ": grad_cost must be as the cost");
            grad_cost = as_contiguous(*grad_cost_);
        }
        want_clean_z = clean_z && grad_cost.has_value();
        want_statistics = statistics && grad_cost.has_value() && d.mean.has_value();
        grad_u = new_like(d.u);
        grad_params = new_like(d.params);
        grad_z = want_z ? new_like(d.u) : nothing();
        grad_clean_z = want_clean_z ? new_like(d.u) : nothing();
        grad_mean = want_statistics ? d.new_statistics() : d.new_wide({0});
        grad_var = want_statistics ? d.new_statistics() : d.new_wide({0});
    }

    Tensor nothing() const { return new_packed(d.u, {0}); }

    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
        return {grad_u, grad_z, grad_params, grad_clean_z, grad_mean, grad_var};
    }
};

template <class S>
void run_decoder_backward(const DecoderGradients& g) {
    namespace cpu = ladderfast::cpu;
    using T = ladderfast::Wide<S>;
    const DecoderTensors& d = g.d;
    const S *grad_z_hat = pointer<S>(g.grad_z_hat), *clean_z = pointer<S>(d.clean_z);
    const S *u = (const S*)d.u.data_ptr(), *z = (const S*)d.z.data_ptr();
    const T *grad_cost = pointer<T>(g.grad_cost), *params = (const T*)d.params.data_ptr();
    const T *mean = pointer<T>(d.mean), *var = pointer<T>(d.var);
    const T *um = (const T*)g.u_mean.data_ptr(), *uv = (const T*)g.u_var.data_ptr();
    const Tensor between = sizeof(S) == sizeof(T) ? g.grad_u : d.new_wide({d.numel()});
    T *reaching = (T*)between.data_ptr(), *grad_params = (T*)g.grad_params.data_ptr();
    S* grad_u = (S*)g.grad_u.data_ptr();
    S* grad_z = wanted_pointer<S>(g.want_z, g.grad_z);
    S* grad_clean_z = wanted_pointer<S>(g.want_clean_z, g.grad_clean_z);
    T* grad_mean = wanted_pointer<T>(g.want_statistics, g.grad_mean);
    T* grad_var = wanted_pointer<T>(g.want_statistics, g.grad_var);
    const Tensor scratch = d.new_wide({cpu::ladder_decoder_backward_workspace(d.shape)});
    T* workspace = (T*)scratch.data_ptr();
    const int64_t items = cpu::ladder_decoder_apply_items(d.shape);
    parallel_items(items, d.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_backward_sums<S>(grad_z_hat, grad_cost, u, z, params, clean_z, mean, var, um, uv, reaching,
                                             grad_z, grad_clean_z, workspace, g.want_statistics, d.options, d.shape,
                                             begin, end);
    });
    parallel_items(cpu::ladder_decoder_reduce_items(d.shape), scratch.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_reduce<S>(workspace, params, var, grad_params, grad_mean, grad_var, d.options, d.shape,
                                      begin, end);
    });
    parallel_items(items, d.numel(), [&](int64_t begin, int64_t end) {
        cpu::ladder_decoder_backward_apply<S>(u, um, uv, workspace, reaching, grad_u, d.options, d.shape, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ladder_decoder_backward_cpu(
    std::optional<Tensor> grad_z_hat, std::optional<Tensor> grad_cost, Tensor u, Tensor z, Tensor params,
    std::optional<Tensor> clean_z, std::optional<Tensor> mean, std::optional<Tensor> var, Tensor u_mean, Tensor u_var,
    bool squash_v, double eps, bool want_z, bool want_clean_z, bool want_statistics) {
    const char* op = "ladder_decoder_backward";
    const DecoderGradients g(op, grad_z_hat, grad_cost,
                             DecoderTensors(op, u, z, params, clean_z, mean, var, squash_v, eps), u_mean, u_var, want_z,
                             want_clean_z, want_statistics);
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(params.scalar_type() == g.d.wide(), op,
                    ": params must have the dtype of u on the CPU, float32 beside bfloat16");
    if (dtype == ScalarType::Float) {
        run_decoder_backward<float>(g);
    } else if (dtype == ScalarType::Double) {
        run_decoder_backward<double>(g);
    } else if (dtype == ScalarType::BFloat16) {
        run_decoder_backward<ladderfast::BFloat16>(g);
    } else {
        STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32, float64 and bfloat16");
    }
    return g.outputs();
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
Tensor empty_in_order(const Tensor& like, const int64_t (&size)[n], bool last, ScalarType dtype) {
    using torch::headeronly::MemoryFormat;
    const MemoryFormat format = !last    ? MemoryFormat::Contiguous
                                : n == 4 ? MemoryFormat::ChannelsLast
                                         : MemoryFormat::ChannelsLast3d;
    return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size, n), dtype, std::nullopt, like.device(),
                                std::nullopt, format);
}
template <size_t n>
Tensor empty_in_order(const Tensor& like, const int64_t (&size)[n], bool last) {
    return empty_in_order(like, size, last, like.scalar_type());
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
    Tensor empty_max_where(const Tensor& like, bool positions) const {
        const int64_t size[] = {n, c, h, w};
        return empty_in_order(like, size, last, positions ? ScalarType::Long : ScalarType::Byte);
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
    // That of hard pooling, which has integers.
    Tensor as_max_where(const char* op, const Tensor& t, const Tensor& like) const {
        STD_TORCH_CHECK(t.device() == like.device(), op, ": where must be on the device of the others");
        return as_what(op, "where", t, t);
    }
};

// Whether a hard where has positions in channels, or else numbers of elements in windows.
bool has_positions(const char* op, const Tensor& where) {
    const ScalarType dtype = where.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::Long, op, ": where must be uint8 or int64");
    return dtype == ScalarType::Long;
}

// From what or its gradient, for a z of another size.
Windows windows_for(const char* op, const Tensor& what, int64_t kernel_h, int64_t kernel_w, int64_t height,
                    int64_t width) {
    Windows windows = Windows::of_what(op, what, kernel_h, kernel_w);
    STD_TORCH_CHECK(height / kernel_h == windows.h && width / kernel_w == windows.w, op,
                    ": height and width must be those of a tensor with as many windows");
    windows.shape.height = height;
    windows.shape.width = width;
    return windows;
}

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
    Tensor grad_z = new_like(z);
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
    Tensor grad_what = new_like(what), grad_where = windows.empty_where(what);
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

// Calls f with null pointers to the element types of t and of a hard where.
template <class F>
void dispatch_max_cpu(const char* op, const Tensor& t, bool positions, const F& f) {
    dispatch_cpu(op, t, [&](auto* type) {
        if (positions)
            f(type, static_cast<int64_t*>(nullptr));
        else
            f(type, static_cast<uint8_t*>(nullptr));
    });
}

std::tuple<Tensor, Tensor> where_max_pool2d_cpu(Tensor z, int64_t kernel_h, int64_t kernel_w, bool positions) {
    const char* op = "where_max_pool2d";
    const Windows windows = Windows::of_z(op, z, kernel_h, kernel_w);
    Tensor what = windows.empty_what(z), where = windows.empty_max_where(z, positions);
    dispatch_max_cpu(op, z, positions, [&](auto* type, auto* where_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        const T* zp = (const T*)z.data_ptr();
        T* to_what = (T*)what.data_ptr();
        W* to_where = (W*)where.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::max_pool_forward<T, W>(zp, to_what, to_where, windows.shape, begin, end);
        });
    });
    return {what, where};
}

// what at where, for windows in the order of axes of both.
Tensor put_cpu(const char* op, const Windows& windows, const Tensor& what, const Tensor& where) {
    Tensor z = windows.empty_z(what);
    dispatch_max_cpu(op, what, has_positions(op, where), [&](auto* type, auto* where_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        const T* mp = (const T*)what.data_ptr();
        const W* wp = (const W*)where.data_ptr();
        T* out = (T*)z.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::max_unpool_forward<T, W>(mp, wp, out, windows.shape, begin, end);
        });
    });
    return z;
}

// In the order of axes of where, which is that of what was pooled.
Tensor where_max_pool2d_backward_cpu(Tensor grad_what, Tensor where, int64_t kernel_h, int64_t kernel_w, int64_t height,
                                     int64_t width) {
    const char* op = "where_max_pool2d_backward";
    const Windows windows = windows_for(op, where, kernel_h, kernel_w, height, width);
    grad_what = windows.as_what(op, "grad_what", grad_what, grad_what);
    return put_cpu(op, windows, grad_what, windows.as_max_where(op, where, grad_what));
}

Tensor where_max_unpool2d_cpu(Tensor what, Tensor where, int64_t kernel_h, int64_t kernel_w, int64_t height,
                              int64_t width) {
    const char* op = "where_max_unpool2d";
    const Windows windows = windows_for(op, what, kernel_h, kernel_w, height, width);
    return put_cpu(op, windows, what, windows.as_max_where(op, where, what));
}

Tensor where_max_unpool2d_backward_cpu(Tensor grad_z, Tensor where, int64_t kernel_h, int64_t kernel_w) {
    const char* op = "where_max_unpool2d_backward";
    const Windows windows = Windows::of_z(op, grad_z, kernel_h, kernel_w);
    where = windows.as_max_where(op, where, grad_z);
    Tensor grad_what = windows.empty_what(grad_z);
    dispatch_max_cpu(op, grad_z, has_positions(op, where), [&](auto* type, auto* where_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using W = std::remove_pointer_t<decltype(where_type)>;
        const T* gp = (const T*)grad_z.data_ptr();
        const W* wp = (const W*)where.data_ptr();
        T* out = (T*)grad_what.data_ptr();
        parallel_windows(windows.shape, [&](int64_t begin, int64_t end) {
            ladderfast::cpu::max_unpool_backward<T, W>(gp, wp, out, windows.shape, begin, end);
        });
    });
    return grad_what;
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
    params = as_contiguous(params);
    Tensor z_hat = new_like(z);
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
    params = as_contiguous(params);
    Tensor grad_z = new_like(z), grad_u = new_like(z);
    Tensor grad_params = new_like(params);
    Tensor workspace = new_packed(z, {ladderfast_combinator_workspace_cuda(&shape)}, ScalarType::Byte);
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
    Tensor z = want_z ? new_like(z_pre) : new_packed(z_pre, {0});
    Tensor h = want_h ? new_like(z_pre) : new_packed(z_pre, {0});
    Tensor mean = new_statistics(z_pre, statistics_dtype(z_pre), seeds, shape);
    Tensor var = new_statistics(z_pre, statistics_dtype(z_pre), seeds, shape);
    Tensor workspace = new_packed(z_pre, {ladderfast_ladder_encoder_workspace_cuda(&shape)}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_encoder_forward_cuda(
        z_pre.data_ptr(), pointer(beta), pointer(gamma), (const int64_t*)pointer(state),
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
    Tensor grad_x = new_like(z_pre);
    Tensor grad_beta = empty_or_none(z_pre, beta), grad_gamma = empty_or_none(z_pre, gamma);
    Tensor workspace = new_packed(z_pre, {ladderfast_ladder_encoder_backward_workspace_cuda(&shape)}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_encoder_backward_cuda(
        pointer(grad_z), pointer(grad_h), pointer(grad_mean), pointer(grad_var), z_pre.data_ptr(), mean.data_ptr(),
        var.data_ptr(), pointer(beta), pointer(gamma), (const int64_t*)pointer(state), grad_x.data_ptr(),
        beta ? grad_beta.data_ptr() : nullptr, gamma ? grad_gamma.data_ptr() : nullptr, workspace.data_ptr(),
        dtype_code(op, z_pre.scalar_type()), params_code(op, z_pre, beta, gamma), &options, &shape,
        current_stream(z_pre)));
    return {grad_x, grad_beta, grad_gamma};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ladder_decoder_cuda(Tensor u, Tensor z, Tensor params,
                                                               std::optional<Tensor> clean_z,
                                                               std::optional<Tensor> mean, std::optional<Tensor> var,
                                                               bool squash_v, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    const char* op = "ladder_decoder";
    const DecoderTensors d(op, u, z, params, clean_z, mean, var, squash_v, eps);
    Tensor z_hat = new_like(u), cost = d.new_cost();
    Tensor u_mean = d.new_statistics(), u_var = d.new_statistics();
    const int64_t size = ladderfast_ladder_decoder_workspace_cuda(&d.shape);
    Tensor workspace = new_packed(u, {size}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_decoder_forward_cuda(
        d.u.data_ptr(), d.z.data_ptr(), d.params.data_ptr(), pointer(d.clean_z), pointer(d.mean), pointer(d.var),
        z_hat.data_ptr(), u_mean.data_ptr(), u_var.data_ptr(), d.clean_z.has_value() ? cost.data_ptr() : nullptr,
        workspace.data_ptr(), dtype_code(op, u.scalar_type()), dtype_code(op, params.scalar_type()), &d.options,
        &d.shape, current_stream(u)));
    return {z_hat, cost, u_mean, u_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ladder_decoder_backward_cuda(
    std::optional<Tensor> grad_z_hat, std::optional<Tensor> grad_cost, Tensor u, Tensor z, Tensor params,
    std::optional<Tensor> clean_z, std::optional<Tensor> mean, std::optional<Tensor> var, Tensor u_mean, Tensor u_var,
    bool squash_v, double eps, bool want_z, bool want_clean_z, bool want_statistics) {
    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    const char* op = "ladder_decoder_backward";
    const DecoderGradients g(op, grad_z_hat, grad_cost,
                             DecoderTensors(op, u, z, params, clean_z, mean, var, squash_v, eps), u_mean, u_var, want_z,
                             want_clean_z, want_statistics);
    const int64_t size = ladderfast_ladder_decoder_backward_workspace_cuda(&g.d.shape);
    Tensor workspace = new_packed(u, {size}, ScalarType::Byte);
    STD_CUDA_CHECK((cudaError_t)ladderfast_ladder_decoder_backward_cuda(
        pointer(g.grad_z_hat), pointer(g.grad_cost), g.d.u.data_ptr(), g.d.z.data_ptr(), g.d.params.data_ptr(),
        pointer(g.d.clean_z), pointer(g.d.mean), pointer(g.d.var), g.u_mean.data_ptr(), g.u_var.data_ptr(),
        g.grad_u.data_ptr(), wanted_pointer<void>(g.want_z, g.grad_z),
        wanted_pointer<void>(g.want_clean_z, g.grad_clean_z), g.grad_params.data_ptr(),
        wanted_pointer<void>(g.want_statistics, g.grad_mean), wanted_pointer<void>(g.want_statistics, g.grad_var),
        workspace.data_ptr(), dtype_code(op, u.scalar_type()), dtype_code(op, params.scalar_type()), &g.d.options,
        &g.d.shape, current_stream(u)));
    return g.outputs();
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
    Tensor grad_z = new_like(z);
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
    Tensor grad_what = new_like(what), grad_where = windows.empty_where(what);
    STD_CUDA_CHECK((cudaError_t)ladderfast_soft_unpool_backward_cuda(
        grad_z.data_ptr(), what.data_ptr(), where.data_ptr(), grad_what.data_ptr(), grad_where.data_ptr(),
        dtype_code(op, what.scalar_type()), &windows.shape, current_stream(what)));
    return {grad_what, grad_where};
}

std::tuple<Tensor, Tensor> where_max_pool2d_cuda(Tensor z, int64_t kernel_h, int64_t kernel_w, bool positions) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const char* op = "where_max_pool2d";
    const Windows windows = Windows::of_z(op, z, kernel_h, kernel_w);
    Tensor what = windows.empty_what(z), where = windows.empty_max_where(z, positions);
    STD_CUDA_CHECK((cudaError_t)ladderfast_max_pool_forward_cuda(z.data_ptr(), what.data_ptr(), where.data_ptr(),
                                                                 positions, dtype_code(op, z.scalar_type()),
                                                                 &windows.shape, current_stream(z)));
    return {what, where};
}

Tensor put_cuda(const char* op, const Windows& windows, const Tensor& what, const Tensor& where) {
    Tensor z = windows.empty_z(what);
    STD_CUDA_CHECK((cudaError_t)ladderfast_max_unpool_forward_cuda(
        what.data_ptr(), where.data_ptr(), z.data_ptr(), has_positions(op, where), dtype_code(op, what.scalar_type()),
        &windows.shape, current_stream(what)));
    return z;
}

Tensor where_max_pool2d_backward_cuda(Tensor grad_what, Tensor where, int64_t kernel_h, int64_t kernel_w,
                                      int64_t height, int64_t width) {
    const torch::stable::accelerator::DeviceGuard guard(grad_what.get_device_index());
    const char* op = "where_max_pool2d_backward";
    const Windows windows = windows_for(op, where, kernel_h, kernel_w, height, width);
    grad_what = windows.as_what(op, "grad_what", grad_what, grad_what);
    return put_cuda(op, windows, grad_what, windows.as_max_where(op, where, grad_what));
}

Tensor where_max_unpool2d_cuda(Tensor what, Tensor where, int64_t kernel_h, int64_t kernel_w, int64_t height,
                               int64_t width) {
    const torch::stable::accelerator::DeviceGuard guard(what.get_device_index());
    const char* op = "where_max_unpool2d";
    const Windows windows = windows_for(op, what, kernel_h, kernel_w, height, width);
    return put_cuda(op, windows, what, windows.as_max_where(op, where, what));
}

Tensor where_max_unpool2d_backward_cuda(Tensor grad_z, Tensor where, int64_t kernel_h, int64_t kernel_w) {
    const torch::stable::accelerator::DeviceGuard guard(grad_z.get_device_index());
    const char* op = "where_max_unpool2d_backward";
    const Windows windows = Windows::of_z(op, grad_z, kernel_h, kernel_w);
    where = windows.as_max_where(op, where, grad_z);
    Tensor grad_what = windows.empty_what(grad_z);
    STD_CUDA_CHECK((cudaError_t)ladderfast_max_unpool_backward_cuda(
        grad_z.data_ptr(), where.data_ptr(), grad_what.data_ptr(), has_positions(op, where),
        dtype_code(op, grad_z.scalar_type()), &windows.shape, current_stream(grad_z)));
    return grad_what;
}

#endif

// tagger

// t itself if neighbours along its last axis are neighbours in memory, else a copy of which that is true.
Tensor unit_stride(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    return t.size(last) <= 1 || t.stride(last) == 1 ? t : as_contiguous(t);
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
        scalar = as_contiguous(*scalar_);
        shape.seeds = scalar.numel();
        STD_TORCH_CHECK(scalar.dim() <= 1 && (shape.seeds > 0 ? shape.rows % shape.seeds == 0 : shape.rows == 0), op,
                        ": the scalar must be () or (S,), with S a divisor of N");
        STD_TORCH_CHECK(scalar.device() == z.device(), op, ": the scalar must be on the device of z");
        in.scalar = scalar.data_ptr();
    }

    int64_t elements() const { return shape.rows * shape.groups * shape.pixels; }
    Tensor like_pixels() const { return new_packed(z, {shape.rows, shape.pixels}); }
    Tensor like_groups() const { return new_packed(z, {shape.rows, shape.groups, shape.pixels}); }
    // Of x; empty where nobody wants it.
    Tensor gradient_of_x(bool want_x) const { return want_x ? like_pixels() : new_packed(z, {0}); }

    // A gradient of the shape of z or, with two axes, of x.
    Tensor gradient(const char* op, const char* name, const Tensor& grad, int64_t axes) const {
        check_same_shape(op, name, grad, axes == 3 ? z : x);
        return unit_stride(grad);
    }
};

template <class F>
void tagger_cpu_dispatch(const char* op, const TaggerCall& call, const F& f) {
    STD_TORCH_CHECK(call.in.scalar == nullptr || call.scalar.scalar_type() == call.z.scalar_type(), op,
                    ": the scalar must have the dtype of z on the CPU");
    dispatch_cpu(op, call.z, f);
}

std::tuple<Tensor, Tensor> tagger_inputs_cpu(const char* op, bool gaussian, const TaggerCall& call) {
    Tensor dz = call.like_groups(), likelihood = call.like_groups();
    tagger_cpu_dispatch(op, call, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T *dzp = (T*)dz.data_ptr(), *lp = (T*)likelihood.data_ptr();
        parallel_items(ladderfast::cpu::tagger_items(call.shape), call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_inputs<T>(gaussian, call.in, dzp, lp, call.shape, begin, end);
        });
    });
    return {dz, likelihood};
}

Tensor tagger_nll_cpu(const char* op, bool gaussian, const TaggerCall& call) {
    Tensor nll = call.like_pixels();
    tagger_cpu_dispatch(op, call, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
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
                                    const Tensor* grad_b, bool want_x) {
    const Tensor a = call.gradient(op, "grad", grad_a, grad_b == nullptr ? 2 : 3);
    const Tensor b = grad_b == nullptr ? a : call.gradient(op, "grad_likelihood", *grad_b, 3);
    const TaggerInput ga = tagger_input(a), gb = tagger_input(b);
    TaggerGradients out{call.gradient_of_x(want_x), call.like_groups(), call.like_groups(), Tensor()};
    const int64_t items = ladderfast::cpu::tagger_items(call.shape);
    std::vector<double> partials(gaussian ? items : 0);
    if (gaussian) out.scalar = new_like(call.scalar);
    tagger_cpu_dispatch(op, call, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T *gx = want_x ? (T*)out.x.data_ptr() : nullptr, *gz = (T*)out.z.data_ptr(), *gm = (T*)out.m.data_ptr();
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
                                     const Tensor* grad_b, bool want_x) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    const Tensor a = call.gradient(op, "grad", grad_a, grad_b == nullptr ? 2 : 3);
    const Tensor b = grad_b == nullptr ? a : call.gradient(op, "grad_likelihood", *grad_b, 3);
    const TaggerInput ga = tagger_input(a), gb = tagger_input(b);
    TaggerGradients out{call.gradient_of_x(want_x), call.like_groups(), call.like_groups(), Tensor()};
    Tensor workspace;
    void *scalar = nullptr, *scratch = nullptr;
    if (gaussian) {
        out.scalar = new_like(call.scalar);
        workspace = new_packed(call.z, {ladderfast_tagger_workspace_cuda(&call.shape)}, ScalarType::Byte);
        scalar = out.scalar.data_ptr();
        scratch = workspace.data_ptr();
    }
    void *gx = want_x ? out.x.data_ptr() : nullptr, *gz = out.z.data_ptr(), *gm = out.m.data_ptr();
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
                                                                               Tensor variance, bool want_x) {
        const char* op = "gaussian_group_inputs_backward";
        const TaggerGradients g =
            backward(op, true, TaggerCall(op, x, z, m, &variance), grad_dz, &grad_likelihood, want_x);
        return {g.x, g.z, g.m, g.scalar};
    }
    static std::tuple<Tensor, Tensor, Tensor> bernoulli_inputs_backward(Tensor grad_dz, Tensor grad_likelihood,
                                                                        Tensor x, Tensor z, Tensor m, Tensor flip_prob,
                                                                        bool want_x) {
        const char* op = "bernoulli_group_inputs_backward";
        const TaggerGradients g =
            backward(op, false, TaggerCall(op, x, z, m, &flip_prob), grad_dz, &grad_likelihood, want_x);
        return {g.x, g.z, g.m};
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m,
                                                                            Tensor variance, bool want_x) {
        const char* op = "gaussian_mixture_nll_backward";
        const TaggerGradients g = backward(op, true, TaggerCall(op, x, z, m, &variance), grad, nullptr, want_x);
        return {g.x, g.z, g.m, g.scalar};
    }
    static std::tuple<Tensor, Tensor, Tensor> bernoulli_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m,
                                                                     bool want_x) {
        const char* op = "bernoulli_mixture_nll_backward";
        const TaggerGradients g = backward(op, false, TaggerCall(op, x, z, m, nullptr), grad, nullptr, want_x);
        return {g.x, g.z, g.m};
    }
};

using TaggerCpu = TaggerOps<tagger_inputs_cpu, tagger_nll_cpu, tagger_backward_cpu>;

// tagger_step

// The gradient of what the network reads, (N K, 4 D).
struct TaggerStepGrad {
    Tensor grad;
    TaggerInput view;

    TaggerStepGrad(const char* op, const TaggerCall& call, const Tensor& grad_) {
        const TaggerShape& s = call.shape;
        STD_TORCH_CHECK(grad_.dim() == 2 && grad_.size(0) == s.rows * s.groups && grad_.size(1) == 4 * s.pixels &&
                            grad_.scalar_type() == call.z.scalar_type() && grad_.device() == call.z.device(),
                        op, ": grad must be (N K, 4 D) with the dtype and device of z");
        grad = unit_stride(grad_);
        view = {grad.data_ptr(), grad.stride(0) * s.groups, grad.stride(0)};
    }
};

void check_tagger_groups(const char* op, const TaggerShape& shape) {
    STD_TORCH_CHECK(shape.groups <= ladderfast::cpu::kTaggerGroups, op, ": z must have at most 64 groups on the CPU");
}

Tensor tagger_step_inputs_cpu(const char* op, bool gaussian, const TaggerCall& call) {
    const TaggerShape& s = call.shape;
    check_tagger_groups(op, s);
    Tensor out = new_packed(call.z, {s.rows * s.groups, 4 * s.pixels});
    tagger_cpu_dispatch(op, call, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = (T*)out.data_ptr();
        parallel_items(ladderfast::cpu::tagger_items(s), 2 * call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_step_inputs<T>(gaussian, call.in, to, s, begin, end);
        });
    });
    return out;
}

TaggerGradients tagger_step_inputs_backward_cpu(const char* op, bool gaussian, const TaggerCall& call,
                                                const Tensor& grad, bool want_x) {
    const TaggerShape& s = call.shape;
    check_tagger_groups(op, s);
    const TaggerStepGrad g(op, call, grad);
    TaggerGradients out{call.gradient_of_x(want_x), call.like_groups(), call.like_groups(), Tensor()};
    const int64_t items = ladderfast::cpu::tagger_items(s);
    std::vector<double> partials(gaussian ? items : 0);
    if (gaussian) out.scalar = new_like(call.scalar);
    tagger_cpu_dispatch(op, call, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T *gx = want_x ? (T*)out.x.data_ptr() : nullptr, *gz = (T*)out.z.data_ptr(), *gl = (T*)out.m.data_ptr();
        parallel_items(items, 2 * call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_step_inputs_backward<T>(gaussian, g.view, call.in, gx, gz, gl, partials.data(), s,
                                                            begin, end);
        });
        if (gaussian)
            ladderfast::cpu::tagger_sum<T>(partials.data(), (const T*)call.in.scalar, (T*)out.scalar.data_ptr(), s);
    });
    return out;
}

// The arguments of the outputs. variance is null for Bernoulli.
struct TaggerOutputsCall {
    Tensor x, z, m, c1, b1, c2, variance;
    TaggerShape shape;
    TaggerOutputs in;

    TaggerOutputsCall(const char* op, const Tensor& x_, const Tensor& z_, const Tensor& m_, const Tensor& c1_,
                      const Tensor& b1_, const Tensor& c2_, const Tensor* variance_)
        : x(unit_stride(x_)),
          z(even_stride(z_)),
          m(even_stride(m_)),
          c1(as_contiguous(c1_)),
          b1(as_contiguous(b1_)),
          c2(as_contiguous(c2_)) {
        STD_TORCH_CHECK(z.dim() == 3 && z.size(1) > 0, op, ": z must be (N, K, D) with at least one group");
        check_same_shape(op, "m", m, z);
        STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == z.size(0) && x.size(1) == z.size(2) &&
                            x.scalar_type() == z.scalar_type() && x.device() == z.device(),
                        op, ": x must be (N, D), with the dtype and device of z");
        shape = {z.size(0), z.size(1), z.size(2), c2.numel()};
        STD_TORCH_CHECK(c2.dim() <= 1 && (shape.seeds > 0 ? shape.rows % shape.seeds == 0 : shape.rows == 0), op,
                        ": c2 must be () or (S,), with S a divisor of N");
        for (const Tensor& t : {c1, b1})
            STD_TORCH_CHECK(t.dim() == 1 + c2.dim() && t.numel() == shape.seeds * shape.pixels &&
                                t.size(t.dim() - 1) == shape.pixels,
                            op, ": c1 and b1 must be (D) or (S, D)");
        for (const Tensor& t : {c1, b1, c2})
            STD_TORCH_CHECK(t.scalar_type() == z.scalar_type() && t.device() == z.device(), op,
                            ": c1, b1 and c2 must have the dtype and device of z");
        in = {tagger_input(x), even_input(z), even_input(m), c1.data_ptr(), b1.data_ptr(), c2.data_ptr(), nullptr};
        if (variance_ == nullptr) return;
        variance = as_contiguous(*variance_);
        STD_TORCH_CHECK(
            variance.numel() == shape.seeds && variance.dim() == c2.dim() && variance.device() == z.device(), op,
            ": variance must have the shape and device of c2");
        in.variance = variance.data_ptr();
    }

    int64_t elements() const { return 2 * shape.rows * shape.groups * shape.pixels; }
    Tensor like_pixels() const { return new_packed(z, {shape.rows, shape.pixels}); }
    Tensor like_groups() const { return new_packed(z, {shape.rows, shape.groups, shape.pixels}); }

    ScalarType wide() const { return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

    // With one stride from group to group and from row to row.
    static Tensor even_stride(const Tensor& t) {
        const bool even = t.dim() == 3 && (t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == t.size(1) * t.stride(1));
        return even ? unit_stride(t) : as_contiguous(t);
    }
    // Of a single group, whose own stride may be anything, that of the rows.
    static TaggerInput even_input(const Tensor& t) {
        TaggerInput in = tagger_input(t);
        if (t.size(1) == 1) in.group = in.row;
        return in;
    }
};

using TaggerOutputsResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_tagger_outputs_cpu(const char* op, const TaggerOutputsCall& call) {
    check_tagger_groups(op, call.shape);
    STD_TORCH_CHECK(call.in.variance == nullptr || call.variance.scalar_type() == call.z.scalar_type(), op,
                    ": variance must have the dtype of z on the CPU");
}

TaggerOutputsResults tagger_step_outputs_cpu(const char* op, bool gaussian, const TaggerOutputsCall& call, double eps) {
    const TaggerShape& s = call.shape;
    check_tagger_outputs_cpu(op, call);
    Tensor z = call.like_groups(), logits = call.like_groups(), nll = call.like_pixels();
    Tensor stats = new_packed(call.z, {s.seeds, 4, s.pixels}, call.wide());
    dispatch_cpu(op, call.z, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T *to_z = (T*)z.data_ptr(), *to_l = (T*)logits.data_ptr(), *to_n = (T*)nll.data_ptr();
        T* to_stats = (T*)stats.data_ptr();
        parallel_items(ladderfast::cpu::tagger_outputs_items(s), call.elements(), [&](int64_t begin, int64_t end) {
            ladderfast::cpu::tagger_step_outputs<T>(gaussian, call.in, to_z, to_l, to_n, to_stats, eps, s, begin, end);
        });
    });
    return {z, logits, nll, stats};
}

// Gradients of x, z, m, c1, b1, c2 and, for Gaussian, variance.
struct TaggerOutputsGrads {
    Tensor x, z, m, c1, b1, c2, variance;
};

// The gradients that come in, and what forward has kept.
struct TaggerOutputsBackward {
    Tensor z, logits, nll, stats;
    TaggerInput z_view, logits_view, nll_view;

    TaggerOutputsBackward(const char* op, const TaggerOutputsCall& call, const Tensor& grad_z,
                          const Tensor& grad_logits, const Tensor& grad_nll, const Tensor& stats_) {
        check_same_shape(op, "grad_z", grad_z, call.z);
        check_same_shape(op, "grad_logits", grad_logits, call.z);
        check_same_shape(op, "grad_nll", grad_nll, call.x, "x");
        STD_TORCH_CHECK(stats_.numel() == 4 * call.shape.seeds * call.shape.pixels &&
                            stats_.scalar_type() == call.wide() && stats_.device() == call.z.device(),
                        op, ": stats does not fit z");
        z = unit_stride(grad_z);
        logits = unit_stride(grad_logits);
        nll = unit_stride(grad_nll);
        stats = as_contiguous(stats_);
        z_view = tagger_input(z);
        logits_view = tagger_input(logits);
        nll_view = tagger_input(nll);
    }
};

TaggerOutputsGrads like_arguments(bool gaussian, const TaggerOutputsCall& call, bool want_x) {
    return {want_x ? call.like_pixels() : new_packed(call.z, {0}),
            call.like_groups(),
            call.like_groups(),
            new_like(call.c1),
            new_like(call.b1),
            new_like(call.c2),
            gaussian ? new_like(call.variance) : Tensor()};
}

TaggerOutputsGrads tagger_step_outputs_backward_cpu(const char* op, bool gaussian, const TaggerOutputsCall& call,
                                                    const TaggerOutputsBackward& from, bool want_x) {
    const TaggerShape& s = call.shape;
    check_tagger_outputs_cpu(op, call);
    const TaggerOutputsGrads out = like_arguments(gaussian, call, want_x);
    const int64_t items = ladderfast::cpu::tagger_outputs_items(s);
    std::vector<double> of_c2(items), of_variance(gaussian ? items : 0);
    dispatch_cpu(op, call.z, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const TaggerOutputsGradients<T> grad = {from.z_view,
                                                from.logits_view,
                                                from.nll_view,
                                                (const T*)from.stats.data_ptr(),
                                                want_x ? (T*)out.x.data_ptr() : nullptr,
                                                (T*)out.z.data_ptr(),
                                                (T*)out.m.data_ptr(),
                                                (T*)out.c1.data_ptr(),
                                                (T*)out.b1.data_ptr(),
                                                of_c2.data(),
                                                of_variance.data()};
        parallel_items_with_scratch<T>(call.z, ladderfast::cpu::tagger_outputs_scratch<T>(call.in, s), items,
                                       call.elements(), [&](int64_t begin, int64_t end, T* scratch) {
                                           ladderfast::cpu::tagger_step_outputs_backward<T>(gaussian, call.in, grad,
                                                                                            scratch, s, begin, end);
                                       });
        // In the order of the items.
        const auto sum_of_seed = [&](const std::vector<double>& parts, int64_t seed) {
            const int64_t per_seed = (int64_t)parts.size() / s.seeds;
            double sum = 0;
            for (int64_t i = seed * per_seed; i < (seed + 1) * per_seed; ++i) sum += parts[i];
            return sum;
        };
        for (int64_t seed = 0; seed < s.seeds; ++seed) {
            ((T*)out.c2.data_ptr())[seed] = (T)sum_of_seed(of_c2, seed);
            if (gaussian)
                ((T*)out.variance.data_ptr())[seed] =
                    (T)(sum_of_seed(of_variance, seed) / (2.0 * ((const T*)call.in.variance)[seed]));
        }
    });
    return out;
}

#ifdef LADDERFAST_WITH_CUDA

Tensor tagger_step_inputs_cuda(const char* op, bool gaussian, const TaggerCall& call) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    const TaggerShape& s = call.shape;
    Tensor out = new_packed(call.z, {s.rows * s.groups, 4 * s.pixels});
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_step_inputs_cuda(gaussian, &call.in, out.data_ptr(), to.dtype,
                                                                   to.scalar_dtype, &s, to.stream));
    return out;
}

TaggerGradients tagger_step_inputs_backward_cuda(const char* op, bool gaussian, const TaggerCall& call,
                                                 const Tensor& grad, bool want_x) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerLaunch to(op, call);
    const TaggerStepGrad g(op, call, grad);
    TaggerGradients out{call.gradient_of_x(want_x), call.like_groups(), call.like_groups(), Tensor()};
    Tensor workspace;
    void *scalar = nullptr, *scratch = nullptr;
    if (gaussian) {
        out.scalar = new_like(call.scalar);
        workspace = new_packed(call.z, {ladderfast_tagger_workspace_cuda(&call.shape)}, ScalarType::Byte);
        scalar = out.scalar.data_ptr();
        scratch = workspace.data_ptr();
    }
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_step_inputs_backward_cuda(
        gaussian, &g.view, &call.in, want_x ? out.x.data_ptr() : nullptr, out.z.data_ptr(), out.m.data_ptr(), scalar,
        scratch, to.dtype, to.scalar_dtype, &call.shape, to.stream));
    return out;
}

int tagger_variance_code(const char* op, const TaggerOutputsCall& call) {
    return dtype_code(op, call.in.variance == nullptr ? call.z.scalar_type() : call.variance.scalar_type());
}

Tensor tagger_outputs_scratch(const TaggerOutputsCall& call) {
    return new_packed(call.z, {ladderfast_tagger_step_outputs_workspace_cuda(&call.shape)}, ScalarType::Byte);
}

TaggerOutputsResults tagger_step_outputs_cuda(const char* op, bool gaussian, const TaggerOutputsCall& call,
                                              double eps) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerShape& s = call.shape;
    Tensor z = call.like_groups(), logits = call.like_groups(), nll = call.like_pixels();
    Tensor stats = new_packed(call.z, {s.seeds, 4, s.pixels}, call.wide());
    Tensor workspace = tagger_outputs_scratch(call);
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_step_outputs_cuda(
        gaussian, &call.in, z.data_ptr(), logits.data_ptr(), nll.data_ptr(), stats.data_ptr(), workspace.data_ptr(),
        eps, dtype_code(op, call.z.scalar_type()), tagger_variance_code(op, call), &s, current_stream(call.z)));
    return {z, logits, nll, stats};
}

TaggerOutputsGrads tagger_step_outputs_backward_cuda(const char* op, bool gaussian, const TaggerOutputsCall& call,
                                                     const TaggerOutputsBackward& from, bool want_x) {
    const torch::stable::accelerator::DeviceGuard guard(call.z.get_device_index());
    const TaggerOutputsGrads out = like_arguments(gaussian, call, want_x);
    Tensor workspace = tagger_outputs_scratch(call);
    STD_CUDA_CHECK((cudaError_t)ladderfast_tagger_step_outputs_backward_cuda(
        gaussian, &call.in, &from.z_view, &from.logits_view, &from.nll_view, from.stats.data_ptr(),
        want_x ? out.x.data_ptr() : nullptr, out.z.data_ptr(), out.m.data_ptr(), out.c1.data_ptr(), out.b1.data_ptr(),
        out.c2.data_ptr(), gaussian ? out.variance.data_ptr() : nullptr, workspace.data_ptr(),
        dtype_code(op, call.z.scalar_type()), tagger_variance_code(op, call), &call.shape, current_stream(call.z)));
    return out;
}

#endif

// The ops of one device: its four functions above.
template <auto inputs, auto inputs_backward, auto outputs, auto outputs_backward>
struct TaggerStepOps {
    static Tensor gaussian_inputs(Tensor x, Tensor z, Tensor logits, Tensor variance) {
        const char* op = "gaussian_step_inputs";
        return inputs(op, true, TaggerCall(op, x, z, logits, &variance));
    }
    static Tensor bernoulli_inputs(Tensor x, Tensor z, Tensor logits, Tensor flip_prob) {
        const char* op = "bernoulli_step_inputs";
        return inputs(op, false, TaggerCall(op, x, z, logits, &flip_prob));
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_inputs_backward(Tensor grad, Tensor x, Tensor z,
                                                                               Tensor logits, Tensor variance,
                                                                               bool want_x) {
        const char* op = "gaussian_step_inputs_backward";
        const auto g = inputs_backward(op, true, TaggerCall(op, x, z, logits, &variance), grad, want_x);
        return {g.x, g.z, g.m, g.scalar};
    }
    static std::tuple<Tensor, Tensor, Tensor> bernoulli_inputs_backward(Tensor grad, Tensor x, Tensor z, Tensor logits,
                                                                        Tensor flip_prob, bool want_x) {
        const char* op = "bernoulli_step_inputs_backward";
        const auto g = inputs_backward(op, false, TaggerCall(op, x, z, logits, &flip_prob), grad, want_x);
        return {g.x, g.z, g.m};
    }
    static TaggerOutputsResults gaussian_outputs(Tensor x, Tensor z, Tensor m, Tensor c1, Tensor b1, Tensor c2,
                                                 Tensor variance, double eps) {
        const char* op = "gaussian_step_outputs";
        return outputs(op, true, TaggerOutputsCall(op, x, z, m, c1, b1, c2, &variance), eps);
    }
    static TaggerOutputsResults bernoulli_outputs(Tensor x, Tensor z, Tensor m, Tensor c1, Tensor b1, Tensor c2,
                                                  double eps) {
        const char* op = "bernoulli_step_outputs";
        return outputs(op, false, TaggerOutputsCall(op, x, z, m, c1, b1, c2, nullptr), eps);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_outputs_backward(
        Tensor grad_z, Tensor grad_logits, Tensor grad_nll, Tensor x, Tensor z, Tensor m, Tensor c1, Tensor b1,
        Tensor c2, Tensor variance, Tensor stats, bool want_x) {
        const char* op = "gaussian_step_outputs_backward";
        const TaggerOutputsCall call(op, x, z, m, c1, b1, c2, &variance);
        const TaggerOutputsBackward from(op, call, grad_z, grad_logits, grad_nll, stats);
        const auto g = outputs_backward(op, true, call, from, want_x);
        return {g.x, g.z, g.m, g.c1, g.b1, g.c2, g.variance};
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bernoulli_outputs_backward(
        Tensor grad_z, Tensor grad_logits, Tensor grad_nll, Tensor x, Tensor z, Tensor m, Tensor c1, Tensor b1,
        Tensor c2, Tensor stats, bool want_x) {
        const char* op = "bernoulli_step_outputs_backward";
        const TaggerOutputsCall call(op, x, z, m, c1, b1, c2, nullptr);
        const TaggerOutputsBackward from(op, call, grad_z, grad_logits, grad_nll, stats);
        const auto g = outputs_backward(op, false, call, from, want_x);
        return {g.x, g.z, g.m, g.c1, g.b1, g.c2};
    }
};

using TaggerStepCpu = TaggerStepOps<tagger_step_inputs_cpu, tagger_step_inputs_backward_cpu, tagger_step_outputs_cpu,
                                    tagger_step_outputs_backward_cpu>;

// The arguments of an ln_convlstm pass, laid out alike: gates (N, 4C, *) and cells (N, C, *) with vectors (4C), or with
// an axis of seeds in front of each.
struct LnConvLstmArguments {
    const char* op;
    int64_t axis;  // of the channels
    LnConvLstmShape shape;
    Tensor x, rec, c, bias;
    std::optional<Tensor> y, weight, weight_y, cell_weight, cell_bias;

    LnConvLstmArguments(const char* op, Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c,
                        std::optional<Tensor> weight, std::optional<Tensor> weight_y, Tensor bias,
                        std::optional<Tensor> cell_weight, std::optional<Tensor> cell_bias, bool batch)
        : op(op), axis(bias.dim()), x(x), rec(rec), c(c), bias(bias), y(y), weight(weight), weight_y(weight_y) {
        STD_TORCH_CHECK(axis == 1 || axis == 2, op, ": bias must be (4C) or (S, 4C)");
        STD_TORCH_CHECK(x.dim() > axis && c.dim() == x.dim() && bias.size(axis - 1) == x.size(axis) &&
                            x.size(axis) == 4 * c.size(axis) && (axis == 1 || bias.size(0) == x.size(0)),
                        op, ": the shapes of x, c and bias do not fit");
        STD_TORCH_CHECK(y.has_value() == weight_y.has_value() && (weight.has_value() || !y.has_value()), op,
                        ": a second input needs weights for both");
        check_like("rec", rec, x);
        check_cells("c", c);
        if (y.has_value()) check_like("y", *y, x);
        for (const auto& w : {weight, weight_y})
            if (w.has_value()) check_like("weight", *w, bias);
        STD_TORCH_CHECK(bias.device() == x.device(), op, ": bias must be on the device of x");
        STD_TORCH_CHECK(cell_weight.has_value() == cell_bias.has_value(), op, ": the cell needs a weight and a bias");
        for (const auto& v : {cell_weight, cell_bias})
            STD_TORCH_CHECK(!v.has_value() || (v->dim() == axis && v->size(axis - 1) == c.size(axis) &&
                                               (axis == 1 || v->size(0) == x.size(0)) &&
                                               v->scalar_type() == bias.scalar_type() && v->device() == x.device()),
                            op, ": cell_weight and cell_bias must fit bias, with C for 4C");

        shape = {
            axis == 2 ? x.size(0) : 1,   x.size(axis - 1),       c.size(axis), 1, weight.has_value() + y.has_value(), 0,
            batch && weight.has_value(), cell_weight.has_value()};
        for (int64_t k = axis + 1; k < x.dim(); ++k) shape.positions *= x.size(k);
        if (!packed(x, [](int64_t k) { return k; })) {
            STD_TORCH_CHECK(is_channels_last(x), op, ": x must be contiguous or channels-last");
            shape.channels_last = 1;
        }
        this->rec = laid_out_like(rec, x);
        if (y.has_value()) this->y = laid_out_like(*y, x);
        this->c = cells(c);
        this->bias = as_contiguous(bias);
        if (weight.has_value()) this->weight = as_contiguous(*weight);
        if (weight_y.has_value()) this->weight_y = as_contiguous(*weight_y);
        if (cell_weight.has_value()) this->cell_weight = as_contiguous(*cell_weight);
        if (cell_bias.has_value()) this->cell_bias = as_contiguous(*cell_bias);
    }

    void check_like(const char* name, const Tensor& t, const Tensor& other) const {
        bool same = t.dim() == other.dim();
        for (int64_t k = 0; same && k < t.dim(); ++k) same = t.size(k) == other.size(k);
        STD_TORCH_CHECK(same && t.scalar_type() == other.scalar_type() && t.device() == other.device(), op, ": ", name,
                        " does not fit the others");
    }

    void check_cells(const char* name, const Tensor& t) const {
        bool same = t.dim() == x.dim();
        for (int64_t k = 0; same && k < t.dim(); ++k) same = t.size(k) == (k == axis ? x.size(k) / 4 : x.size(k));
        STD_TORCH_CHECK(same && t.scalar_type() == x.scalar_type() && t.device() == x.device(), op, ": ", name,
                        " does not fit x");
    }

    bool is_channels_last(const Tensor& t) const {
        const int64_t last = t.dim() - 1, channel = axis;
        return packed(t, [=](int64_t k) { return k < channel ? k : k == last ? channel : k + 1; });
    }

    Tensor empty_cells() const {
        if (!shape.channels_last) return new_packed(x, c.sizes());
        // The order of the axes of a part of x, packed.
        Tensor of_x = x;
        return new_like(torch::stable::narrow(of_x, axis, 0, shape.channels));
    }

    // t itself if it lies in memory as x does, else a copy that does.
    Tensor cells(const Tensor& t) const {
        if (!shape.channels_last) return as_contiguous(t);
        if (is_channels_last(t)) return t;
        Tensor copy = empty_cells();
        torch::stable::copy_(copy, t);
        return copy;
    }

    template <class T>
    LnConvLstmInputs<T> pointers() const {
        const auto of = [](const std::optional<Tensor>& t) {
            return t.has_value() ? (const T*)t->data_ptr() : nullptr;
        };
        return {{(const T*)x.data_ptr(), of(y)},
                (const T*)rec.data_ptr(),
                (const T*)c.data_ptr(),
                {of(weight), of(weight_y)},
                (const T*)bias.data_ptr(),
                of(cell_weight),
                of(cell_bias)};
    }

    int64_t elements() const { return shape.seeds * shape.samples * 4 * shape.channels * shape.positions; }
    Tensor none() const { return new_packed(x, {0}); }
    Tensor like(const std::optional<Tensor>& t) const { return t.has_value() ? new_like(*t) : none(); }
    ScalarType stats_dtype() const {
        return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    }
    Tensor new_stats() const {
        if (shape.batch) return new_packed(x, {shape.seeds, shape.inputs, 3, 4 * shape.channels}, stats_dtype());
        return new_packed(x, {shape.seeds, shape.samples, shape.inputs, 2}, stats_dtype());
    }
    Tensor new_cell_stats() const {
        return new_packed(x, {shape.seeds, shape.cell ? shape.samples : 0, 2}, stats_dtype());
    }
};

// h, c, the statistics and those of the cell, which are none where it is not normalised.
struct LnConvLstmForward {
    Tensor h, c_new, stats, cell_stats;

    explicit LnConvLstmForward(const LnConvLstmArguments& args)
        : h(args.empty_cells()),
          c_new(args.empty_cells()),
          stats(args.new_stats()),
          cell_stats(args.new_cell_stats()) {}

    template <class T>
    LnConvLstmOutputs<T> pointers() const {
        return {(T*)h.data_ptr(), (T*)c_new.data_ptr(), (T*)stats.data_ptr(), (T*)cell_stats.data_ptr()};
    }
};

using LnConvLstmResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Doubles for passes that leave each other sums.
Tensor ln_convlstm_split(const LnConvLstmArguments& args) {
    return new_packed(args.x, {ladderfast::cpu::ln_convlstm_split_workspace(args.shape)}, ScalarType::Double);
}

template <class T>
void run_ln_convlstm(const LnConvLstmArguments& args, const LnConvLstmForward& results, double eps) {
    namespace cpu = ladderfast::cpu;
    const LnConvLstmShape& shape = args.shape;
    const LnConvLstmInputs<T> in = args.pointers<T>();
    const LnConvLstmOutputs<T> out = results.pointers<T>();
    const Tensor split = ln_convlstm_split(args);
    double* sp = (double*)split.data_ptr();
    const int64_t cell_items = cpu::ln_convlstm_cell_items(shape);
    parallel_items(cpu::ln_convlstm_statistics_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_statistics<T>(in, out, sp, eps, shape, begin, end);
    });
    parallel_items(cpu::ln_convlstm_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_forward<T>(in, out, sp, eps, shape, begin, end);
    });
    parallel_items(cell_items, args.elements() / 2, [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_cell_statistics<T>(out, sp, shape, begin, end);
    });
    parallel_items(cell_items, args.elements() / 2, [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_cell_forward<T>(in, out, sp, eps, shape, begin, end);
    });
}

LnConvLstmResults ln_convlstm_cpu(Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c, std::optional<Tensor> weight,
                                  std::optional<Tensor> weight_y, Tensor bias, std::optional<Tensor> cell_weight,
                                  std::optional<Tensor> cell_bias, bool batch, double eps) {
    const LnConvLstmArguments args("ln_convlstm", x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch);
    const LnConvLstmForward out(args);
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(bias.scalar_type() == dtype, "ln_convlstm: bias must have the dtype of x on the CPU");
    if (dtype == ScalarType::Float) {
        run_ln_convlstm<float>(args, out, eps);
    } else if (dtype == ScalarType::Double) {
        run_ln_convlstm<double>(args, out, eps);
    } else {
        STD_TORCH_CHECK(false, "ln_convlstm: the CPU kernel takes float32 and float64");
    }
    return {out.h, out.c_new, out.stats, out.cell_stats};
}

// The gradients of x, y, rec, c, weight, weight_y, bias, cell_weight and cell_bias. Those of what is not there are
// empty; so is that of an x that is not normalised, which is that of rec.
using LnConvLstmGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct LnConvLstmBackward {
    Tensor grad_h, grad_c_new, stats, cell_stats;
    std::optional<Tensor> after;
    Tensor grad_x, grad_y, grad_rec, grad_c, grad_weight, grad_weight_y, grad_bias, grad_cell_weight, grad_cell_bias;

    LnConvLstmBackward(const LnConvLstmArguments& args, Tensor grad_h, Tensor grad_c_new, std::optional<Tensor> c_new,
                       Tensor stats, Tensor cell_stats)
        : stats(as_contiguous(stats)), cell_stats(as_contiguous(cell_stats)) {
        args.check_cells("grad_h", grad_h);
        args.check_cells("grad_c_new", grad_c_new);
        const LnConvLstmShape& s = args.shape;
        const int64_t numbers = s.batch ? 12 * s.channels : 2 * s.samples;
        for (const Tensor& t : {stats, cell_stats})
            STD_TORCH_CHECK(t.scalar_type() == args.stats_dtype() && t.device() == args.x.device(), args.op,
                            ": stats must be float64 where x is, else float32");
        STD_TORCH_CHECK(
            stats.numel() == s.seeds * s.inputs * numbers && cell_stats.numel() == s.seeds * s.samples * s.cell * 2,
            args.op, ": stats do not fit x");
        STD_TORCH_CHECK(c_new.has_value() == (s.cell != 0), args.op, ": c_new belongs to a normalised cell");
        if (s.cell) {
            args.check_cells("c_new", *c_new);
            after = args.cells(*c_new);
        }
        this->grad_h = args.cells(grad_h);
        this->grad_c_new = args.cells(grad_c_new);
        grad_x = args.weight.has_value() ? new_like(args.x) : args.none();
        grad_y = args.like(args.y);
        grad_rec = new_like(args.x);
        grad_c = args.empty_cells();
        grad_weight = args.like(args.weight);
        grad_weight_y = args.like(args.weight_y);
        grad_bias = new_like(args.bias);
        grad_cell_weight = args.like(args.cell_weight);
        grad_cell_bias = args.like(args.cell_bias);
    }

    template <class T>
    LnConvLstmGradients<T> pointers() const {
        return {(const T*)grad_h.data_ptr(),
                (const T*)grad_c_new.data_ptr(),
                (const T*)stats.data_ptr(),
                (const T*)cell_stats.data_ptr(),
                (const T*)pointer(after),
                {(T*)grad_x.data_ptr(), (T*)grad_y.data_ptr()},
                (T*)grad_rec.data_ptr(),
                (T*)grad_c.data_ptr(),
                {(T*)grad_weight.data_ptr(), (T*)grad_weight_y.data_ptr()},
                (T*)grad_bias.data_ptr(),
                (T*)grad_cell_weight.data_ptr(),
                (T*)grad_cell_bias.data_ptr()};
    }

    LnConvLstmGrads results() const {
        return {grad_x,        grad_y,    grad_rec,         grad_c,        grad_weight,
                grad_weight_y, grad_bias, grad_cell_weight, grad_cell_bias};
    }
};

template <class T>
void run_ln_convlstm_backward(const LnConvLstmArguments& args, const LnConvLstmBackward& out) {
    namespace cpu = ladderfast::cpu;
    const LnConvLstmShape& shape = args.shape;
    const LnConvLstmInputs<T> in = args.pointers<T>();
    const LnConvLstmGradients<T> grad = out.pointers<T>();
    const Tensor split = ln_convlstm_split(args);
    const Tensor workspace = new_packed(args.x, {cpu::ln_convlstm_reduce_workspace(shape)});
    double* sp = (double*)split.data_ptr();
    T* ws = (T*)workspace.data_ptr();
    parallel_items(cpu::ln_convlstm_cell_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_cell_backward<T>(in, grad, sp, ws, shape, begin, end);
    });
    parallel_items(cpu::ln_convlstm_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        cpu::ln_convlstm_backward<T>(in, grad, sp, ws, shape, begin, end);
    });
    parallel_items(cpu::ln_convlstm_reduce_items(shape), workspace.numel() / 4,
                   [&](int64_t begin, int64_t end) { cpu::ln_convlstm_reduce<T>(ws, grad, shape, begin, end); });
    parallel_items(cpu::ln_convlstm_finish_items(shape), args.elements(),
                   [&](int64_t begin, int64_t end) { cpu::ln_convlstm_finish<T>(in, grad, sp, shape, begin, end); });
}

LnConvLstmGrads ln_convlstm_backward_cpu(Tensor grad_h, Tensor grad_c_new, Tensor x, std::optional<Tensor> y,
                                         Tensor rec, Tensor c, std::optional<Tensor> weight,
                                         std::optional<Tensor> weight_y, Tensor bias, std::optional<Tensor> cell_weight,
                                         std::optional<Tensor> cell_bias, std::optional<Tensor> c_new, Tensor stats,
                                         Tensor cell_stats, bool batch) {
    const LnConvLstmArguments args("ln_convlstm_backward", x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias,
                                   batch);
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(bias.scalar_type() == dtype && stats.scalar_type() == dtype,
                    "ln_convlstm_backward: bias and stats must have the dtype of x on the CPU");
    const LnConvLstmBackward out(args, grad_h, grad_c_new, c_new, stats, cell_stats);
    if (dtype == ScalarType::Float) {
        run_ln_convlstm_backward<float>(args, out);
    } else if (dtype == ScalarType::Double) {
        run_ln_convlstm_backward<double>(args, out);
    } else {
        STD_TORCH_CHECK(false, "ln_convlstm_backward: the CPU kernel takes float32 and float64");
    }
    return out.results();
}

// Whether the axes 1 to 3 of t lie packed in memory in this order, slowest first.
bool sample_packed(const Tensor& t, const int64_t (&order)[3]) {
    int64_t expected = 1;
    for (int k = 2; k >= 0; --k) {
        if (t.size(order[k]) != 1 && t.stride(order[k]) != expected) return false;
        expected *= t.size(order[k]);
    }
    return true;
}

// to.copy_(source): fast for float32 images (N, C, H, W) that go from contiguous to channels-last, or back.
void lay_out_cpu(Tensor to, Tensor source) {
    const int64_t contiguous[3] = {1, 2, 3}, last[3] = {2, 3, 1};
    bool fast = to.numel() > 0 && to.dim() == 4 && source.dim() == 4 && to.scalar_type() == ScalarType::Float &&
                source.scalar_type() == ScalarType::Float;
    for (int64_t k = 0; fast && k < 4; ++k) fast = to.size(k) == source.size(k);
    const bool to_last = fast && sample_packed(source, contiguous) && sample_packed(to, last);
    if (!to_last && !(fast && sample_packed(source, last) && sample_packed(to, contiguous))) {
        torch::stable::copy_(to, source);
        return;
    }
    const int64_t channels = to.size(1), positions = to.size(2) * to.size(3);
    const LayoutShape shape = {to.size(0), to_last ? channels : positions, to_last ? positions : channels,
                               source.stride(0), to.stride(0)};
    const float* read = (const float*)source.data_ptr();
    float* written = (float*)to.data_ptr();
    parallel_items(ladderfast::cpu::transpose_items(shape), to.numel(),
                   [&](int64_t begin, int64_t end) { ladderfast::cpu::transpose(read, written, shape, begin, end); });
}

Tensor channels_last_cpu(Tensor t) {
    STD_TORCH_CHECK(t.dim() == 4, "channels_last: t must be (N, C, H, W)");
    Tensor out = new_packed(t, {t.size(0), t.size(2), t.size(3), t.size(1)});
    out = torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
    lay_out_cpu(out, t);
    return out;
}

#ifdef LADDERFAST_WITH_CUDA

LnConvLstmResults ln_convlstm_cuda(Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c,
                                   std::optional<Tensor> weight, std::optional<Tensor> weight_y, Tensor bias,
                                   std::optional<Tensor> cell_weight, std::optional<Tensor> cell_bias, bool batch,
                                   double eps) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const LnConvLstmArguments args("ln_convlstm", x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias, batch);
    const LnConvLstmForward results(args);
    Tensor workspace = new_packed(x, {ladderfast_ln_convlstm_workspace_cuda(&args.shape)}, ScalarType::Byte);
    const auto in = args.pointers<void>();
    const auto out = results.pointers<void>();
    STD_CUDA_CHECK((cudaError_t)ladderfast_ln_convlstm_forward_cuda(
        &in, &out, workspace.data_ptr(), eps, dtype_code("ln_convlstm", x.scalar_type()),
        dtype_code("ln_convlstm", bias.scalar_type()), &args.shape, current_stream(x)));
    return {results.h, results.c_new, results.stats, results.cell_stats};
}

LnConvLstmGrads ln_convlstm_backward_cuda(Tensor grad_h, Tensor grad_c_new, Tensor x, std::optional<Tensor> y,
                                          Tensor rec, Tensor c, std::optional<Tensor> weight,
                                          std::optional<Tensor> weight_y, Tensor bias,
                                          std::optional<Tensor> cell_weight, std::optional<Tensor> cell_bias,
                                          std::optional<Tensor> c_new, Tensor stats, Tensor cell_stats, bool batch) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const LnConvLstmArguments args("ln_convlstm_backward", x, y, rec, c, weight, weight_y, bias, cell_weight, cell_bias,
                                   batch);
    const LnConvLstmBackward results(args, grad_h, grad_c_new, c_new, stats, cell_stats);
    Tensor workspace = new_packed(x, {ladderfast_ln_convlstm_workspace_cuda(&args.shape)}, ScalarType::Byte);
    const auto in = args.pointers<void>();
    const auto grad = results.pointers<void>();
    STD_CUDA_CHECK((cudaError_t)ladderfast_ln_convlstm_backward_cuda(
        &in, &grad, workspace.data_ptr(), dtype_code("ln_convlstm_backward", x.scalar_type()),
        dtype_code("ln_convlstm_backward", bias.scalar_type()), &args.shape, current_stream(x)));
    return results.results();
}

using TaggerCuda = TaggerOps<tagger_inputs_cuda, tagger_nll_cuda, tagger_backward_cuda>;
using TaggerStepCuda = TaggerStepOps<tagger_step_inputs_cuda, tagger_step_inputs_backward_cuda,
                                     tagger_step_outputs_cuda, tagger_step_outputs_backward_cuda>;

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
    m.def(
        "ladder_decoder(Tensor u, Tensor z, Tensor params, Tensor? clean_z, Tensor? mean, Tensor? var, bool squash_v, "
        "float eps) -> (Tensor z_hat, Tensor cost, Tensor u_mean, Tensor u_var)");
    m.def(
        "ladder_decoder_backward(Tensor? grad_z_hat, Tensor? grad_cost, Tensor u, Tensor z, Tensor params, Tensor? "
        "clean_z, Tensor? mean, Tensor? var, Tensor u_mean, Tensor u_var, bool squash_v, float eps, bool want_z, bool "
        "want_clean_z, bool want_statistics) -> (Tensor grad_u, Tensor grad_z, Tensor grad_params, Tensor "
        "grad_clean_z, "
        "Tensor grad_mean, Tensor grad_var)");
    m.def("soft_pool2d(Tensor z, int kernel_h, int kernel_w, float beta) -> (Tensor, Tensor)");
    m.def(
        "soft_pool2d_backward(Tensor grad_what, Tensor grad_where, Tensor z, int kernel_h, int kernel_w, float beta) "
        "-> Tensor");
    m.def("soft_unpool2d(Tensor what, Tensor where, int kernel_h, int kernel_w) -> Tensor");
    m.def(
        "soft_unpool2d_backward(Tensor grad_z, Tensor what, Tensor where, int kernel_h, int kernel_w) -> (Tensor, "
        "Tensor)");
    m.def("where_max_pool2d(Tensor z, int kernel_h, int kernel_w, bool positions) -> (Tensor, Tensor)");
    m.def(
        "where_max_pool2d_backward(Tensor grad_what, Tensor where, int kernel_h, int kernel_w, int height, int width) "
        "-> Tensor");
    m.def("where_max_unpool2d(Tensor what, Tensor where, int kernel_h, int kernel_w, int height, int width) -> Tensor");
    m.def("where_max_unpool2d_backward(Tensor grad_z, Tensor where, int kernel_h, int kernel_w) -> Tensor");
    m.def("gaussian_group_inputs(Tensor x, Tensor z, Tensor m, Tensor variance) -> (Tensor, Tensor)");
    m.def(
        "gaussian_group_inputs_backward(Tensor grad_dz, Tensor grad_likelihood, Tensor x, Tensor z, Tensor m, Tensor "
        "variance, bool want_x) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("bernoulli_group_inputs(Tensor x, Tensor z, Tensor m, Tensor flip_prob) -> (Tensor, Tensor)");
    m.def(
        "bernoulli_group_inputs_backward(Tensor grad_dz, Tensor grad_likelihood, Tensor x, Tensor z, Tensor m, Tensor "
        "flip_prob, bool want_x) -> (Tensor, Tensor, Tensor)");
    m.def("gaussian_mixture_nll(Tensor x, Tensor z, Tensor m, Tensor variance) -> Tensor");
    m.def(
        "gaussian_mixture_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m, Tensor variance, bool want_x) -> "
        "(Tensor, Tensor, "
        "Tensor, Tensor)");
    m.def("bernoulli_mixture_nll(Tensor x, Tensor z, Tensor m) -> Tensor");
    m.def(
        "bernoulli_mixture_nll_backward(Tensor grad, Tensor x, Tensor z, Tensor m, bool want_x) -> (Tensor, Tensor, "
        "Tensor)");
    m.def("gaussian_step_inputs(Tensor x, Tensor z, Tensor mask_logits, Tensor variance) -> Tensor");
    m.def("bernoulli_step_inputs(Tensor x, Tensor z, Tensor mask_logits, Tensor flip_prob) -> Tensor");
    m.def(
        "gaussian_step_inputs_backward(Tensor grad, Tensor x, Tensor z, Tensor mask_logits, Tensor variance, bool "
        "want_x) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "bernoulli_step_inputs_backward(Tensor grad, Tensor x, Tensor z, Tensor mask_logits, Tensor flip_prob, bool "
        "want_x) -> "
        "(Tensor, Tensor, Tensor)");
    m.def(
        "gaussian_step_outputs(Tensor x, Tensor z_pre, Tensor mask_pre, Tensor z_weight, Tensor z_bias, Tensor "
        "mask_weight, Tensor variance, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "bernoulli_step_outputs(Tensor x, Tensor z_pre, Tensor mask_pre, Tensor z_weight, Tensor z_bias, Tensor "
        "mask_weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "gaussian_step_outputs_backward(Tensor grad_z, Tensor grad_logits, Tensor grad_nll, Tensor x, Tensor z_pre, "
        "Tensor mask_pre, Tensor z_weight, Tensor z_bias, Tensor mask_weight, Tensor variance, Tensor stats, bool "
        "want_x) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "bernoulli_step_outputs_backward(Tensor grad_z, Tensor grad_logits, Tensor grad_nll, Tensor x, Tensor z_pre, "
        "Tensor mask_pre, Tensor z_weight, Tensor z_bias, Tensor mask_weight, Tensor stats, bool want_x) -> (Tensor, "
        "Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "ln_convlstm(Tensor x, Tensor? y, Tensor rec, Tensor c, Tensor? weight, Tensor? weight_y, Tensor bias, Tensor? "
        "cell_weight, Tensor? cell_bias, bool batch, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "ln_convlstm_backward(Tensor grad_h, Tensor grad_c_new, Tensor x, Tensor? y, Tensor rec, Tensor c, Tensor? "
        "weight, Tensor? weight_y, Tensor bias, Tensor? cell_weight, Tensor? cell_bias, Tensor? c_new, Tensor stats, "
        "Tensor cell_stats, bool batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("lay_out(Tensor(a!) to, Tensor source) -> ()");
    m.def("channels_last(Tensor t) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
    m.impl("ladder_encoder", TORCH_BOX(&ladder_encoder_cpu));
    m.impl("ladder_encoder_backward", TORCH_BOX(&ladder_encoder_backward_cpu));
    m.impl("ladder_decoder", TORCH_BOX(&ladder_decoder_cpu));
    m.impl("ladder_decoder_backward", TORCH_BOX(&ladder_decoder_backward_cpu));
    m.impl("soft_pool2d", TORCH_BOX(&soft_pool2d_cpu));
    m.impl("soft_pool2d_backward", TORCH_BOX(&soft_pool2d_backward_cpu));
    m.impl("soft_unpool2d", TORCH_BOX(&soft_unpool2d_cpu));
    m.impl("soft_unpool2d_backward", TORCH_BOX(&soft_unpool2d_backward_cpu));
    m.impl("where_max_pool2d", TORCH_BOX(&where_max_pool2d_cpu));
    m.impl("where_max_pool2d_backward", TORCH_BOX(&where_max_pool2d_backward_cpu));
    m.impl("where_max_unpool2d", TORCH_BOX(&where_max_unpool2d_cpu));
    m.impl("where_max_unpool2d_backward", TORCH_BOX(&where_max_unpool2d_backward_cpu));
    m.impl("gaussian_group_inputs", TORCH_BOX(&TaggerCpu::gaussian_inputs));
    m.impl("gaussian_group_inputs_backward", TORCH_BOX(&TaggerCpu::gaussian_inputs_backward));
    m.impl("bernoulli_group_inputs", TORCH_BOX(&TaggerCpu::bernoulli_inputs));
    m.impl("bernoulli_group_inputs_backward", TORCH_BOX(&TaggerCpu::bernoulli_inputs_backward));
    m.impl("gaussian_mixture_nll", TORCH_BOX(&TaggerCpu::gaussian_nll));
    m.impl("gaussian_mixture_nll_backward", TORCH_BOX(&TaggerCpu::gaussian_nll_backward));
    m.impl("bernoulli_mixture_nll", TORCH_BOX(&TaggerCpu::bernoulli_nll));
    m.impl("bernoulli_mixture_nll_backward", TORCH_BOX(&TaggerCpu::bernoulli_nll_backward));
    m.impl("gaussian_step_inputs", TORCH_BOX(&TaggerStepCpu::gaussian_inputs));
    m.impl("gaussian_step_inputs_backward", TORCH_BOX(&TaggerStepCpu::gaussian_inputs_backward));
    m.impl("gaussian_step_outputs", TORCH_BOX(&TaggerStepCpu::gaussian_outputs));
    m.impl("gaussian_step_outputs_backward", TORCH_BOX(&TaggerStepCpu::gaussian_outputs_backward));
    m.impl("bernoulli_step_inputs", TORCH_BOX(&TaggerStepCpu::bernoulli_inputs));
    m.impl("bernoulli_step_inputs_backward", TORCH_BOX(&TaggerStepCpu::bernoulli_inputs_backward));
    m.impl("bernoulli_step_outputs", TORCH_BOX(&TaggerStepCpu::bernoulli_outputs));
    m.impl("bernoulli_step_outputs_backward", TORCH_BOX(&TaggerStepCpu::bernoulli_outputs_backward));
    m.impl("ln_convlstm", TORCH_BOX(&ln_convlstm_cpu));
    m.impl("ln_convlstm_backward", TORCH_BOX(&ln_convlstm_backward_cpu));
    m.impl("lay_out", TORCH_BOX(&lay_out_cpu));
    m.impl("channels_last", TORCH_BOX(&channels_last_cpu));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
    m.impl("ladder_encoder", TORCH_BOX(&ladder_encoder_cuda));
    m.impl("ladder_encoder_backward", TORCH_BOX(&ladder_encoder_backward_cuda));
    m.impl("ladder_decoder", TORCH_BOX(&ladder_decoder_cuda));
    m.impl("ladder_decoder_backward", TORCH_BOX(&ladder_decoder_backward_cuda));
    m.impl("soft_pool2d", TORCH_BOX(&soft_pool2d_cuda));
    m.impl("soft_pool2d_backward", TORCH_BOX(&soft_pool2d_backward_cuda));
    m.impl("soft_unpool2d", TORCH_BOX(&soft_unpool2d_cuda));
    m.impl("soft_unpool2d_backward", TORCH_BOX(&soft_unpool2d_backward_cuda));
    m.impl("where_max_pool2d", TORCH_BOX(&where_max_pool2d_cuda));
    m.impl("where_max_pool2d_backward", TORCH_BOX(&where_max_pool2d_backward_cuda));
    m.impl("where_max_unpool2d", TORCH_BOX(&where_max_unpool2d_cuda));
    m.impl("where_max_unpool2d_backward", TORCH_BOX(&where_max_unpool2d_backward_cuda));
    m.impl("gaussian_group_inputs", TORCH_BOX(&TaggerCuda::gaussian_inputs));
    m.impl("gaussian_group_inputs_backward", TORCH_BOX(&TaggerCuda::gaussian_inputs_backward));
    m.impl("bernoulli_group_inputs", TORCH_BOX(&TaggerCuda::bernoulli_inputs));
    m.impl("bernoulli_group_inputs_backward", TORCH_BOX(&TaggerCuda::bernoulli_inputs_backward));
    m.impl("gaussian_mixture_nll", TORCH_BOX(&TaggerCuda::gaussian_nll));
    m.impl("gaussian_mixture_nll_backward", TORCH_BOX(&TaggerCuda::gaussian_nll_backward));
    m.impl("bernoulli_mixture_nll", TORCH_BOX(&TaggerCuda::bernoulli_nll));
    m.impl("bernoulli_mixture_nll_backward", TORCH_BOX(&TaggerCuda::bernoulli_nll_backward));
    m.impl("gaussian_step_inputs", TORCH_BOX(&TaggerStepCuda::gaussian_inputs));
    m.impl("gaussian_step_inputs_backward", TORCH_BOX(&TaggerStepCuda::gaussian_inputs_backward));
    m.impl("gaussian_step_outputs", TORCH_BOX(&TaggerStepCuda::gaussian_outputs));
    m.impl("gaussian_step_outputs_backward", TORCH_BOX(&TaggerStepCuda::gaussian_outputs_backward));
    m.impl("bernoulli_step_inputs", TORCH_BOX(&TaggerStepCuda::bernoulli_inputs));
    m.impl("bernoulli_step_inputs_backward", TORCH_BOX(&TaggerStepCuda::bernoulli_inputs_backward));
    m.impl("bernoulli_step_outputs", TORCH_BOX(&TaggerStepCuda::bernoulli_outputs));
    m.impl("bernoulli_step_outputs_backward", TORCH_BOX(&TaggerStepCuda::bernoulli_outputs_backward));
    m.impl("ln_convlstm", TORCH_BOX(&ln_convlstm_cuda));
    m.impl("ln_convlstm_backward", TORCH_BOX(&ln_convlstm_backward_cuda));
}
#endif
