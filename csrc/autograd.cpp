// The autograd node of ops on the CPU, in C++: what a torch.autograd.Function of Python's does for a plain call, in
// less time. Checks, forward op, node; in backward the backward op.
//
// It takes the common case only: plain tensors of one wide dtype on the CPU, of shapes that fit, without tangents,
// outside torch.func's transforms and modes of dispatch. For all else a call returns None, and Python's way takes over,
// which also says what is wrong with an argument. Gradients that are themselves to be differentiated go to a function
// of Python's as well. No mode of __torch_function__ hears of a call.
//
// This file alone needs torch's own headers, which promise nothing to the next version of torch. It is a module by
// itself therefore, which ladderfast loads only under the version that it was built with, and can do without.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// A tensor's shape: numbers, names of sizes (each the same wherever it stands), and "*" for any number of axes more,
// of which all tensors have the same.
struct Size {
    enum Kind { number, name, rest } kind;
    int64_t value;  // the number, or which name
};

constexpr size_t most_names = 8;

struct Argument {
    std::vector<Size> shape;
    bool packed = false;    // contiguous, or with the channels last
    bool constant = false;  // has no gradient
    // A tensor without axes whose value must lie between these, or strictly between them.
    bool limited = false, strictly = false;
    double least = 0, most = 0;
};

struct Op {
    std::string name;  // of the backward op
    c10::OperatorHandle forward, backward;
    std::vector<Argument> tensors;
    std::vector<std::pair<int64_t, int64_t>> names;  // least and most of each named size
    std::vector<bool> flags;                         // of each argument after the tensors: a bool, or else a number
    size_t returned;                                 // results that the caller gets; what is left is kept
    // What the backward op takes: g a result's gradient, s a tensor or else what was kept, c an argument after the
    // tensors, n whether a tensor needs its gradient.
    std::vector<std::pair<char, size_t>> backward_takes;
    py::object differentiable;
};

bool as_number(bool flag, PyObject* object, c10::IValue* out) {
    if (flag) {
        if (!PyBool_Check(object)) return false;
        *out = object == Py_True;
        return true;
    }
    if (!PyFloat_Check(object)) return false;
    const double number = PyFloat_AS_DOUBLE(object);
    *out = number;
    return number > 0 && number < std::numeric_limits<double>::infinity();
}

bool lies(const Argument& argument, double value) {
    return argument.strictly ? argument.least < value && value < argument.most
                             : argument.least <= value && value <= argument.most;
}

bool transformed() {
    return c10::impl::tls_local_dispatch_key_set().included_.has_any(c10::DispatchKeySet(
        {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

bool watched() {
    return transformed() || c10::impl::tls_local_dispatch_key_set().included_.has_any(
                                c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                                     c10::DispatchKey::Functionalize, c10::DispatchKey::Tracer}));
}

bool plain(const Tensor& t, at::ScalarType dtype) {
    const c10::DispatchKeySet all({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                                   c10::DispatchKey::ADInplaceOrView});
    return (t.key_set() | all) == all && t.scalar_type() == dtype;
}

// Whether t is contiguous, or would be with axis 1 last.
bool packed(const Tensor& t) {
    if (t.is_contiguous()) return true;
    if (t.dim() < 2) return false;
    int64_t expected = 1;
    for (int64_t k = 0; k < t.dim(); ++k) {
        const int64_t axis = k == 0 ? 1 : k < t.dim() - 1 ? t.dim() - k : 0;
        if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
        expected *= t.size(axis);
    }
    return true;
}

// Whether the tensors' shapes fit together.
bool fits(const Op& op, at::ArrayRef<Tensor> tensors) {
    int64_t found[most_names];
    std::fill_n(found, most_names, -1);
    at::IntArrayRef rest;
    bool has_rest = false;
    for (size_t k = 0; k < tensors.size(); ++k) {
        const auto& shape = op.tensors[k].shape;
        const auto sizes = tensors[k].sizes();
        size_t axis = 0;
        for (const Size& size : shape) {
            if (size.kind == Size::rest) {
                const auto tail = sizes.slice(axis);
                if (has_rest && tail != rest) return false;
                rest = tail, has_rest = true, axis = sizes.size();
                break;
            }
            if (axis == sizes.size()) return false;
            const int64_t is = sizes[axis++];
            if (size.kind == Size::number) {
                if (is != size.value) return false;
            } else if (found[size.value] < 0) {
                if (is < op.names[size.value].first || is > op.names[size.value].second) return false;
                found[size.value] = is;
            } else if (found[size.value] != is) {
                return false;
            }
        }
        if (axis != sizes.size()) return false;
    }
    return true;
}

variable_list results(const Op& op, at::ArrayRef<Tensor> tensors, at::ArrayRef<c10::IValue> numbers) {
    torch::jit::Stack stack;
    stack.reserve(tensors.size() + numbers.size());
    for (const Tensor& t : tensors) stack.emplace_back(t);
    for (const c10::IValue& n : numbers) stack.emplace_back(n);
    at::AutoDispatchBelowADInplaceOrView below;
    op.forward.callBoxed(&stack);
    variable_list out;
    out.reserve(stack.size());
    for (c10::IValue& value : stack) out.push_back(std::move(value).toTensor());
    return out;
}

template <class List>
py::tuple tuple_of(const List& tensors) {
    py::tuple out(tensors.size());
    for (size_t k = 0; k < tensors.size(); ++k)
        out[k] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[k]));
    return out;
}

