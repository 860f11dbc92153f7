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
#include "ln_convlstm.h"

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

// The arguments of an ln_convlstm pass, laid out alike: gates (N, 4C, *) and cells (N, C, *) with vectors (4C), or with
// an axis of seeds in front of each.
struct LnConvLstmArguments {
    const char* op;
    int64_t axis;  // of the channels
    LnConvLstmShape shape;
    Tensor x, rec, c, bias;
    std::optional<Tensor> y, weight, weight_y;

    LnConvLstmArguments(const char* op, Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c,
                        std::optional<Tensor> weight, std::optional<Tensor> weight_y, Tensor bias)
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

        shape = {axis == 2 ? x.size(0) : 1, x.size(axis - 1), c.size(axis), 1, weight.has_value() + y.has_value(), 0};
        for (int64_t k = axis + 1; k < x.dim(); ++k) shape.positions *= x.size(k);
        if (!packed(x, [](int64_t k) { return k; })) {
            STD_TORCH_CHECK(is_channels_last(x), op, ": x must be contiguous or channels-last");
            shape.channels_last = 1;
        }
        this->rec = laid_out_like(rec, x);
        if (y.has_value()) this->y = laid_out_like(*y, x);
        this->c = cells(c);
        this->bias = torch::stable::contiguous(bias);
        if (weight.has_value()) this->weight = torch::stable::contiguous(*weight);
        if (weight_y.has_value()) this->weight_y = torch::stable::contiguous(*weight_y);
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
        if (!shape.channels_last) return torch::stable::new_empty(x, c.sizes());
        // The order of the axes of a part of x, packed.
        Tensor of_x = x;
        return torch::stable::empty_like(torch::stable::narrow(of_x, axis, 0, shape.channels));
    }

    // t itself if it lies in memory as x does, else a copy that does.
    Tensor cells(const Tensor& t) const {
        if (!shape.channels_last) return torch::stable::contiguous(t);
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
                (const T*)bias.data_ptr()};
    }

    int64_t elements() const { return shape.seeds * shape.samples * 4 * shape.channels * shape.positions; }
    Tensor none() const { return torch::stable::new_empty(x, {0}); }
    Tensor like(const std::optional<Tensor>& t) const { return t.has_value() ? torch::stable::empty_like(*t) : none(); }
    Tensor new_stats() const {
        const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
        return torch::stable::new_empty(x, {shape.seeds, shape.samples, shape.inputs, 2}, dtype);
    }
};