// The gradients as differentiable tensors, from Python.
variable_list differentiable(const Op& op, const variable_list& grads, const variable_list& saved,
                             const std::vector<c10::IValue>& numbers, const std::vector<bool>& needs) {
    py::gil_scoped_acquire gil;
    try {
        py::tuple constants(numbers.size());
        for (size_t k = 0; k < numbers.size(); ++k)
            constants[k] = op.flags[k] ? py::object(py::bool_(numbers[k].toBool()))
                                       : py::object(py::float_(numbers[k].toDouble()));
        const py::tuple found = op.differentiable(tuple_of(grads), tuple_of(saved), constants, py::cast(needs));
        variable_list out(op.tensors.size());
        for (size_t k = 0; k < found.size(); ++k)
            if (needs[k] && !found[k].is_none()) out[k] = THPVariable_Unpack(py::object(found[k]).ptr());
        return out;
    } catch (py::error_already_set& error) {
        error.restore();
        throw python_error();
    }
}

// Of the tensors, from those of the results; `saved` are the tensors, and the results from `returned` on.
variable_list gradients(const Op& op, variable_list grads, const variable_list& saved,
                        const std::vector<c10::IValue>& numbers, const std::vector<bool>& needs) {
    const auto has_tangent = [](const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); };
    if (at::GradMode::is_enabled() || transformed() || std::any_of(grads.begin(), grads.end(), has_tangent))
        return differentiable(op, grads, saved, numbers, needs);
    torch::jit::Stack stack;
    stack.reserve(std::max(op.backward_takes.size(), needs.size()));
    for (const auto& [what, k] : op.backward_takes) {
        if (what == 'g')
            stack.emplace_back(std::move(grads[k]));
        else if (what == 's')
            stack.emplace_back(saved[k]);
        else if (what == 'c')
            stack.emplace_back(numbers[k]);
        else
            stack.emplace_back(bool(needs[k]));
    }
    {
        at::AutoDispatchBelowADInplaceOrView below;
        op.backward.callBoxed(&stack);
    }
    variable_list out(needs.size());
    for (size_t k = 0; k < stack.size(); ++k)
        if (needs[k]) out[k] = std::move(stack[k]).toTensor();
    return out;
}

std::string number_name(size_t k) { return std::string(1, char('0' + k)); }

// By the kind of pointer that torch's graph is made of: a shared_ptr, from torch 2.13 on an intrusive_ptr.
template <class N>
auto new_node() {
    using Pointer = decltype(torch::autograd::Edge::function);
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
        return std::shared_ptr<N>(new N, [](N* node) { deleteNode(node); });
    else
        return c10::make_intrusive<N>();
}

}  // namespace

namespace ladderfast {

// Torch's node of a C++ function with the name of this one, which compiled autograd knows how to trace.
struct KernelFunction {
    static constexpr bool is_traceable = false;

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const Op& op = *reinterpret_cast<const Op*>(ctx->saved_data["op"].toInt());
        std::vector<c10::IValue> numbers;
        for (size_t k = 0; k < op.flags.size(); ++k) numbers.push_back(ctx->saved_data[number_name(k)]);
        std::vector<bool> needs(op.tensors.size());
        for (size_t k = 0; k < needs.size(); ++k) needs[k] = ctx->needs_input_grad(k);
        return gradients(op, std::move(grads), ctx->get_saved_variables(), numbers, needs);
    }
};

// The same without what a function in general needs: 4 us less for a call and its backward.
struct KernelNode : torch::autograd::CppNode<KernelFunction> {
    // In saved_data too, where compiled autograd looks for them, by names that take long to look up.
    const Op* op = nullptr;
    std::vector<c10::IValue> numbers;

    // `out` are the op's results, of which the caller gets the first.
    static void make(const Op& op, std::vector<c10::IValue> numbers, at::ArrayRef<Tensor> tensors, variable_list& out) {
        const auto node = new_node<KernelNode>();
        node->set_ctx_grad_fn(node);
        node->set_next_edges(torch::autograd::collect_next_edges(tensors));
        node->is_variable_input_.assign(tensors.size(), true);
        node->op = &op;
        node->ctx_.saved_data["op"] = reinterpret_cast<int64_t>(&op);
        for (size_t k = 0; k < numbers.size(); ++k) node->ctx_.saved_data[number_name(k)] = numbers[k];
        node->numbers = std::move(numbers);

        variable_list saved(tensors.begin(), tensors.end());
        saved.insert(saved.end(), out.begin() + op.returned, out.end());
        out.resize(op.returned);
        node->ctx_.save_for_backward(std::move(saved));
        node->save_variables_to_ctx();
        node->output_info_.reserve(op.returned);
        for (Tensor& t : out) {
            torch::autograd::create_gradient_edge(t, node);
            node->output_info_.emplace_back(t);
        }
    }

    std::string name() const override { return "ladderfast::" + op->name; }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        at::OptionalDeviceGuard guard;
        for (size_t k = 0; k < grads.size(); ++k)
            if (!grads[k].defined()) grads[k] = output_info_[k].zeros(guard);
        std::vector<bool> needs(op->tensors.size());
        for (size_t k = 0; k < needs.size(); ++k) needs[k] = task_should_compute_output(k);
        return gradients(*op, std::move(grads), ctx_.get_saved_variables(), numbers, needs);
    }
};

}  // namespace ladderfast

namespace {

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    const Op& op = *static_cast<const Op*>(PyCapsule_GetPointer(self, nullptr));
    const size_t tensors = op.tensors.size();
    if (size_t(count) != tensors + op.flags.size() || watched()) Py_RETURN_NONE;

    c10::SmallVector<Tensor, 8> given;
    for (size_t k = 0; k < tensors; ++k) {
        const Argument& argument = op.tensors[k];
        if (THPVariable_CheckExact(args[k])) {
            const Tensor& t = THPVariable_Unpack(args[k]);
            if (!t.defined() || !plain(t, k == 0 ? t.scalar_type() : given[0].scalar_type())) Py_RETURN_NONE;
            if (argument.packed && !packed(t)) Py_RETURN_NONE;
            if (argument.constant && t.requires_grad()) Py_RETURN_NONE;
            if (argument.limited) {
                if (t.dim() != 0) Py_RETURN_NONE;
                double value;
                if (t.scalar_type() == at::kFloat)
                    value = *t.const_data_ptr<float>();
                else if (t.scalar_type() == at::kDouble)
                    value = *t.const_data_ptr<double>();
                else
                    Py_RETURN_NONE;
                if (!lies(argument, value)) Py_RETURN_NONE;
            }
            given.push_back(t);
        } else if (k > 0 && argument.limited && PyFloat_Check(args[k])) {
            double value = PyFloat_AS_DOUBLE(args[k]);
            if (!lies(argument, value)) Py_RETURN_NONE;
            Tensor t = at::empty({}, given[0].options());
            if (t.scalar_type() == at::kFloat && std::abs(value) <= std::numeric_limits<float>::max())
                value = *t.mutable_data_ptr<float>() = float(value);
            else if (t.scalar_type() == at::kDouble)
                *t.mutable_data_ptr<double>() = value;
            else
                Py_RETURN_NONE;
            if (!lies(argument, value)) Py_RETURN_NONE;  // 1e-46 is 0 in float
            given.push_back(std::move(t));
        } else {
            Py_RETURN_NONE;
        }
    }
    const at::ScalarType dtype = given[0].scalar_type();
    if ((dtype != at::kFloat && dtype != at::kDouble) || !fits(op, given)) Py_RETURN_NONE;
    std::vector<c10::IValue> numbers(op.flags.size());
    for (size_t k = 0; k < numbers.size(); ++k)
        if (!as_number(op.flags[k], args[tensors + k], &numbers[k])) Py_RETURN_NONE;

    bool needed = false;
    if (at::GradMode::is_enabled())
        for (const Tensor& t : given) {
            if (t._fw_grad(0).defined()) Py_RETURN_NONE;
            needed = needed || t.requires_grad();
        }

    variable_list out;
    {
        py::gil_scoped_release release;
        out = results(op, given, numbers);
        if (needed) ladderfast::KernelNode::make(op, std::move(numbers), given, out);
    }
    if (op.returned == 1) return THPVariable_Wrap(std::move(out[0]));
    PyObject* tuple = PyTuple_New(op.returned);
    if (tuple == nullptr) throw python_error();
    for (size_t k = 0; k < op.returned; ++k) PyTuple_SET_ITEM(tuple, k, THPVariable_Wrap(std::move(out[k])));
    return tuple;
    END_HANDLE_TH_ERRORS
}