template <class T>
void run_ln_convlstm(const LnConvLstmArguments& args, Tensor& h, Tensor& c_new, Tensor& stats, double eps) {
    const LnConvLstmShape& shape = args.shape;
    const LnConvLstmInputs<T> in = args.pointers<T>();
    const LnConvLstmOutputs<T> out = {(T*)h.data_ptr(), (T*)c_new.data_ptr(), (T*)stats.data_ptr()};
    const int64_t splits = ladderfast::cpu::ln_convlstm_split_items(shape);
    Tensor split;
    if (splits > 0) {
        split =
            torch::stable::new_empty(args.x, {ladderfast::cpu::ln_convlstm_split_workspace(shape)}, ScalarType::Double);
    }
    double* sp = splits > 0 ? (double*)split.data_ptr() : nullptr;
    parallel_items(splits, args.elements(), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::ln_convlstm_statistics<T>(in, sp, shape, begin, end);
    });
    parallel_items(ladderfast::cpu::ln_convlstm_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::ln_convlstm_forward<T>(in, out, sp, eps, shape, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor> ln_convlstm_cpu(Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c,
                                                   std::optional<Tensor> weight, std::optional<Tensor> weight_y,
                                                   Tensor bias, double eps) {
    const LnConvLstmArguments args("ln_convlstm", x, y, rec, c, weight, weight_y, bias);
    Tensor h = args.empty_cells(), c_new = args.empty_cells(), stats = args.new_stats();
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(bias.scalar_type() == dtype, "ln_convlstm: bias must have the dtype of x on the CPU");
    if (dtype == ScalarType::Float) {
        run_ln_convlstm<float>(args, h, c_new, stats, eps);
    } else if (dtype == ScalarType::Double) {
        run_ln_convlstm<double>(args, h, c_new, stats, eps);
    } else {
        STD_TORCH_CHECK(false, "ln_convlstm: the CPU kernel takes float32 and float64");
    }
    return {h, c_new, stats};
}

// The gradients of x, y, rec, c, weight, weight_y and bias. Those of what is not there are empty; so is that of an x
// that is not normalised, which is that of rec.
using LnConvLstmGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct LnConvLstmBackward {
    Tensor grad_h, grad_c_new, stats;
    Tensor grad_x, grad_y, grad_rec, grad_c, grad_weight, grad_weight_y, grad_bias;

    LnConvLstmBackward(const LnConvLstmArguments& args, Tensor grad_h, Tensor grad_c_new, Tensor stats)
        : stats(torch::stable::contiguous(stats)) {
        args.check_cells("grad_h", grad_h);
        args.check_cells("grad_c_new", grad_c_new);
        STD_TORCH_CHECK(stats.numel() == args.shape.seeds * args.shape.samples * args.shape.inputs * 2 &&
                            stats.device() == args.x.device(),
                        args.op, ": stats does not fit x");
        this->grad_h = args.cells(grad_h);
        this->grad_c_new = args.cells(grad_c_new);
        grad_x = args.weight.has_value() ? torch::stable::empty_like(args.x) : args.none();
        grad_y = args.like(args.y);
        grad_rec = torch::stable::empty_like(args.x);
        grad_c = args.empty_cells();
        grad_weight = args.like(args.weight);
        grad_weight_y = args.like(args.weight_y);
        grad_bias = torch::stable::empty_like(args.bias);
    }

    template <class T>
    LnConvLstmGradients<T> pointers() const {
        return {(const T*)grad_h.data_ptr(),
                (const T*)grad_c_new.data_ptr(),
                (const T*)stats.data_ptr(),
                {(T*)grad_x.data_ptr(), (T*)grad_y.data_ptr()},
                (T*)grad_rec.data_ptr(),
                (T*)grad_c.data_ptr(),
                {(T*)grad_weight.data_ptr(), (T*)grad_weight_y.data_ptr()},
                (T*)grad_bias.data_ptr()};
    }

    LnConvLstmGrads results() const {
        return {grad_x, grad_y, grad_rec, grad_c, grad_weight, grad_weight_y, grad_bias};
    }
};

template <class T>
void run_ln_convlstm_backward(const LnConvLstmArguments& args, const LnConvLstmBackward& out) {
    const LnConvLstmShape& shape = args.shape;
    const LnConvLstmInputs<T> in = args.pointers<T>();
    const LnConvLstmGradients<T> grad = out.pointers<T>();
    const int64_t splits = ladderfast::cpu::ln_convlstm_split_items(shape);
    Tensor split, workspace = torch::stable::new_empty(args.x, {ladderfast::cpu::ln_convlstm_reduce_workspace(shape)});
    if (splits > 0) {
        split =
            torch::stable::new_empty(args.x, {ladderfast::cpu::ln_convlstm_split_workspace(shape)}, ScalarType::Double);
    }
    double* sp = splits > 0 ? (double*)split.data_ptr() : nullptr;
    T* ws = (T*)workspace.data_ptr();
    parallel_items(ladderfast::cpu::ln_convlstm_items(shape), args.elements(), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::ln_convlstm_backward<T>(in, grad, sp, ws, shape, begin, end);
    });
    parallel_items(splits, args.elements(), [&](int64_t begin, int64_t end) {
        ladderfast::cpu::ln_convlstm_finish<T>(in, grad, sp, shape, begin, end);
    });
    parallel_items(
        ladderfast::cpu::ln_convlstm_reduce_items(shape), workspace.numel() / 4,
        [&](int64_t begin, int64_t end) { ladderfast::cpu::ln_convlstm_reduce<T>(ws, grad, shape, begin, end); });
}

LnConvLstmGrads ln_convlstm_backward_cpu(Tensor grad_h, Tensor grad_c_new, Tensor x, std::optional<Tensor> y,
                                         Tensor rec, Tensor c, std::optional<Tensor> weight,
                                         std::optional<Tensor> weight_y, Tensor bias, Tensor stats) {
    const LnConvLstmArguments args("ln_convlstm_backward", x, y, rec, c, weight, weight_y, bias);
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(bias.scalar_type() == dtype && stats.scalar_type() == dtype,
                    "ln_convlstm_backward: bias and stats must have the dtype of x on the CPU");
    const LnConvLstmBackward out(args, grad_h, grad_c_new, stats);
    if (dtype == ScalarType::Float) {
        run_ln_convlstm_backward<float>(args, out);
    } else if (dtype == ScalarType::Double) {
        run_ln_convlstm_backward<double>(args, out);
    } else {
        STD_TORCH_CHECK(false, "ln_convlstm_backward: the CPU kernel takes float32 and float64");
    }
    return out.results();
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

std::tuple<Tensor, Tensor, Tensor> ln_convlstm_cuda(Tensor x, std::optional<Tensor> y, Tensor rec, Tensor c,
                                                    std::optional<Tensor> weight, std::optional<Tensor> weight_y,
                                                    Tensor bias, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const LnConvLstmArguments args("ln_convlstm", x, y, rec, c, weight, weight_y, bias);
    Tensor h = args.empty_cells(), c_new = args.empty_cells(), stats = args.new_stats();
    Tensor workspace =
        torch::stable::new_empty(x, {ladderfast_ln_convlstm_workspace_cuda(&args.shape)}, ScalarType::Byte);
    const auto in = args.pointers<void>();
    const LnConvLstmOutputs<void> out = {h.data_ptr(), c_new.data_ptr(), stats.data_ptr()};
    STD_CUDA_CHECK((cudaError_t)ladderfast_ln_convlstm_forward_cuda(
        &in, &out, workspace.data_ptr(), eps, dtype_code("ln_convlstm", x.scalar_type()),
        dtype_code("ln_convlstm", bias.scalar_type()), &args.shape, current_stream(x)));
    return {h, c_new, stats};
}

LnConvLstmGrads ln_convlstm_backward_cuda(Tensor grad_h, Tensor grad_c_new, Tensor x, std::optional<Tensor> y,
                                          Tensor rec, Tensor c, std::optional<Tensor> weight,
                                          std::optional<Tensor> weight_y, Tensor bias, Tensor stats) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const LnConvLstmArguments args("ln_convlstm_backward", x, y, rec, c, weight, weight_y, bias);
    STD_TORCH_CHECK(stats.scalar_type() == args.new_stats().scalar_type(),
                    "ln_convlstm_backward: stats must be float64 where x is, else float32");
    const LnConvLstmBackward results(args, grad_h, grad_c_new, stats);
    Tensor workspace =
        torch::stable::new_empty(x, {ladderfast_ln_convlstm_workspace_cuda(&args.shape)}, ScalarType::Byte);
    const auto in = args.pointers<void>();
    const auto grad = results.pointers<void>();
    STD_CUDA_CHECK((cudaError_t)ladderfast_ln_convlstm_backward_cuda(
        &in, &grad, workspace.data_ptr(), dtype_code("ln_convlstm_backward", x.scalar_type()),
        dtype_code("ln_convlstm_backward", bias.scalar_type()), &args.shape, current_stream(x)));
    return results.results();
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY(ladderfast, m) {
    m.def("combinator(Tensor z, Tensor u, Tensor params, bool squash_v) -> Tensor");
    m.def(
        "combinator_backward(Tensor grad_z_hat, Tensor z, Tensor u, Tensor params, bool squash_v) -> (Tensor, Tensor, "
        "Tensor)");
    m.def(
        "ln_convlstm(Tensor x, Tensor? y, Tensor rec, Tensor c, Tensor? weight, Tensor? weight_y, Tensor bias, float "
        "eps) -> (Tensor, Tensor, Tensor)");
    m.def(
        "ln_convlstm_backward(Tensor grad_h, Tensor grad_c_new, Tensor x, Tensor? y, Tensor rec, Tensor c, Tensor? "
        "weight, Tensor? weight_y, Tensor bias, Tensor stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ladderfast, CPU, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cpu));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cpu));
    m.impl("ln_convlstm", TORCH_BOX(&ln_convlstm_cpu));
    m.impl("ln_convlstm_backward", TORCH_BOX(&ln_convlstm_backward_cpu));
}

#ifdef LADDERFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ladderfast, CUDA, m) {
    m.impl("combinator", TORCH_BOX(&combinator_cuda));
    m.impl("combinator_backward", TORCH_BOX(&combinator_backward_cuda));
    m.impl("ln_convlstm", TORCH_BOX(&ln_convlstm_cuda));
    m.impl("ln_convlstm_backward", TORCH_BOX(&ln_convlstm_backward_cuda));
}
#endif