PyMethodDef call_definition = {"op", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL,
                               "The op's results, or None where the call is none of the common case."};

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    return {std::istream_iterator<std::string>(stream), {}};
}

Size size_of(const std::string& text, std::vector<std::string>* names) {
    if (text == "*") return {Size::rest, 0};
    if (std::isdigit(static_cast<unsigned char>(text[0]))) return {Size::number, std::stoll(text)};
    const auto at = std::find(names->begin(), names->end(), text);
    const Size size{Size::name, at - names->begin()};
    if (at == names->end()) names->push_back(text);
    if (names->size() > most_names) throw py::value_error("too many named sizes");
    return size;
}

py::object define(const std::string& forward, const std::string& backward, const py::list& tensors,
                  const std::map<std::string, std::pair<int64_t, int64_t>>& sizes, size_t returned,
                  const std::string& backward_takes, const py::object& differentiable) {
    auto& dispatcher = c10::Dispatcher::singleton();
    auto op = std::make_unique<Op>(Op{backward, dispatcher.findSchemaOrThrow(("ladderfast::" + forward).c_str(), ""),
                                      dispatcher.findSchemaOrThrow(("ladderfast::" + backward).c_str(), "")});
    std::vector<std::string> names;
    for (const py::handle& given : tensors) {
        Argument argument;
        for (const std::string& text : words(given.attr("shape").cast<std::string>()))
            argument.shape.push_back(size_of(text, &names));
        argument.packed = given.attr("packed").cast<bool>();
        argument.constant = given.attr("constant").cast<bool>();
        const py::object limits = given.attr("limits");
        if ((argument.limited = !limits.is_none())) {
            std::tie(argument.least, argument.most, argument.strictly) =
                limits.cast<std::tuple<double, double, bool>>();
        }
        op->tensors.push_back(std::move(argument));
    }
    for (const std::string& name : names) {
        const auto at = sizes.find(name);
        op->names.push_back(at == sizes.end() ? std::pair<int64_t, int64_t>(0, INT64_MAX) : at->second);
    }
    // What does not fit the ops would go wrong at a call, of which nobody would look for the reason here.
    const auto& schema = op->forward.schema();
    const size_t count = op->tensors.size(), results = schema.returns().size();
    const auto is = [](const c10::Argument& argument, c10::TypeKind kind) { return argument.type()->kind() == kind; };
    const auto refuse = [&](bool unless, const std::string& what) {
        if (!unless) throw py::value_error(forward + ": " + what);
    };
    refuse(count > 0 && count <= schema.arguments().size(), "has not so many tensors");
    for (size_t k = 0; k < schema.arguments().size(); ++k) {
        const auto& argument = schema.arguments()[k];
        const bool flag = is(argument, c10::TypeKind::BoolType);
        refuse(k < count ? is(argument, c10::TypeKind::TensorType) : flag || is(argument, c10::TypeKind::FloatType),
               "takes another kind of " + argument.name());
        if (k >= count) op->flags.push_back(flag);
    }
    refuse(returned > 0 && returned <= results, "has not so many results");
    op->returned = returned;
    const auto& backward_arguments = op->backward.schema().arguments();
    for (const std::string& text : words(backward_takes))
        op->backward_takes.emplace_back(text[0], std::stoull(text.substr(1)));
    refuse(op->backward_takes.size() == backward_arguments.size(), "its backward takes another number of arguments");
    refuse(op->backward.schema().returns().size() <= count, "its backward has more results than there are tensors");
    for (size_t k = 0; k < backward_arguments.size(); ++k) {
        const auto [what, index] = op->backward_takes[k];
        const size_t most = what == 'g'   ? returned
                            : what == 's' ? count + results - returned
                            : what == 'c' ? op->flags.size()
                            : what == 'n' ? count
                                          : 0;
        const auto kind = what == 'n' || (what == 'c' && index < most && op->flags[index]) ? c10::TypeKind::BoolType
                          : what == 'c'                                                    ? c10::TypeKind::FloatType
                                                                                           : c10::TypeKind::TensorType;
        refuse(index < most && is(backward_arguments[k], kind),
               "its backward takes another " + backward_arguments[k].name());
    }
    op->differentiable = differentiable;
    // It lives as long as the process: graphs point to it.
    return py::reinterpret_steal<py::object>(
        PyCFunction_New(&call_definition, PyCapsule_New(op.release(), nullptr, nullptr)));
}

}  // namespace

PYBIND11_MODULE(_autograd, m) {
    m.doc() = "Autograd nodes of ladderfast's ops, for the torch that they were built with.";
    m.attr("torch_version") = LADDERFAST_TORCH_VERSION;
    m.def("define", &define, "A callable for an op and its backward op, of which ladderfast.ops.function tells.");
}
