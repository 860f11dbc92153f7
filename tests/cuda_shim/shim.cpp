// Runs a kernel's blocks one after another and a block's threads as fibers on one thread of the host. A fiber runs
// until it ends, waits in a barrier or takes part in a warp operation; what its partners are must all come too. A
// violation ends the launch with cudaErrorLaunchFailure and a message.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cuda_runtime.h>

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_shim {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuard = 1 << 20;  // a multiple of every page size
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Memory with a mebibyte on either side that cannot be accessed; that costs addresses only.
char* guarded_pages(size_t bytes) {
    char* all = static_cast<char*>(
        mmap(nullptr, bytes + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (all == MAP_FAILED || mprotect(all + kGuard, bytes, PROT_READ | PROT_WRITE) != 0) {
        perror("cuda_shim: mmap");
        abort();
    }
    return all + kGuard;
}

// ---- fibers

#if defined(__x86_64__)
extern "C" void cuda_shim_switch(void** save, void* load);
// Saves the registers that a call preserves on the stack, changes the stack, and returns on the other one.
asm(R"(
.text
.globl cuda_shim_switch
.hidden cuda_shim_switch
.type cuda_shim_switch,@function
cuda_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_shim_switch,.-cuda_shim_switch
)");
struct Context {
    void* stack_pointer = nullptr;
    void prepare(char* top, void (*entry)()) {
        void** sp = reinterpret_cast<void**>(top) - 1;  // a function finds its stack 8 off a multiple of 16
        *--sp = reinterpret_cast<void*>(entry);
        stack_pointer = sp - 6;
    }
};
void switch_context(Context& from, Context& to) { cuda_shim_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
    ucontext_t context;
    void prepare(char* top, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = top - kStack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { ready, in_barrier, in_warp_op, done };

struct Fiber {
    Context context;
    State state;
    uint3 thread;
    const char* file;
    int line;
    BlockOp block_op;
    int predicate;
    WarpOp warp_op;
    unsigned mask;
    uint64_t value;
    int argument, width;
};

std::vector<Fiber> fibers;
char* stacks[kMaxThreads];
Fiber* current = nullptr;
Context scheduler;
const std::function<void()>* kernel_body;

sigjmp_buf escape;
bool running = false;
std::string message;
uint64_t order_seed = 0;
int64_t blocks_run = 0;

char* dynamic_pages = nullptr;
size_t dynamic_capacity = 0;
char* dynamic_begin = nullptr;

void name_thread(char* to, size_t size, const uint3& thread) {
    snprintf(to, size, "thread (%u, %u, %u) of block (%u, %u, %u)", thread.x, thread.y, thread.z, blockIdx.x,
             blockIdx.y, blockIdx.z);
}

void fiber_main() {
    (*kernel_body)();
    current->state = State::done;
    switch_context(current->context, scheduler);
    abort();
}

void wait(State state) {
    current->state = state;
    switch_context(current->context, scheduler);
}

// ---- memory

thread_local char anchor;  // makes the loader allocate this library's thread-local block, where __shared__ lives

struct SharedBlock {
    void* data = nullptr;
    size_t bytes = 0;
};

int find_shared(dl_phdr_info* info, size_t, void* out) {
    const auto here = reinterpret_cast<uintptr_t>(&find_shared);
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz) ours = true;
        if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (!ours) return 0;
    *static_cast<SharedBlock*>(out) = {info->dlpi_tls_data, bytes};
    return 1;
}

SharedBlock static_shared() {
    asm volatile("" ::"r"(&anchor) : "memory");
    SharedBlock shared;
    dl_iterate_phdr(find_shared, &shared);
    return shared;
}

struct Buffer {
    std::string name;
    char* pages;
    size_t page_bytes, bytes;
};
std::map<char*, Buffer> buffers;  // by the address of the first byte

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

void describe_address(const char* address, char* to, size_t size) {
    for (const auto& [begin, buffer] : buffers) {
        if (address < buffer.pages - kGuard || address >= buffer.pages + buffer.page_bytes + kGuard) continue;
        const char* end = begin + buffer.bytes;
        if (address >= end)
            snprintf(to, size, "%td bytes past the end of %s (%zu bytes)", address - end, buffer.name.c_str(),
                     buffer.bytes);
        else if (address < begin)
            snprintf(to, size, "%td bytes before the start of %s (%zu bytes)", begin - address, buffer.name.c_str(),
                     buffer.bytes);
        else
            snprintf(to, size, "byte %td of %s, which is only to be read", address - begin, buffer.name.c_str());
        return;
    }
    snprintf(to, size, "address %p, in no buffer of the test", static_cast<const void*>(address));
}

void on_fault(int, siginfo_t* info, void*) {
    if (!running) abort();
    char where[256];
    describe_address(static_cast<const char*>(info->si_addr), where, sizeof(where));
    fail("invalid access: %s", where);
}

// ---- what waiting fibers do together

std::string place(const Fiber& fiber) {
    const char* slash = strrchr(fiber.file, '/');
    return std::string(slash ? slash + 1 : fiber.file) + ":" + std::to_string(fiber.line);
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

[[noreturn]] void fail_fiber(const Fiber& fiber, const std::string& text) {
    current = const_cast<Fiber*>(&fiber);
    fail("%s", text.c_str());
}

int source_lane(const Fiber& fiber, int lane) {
    const int first = lane & ~(fiber.width - 1);  // of the lane's segment
    const int last = first + fiber.width - 1;
    int from = lane;
    switch (fiber.warp_op) {
        case WarpOp::shuffle:
            from = first + (fiber.argument & (fiber.width - 1));
            break;
        case WarpOp::shuffle_up:
            from = lane - fiber.argument;
            return from >= first ? from : lane;
        case WarpOp::shuffle_down:
            from = lane + fiber.argument;
            break;
        case WarpOp::shuffle_xor:
            from = lane ^ fiber.argument;
            break;
        default:
            break;
    }
    return from <= last ? from : lane;
}

// Carries out one warp operation whose lanes have all come; false if there is none.
bool resolve_warp_op() {
    for (size_t warp = 0; warp * 32 < fibers.size(); ++warp) {
        Fiber* const lanes = &fibers[warp * 32];
        const int present = static_cast<int>(std::min<size_t>(32, fibers.size() - warp * 32));
        for (int lane = 0; lane < present; ++lane) {
            const Fiber& asks = lanes[lane];
            if (asks.state != State::in_warp_op) continue;
            const unsigned mask = present == 32 ? asks.mask : asks.mask & ((1u << present) - 1);
            bool complete = true;
            for (int i = 0; i < present && complete; ++i) {
                const Fiber& other = lanes[i];
                complete = !(mask >> i & 1) || (other.state == State::in_warp_op && other.warp_op == asks.warp_op &&
                                                other.mask == asks.mask && same_place(other, asks));
            }
            if (!complete) continue;
            uint64_t results[32];
            for (int i = 0; i < present; ++i) {
                if (!(mask >> i & 1)) continue;
                if (asks.warp_op == WarpOp::ballot) {
                    results[i] = 0;
                    for (int j = 0; j < present; ++j)
                        if (mask >> j & 1) results[i] |= (lanes[j].value & 1) << j;
                } else {
                    const int from = asks.warp_op == WarpOp::sync ? i : source_lane(lanes[i], i);
                    // A lane that takes no part has nothing to give.
                    results[i] = from < present && (mask >> from & 1) ? lanes[from].value : ~uint64_t{0};
                }
            }
            for (int i = 0; i < present; ++i) {
                if (!(mask >> i & 1)) continue;
                lanes[i].value = results[i];
                lanes[i].state = State::ready;
            }
            return true;
        }
    }
    return false;
}

void resolve_barrier() {
    const auto waiting = [](const Fiber& f) { return f.state == State::in_barrier; };
    for (const Fiber& fiber : fibers)
        if (fiber.state == State::in_warp_op) {
            char mask[16];
            snprintf(mask, sizeof(mask), "0x%08x", fiber.mask);
            fail_fiber(fiber, "the warp operation at " + place(fiber) + " with mask " + mask +
                                  " is not reached by every lane of its mask");
        }
    const Fiber& first = *std::find_if(fibers.begin(), fibers.end(), waiting);
    int count = 0;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::done)
            fail_fiber(fiber, "it ended without reaching the barrier at " + place(first) + " where others wait");
        if (!same_place(fiber, first) || fiber.block_op != first.block_op)
            fail_fiber(fiber, "it waits in the barrier at " + place(fiber) + " while others wait at " + place(first));
        count += fiber.predicate != 0;
    }
    const int threads = static_cast<int>(fibers.size());
    for (Fiber& fiber : fibers) {
        if (fiber.block_op == BlockOp::count) fiber.predicate = count;
        if (fiber.block_op == BlockOp::all) fiber.predicate = count == threads;
        if (fiber.block_op == BlockOp::any) fiber.predicate = count > 0;
        fiber.state = State::ready;
    }
}

void run_block(const dim3& block, const std::vector<unsigned>& order) {
    unsigned n = 0;
    for (unsigned z = 0; z < block.z; ++z)
        for (unsigned y = 0; y < block.y; ++y)
            for (unsigned x = 0; x < block.x; ++x, ++n) {
                Fiber& fiber = fibers[n];
                fiber.state = State::ready;
                fiber.thread = {x, y, z};
                fiber.context.prepare(stacks[n] + kStack, fiber_main);
            }
    for (;;) {
        bool live = false;
        for (const unsigned i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.state == State::ready) {
                current = &fiber;
                threadIdx = fiber.thread;
                switch_context(scheduler, fiber.context);
            }
            live = live || fiber.state != State::done;
        }
        if (!live) return;
        bool progress = false;
        while (resolve_warp_op()) progress = true;
        if (!progress) resolve_barrier();
    }
}

}  // namespace

void fail(const char* format, ...) {
    char text[1024], who[128];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (!running) {
        fprintf(stderr, "cuda_shim, outside a kernel: %s\n", text);
        abort();
    }
    name_thread(who, sizeof(who), current->thread);
    message = std::string(who) + ": " + text;
    siglongjmp(escape, 1);
}

int barrier(BlockOp op, int predicate, const char* file, int line) {
    Fiber& fiber = *current;
    fiber.block_op = op;
    fiber.predicate = predicate;
    fiber.file = file;
    fiber.line = line;
    wait(State::in_barrier);
    return fiber.predicate;
}

void warp(WarpOp op, unsigned mask, uint64_t& value, int argument, int width, const char* file, int line) {
    Fiber& fiber = *current;
    const auto lane = static_cast<unsigned>(current - fibers.data()) % 32;
    if (!(mask >> lane & 1))
        fail("%s:%d: lane %u is not in the mask 0x%08x of its warp operation", file, line, lane, mask);
    if (width < 1 || width > 32 || (width & (width - 1))) fail("%s:%d: width %d of a shuffle", file, line, width);
    fiber.warp_op = op;
    fiber.mask = mask;
    fiber.value = value;
    fiber.argument = argument;
    fiber.width = width;
    fiber.file = file;
    fiber.line = line;
    wait(State::in_warp_op);
    value = fiber.value;
}

void* dynamic_shared() { return dynamic_begin; }

float approximate(double exact, double ulps, float argument) {
    const auto near = static_cast<float>(exact);
    if (!(fabsf(near) >= 0x1p-126f) || isinf(near)) return near;
    uint32_t bits = __float_as_uint(argument);
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
    const double ulp = ldexp(1.0, ilogb(exact) - 23);
    const double part = static_cast<double>(bits >> 8) * 0x1p-24;  // in [0, 1)
    // The floats in reach, and one of them.
    const double first = ceil(exact / ulp - ulps), last = floor(exact / ulp + ulps);
    return static_cast<float>((first + floor(part * (last - first + 1.0))) * ulp);
}

void run(const dim3& grid, const dim3& block, size_t dynamic_bytes, const std::function<void()>& body, int& error) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535 || dynamic_bytes > 227 * 1024) {
        error = cudaErrorInvalidConfiguration;
        return;
    }
    fibers.resize(threads);
    for (uint64_t i = 0; i < threads; ++i)
        if (stacks[i] == nullptr) stacks[i] = guarded_pages(kStack);
    if (dynamic_bytes > dynamic_capacity) {
        dynamic_capacity = round_up(dynamic_bytes, kPage);
        dynamic_pages = guarded_pages(dynamic_capacity);
    }
    // Its end lies at the inaccessible page, as near as an alignment of 16 bytes allows.
    dynamic_begin = dynamic_pages + dynamic_capacity - round_up(dynamic_bytes, 16);
    const SharedBlock shared = static_shared();

    std::vector<unsigned> thread_order(threads);
    std::iota(thread_order.begin(), thread_order.end(), 0u);
    std::vector<uint64_t> block_order(blocks);
    std::iota(block_order.begin(), block_order.end(), uint64_t{0});
    std::mt19937_64 random(order_seed);
    if (order_seed != 0) std::shuffle(block_order.begin(), block_order.end(), random);

    // Faults are handled on a stack of their own; the fiber's may be what is at fault.
    static char* const signal_stack = guarded_pages(64 * 1024);
    stack_t alternate = {}, previous_stack = {};
    alternate.ss_sp = signal_stack;
    alternate.ss_size = 64 * 1024;
    sigaltstack(&alternate, &previous_stack);
    struct sigaction action = {}, previous_segv, previous_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);

    kernel_body = &body;
    blockDim = block;
    gridDim = grid;
    running = true;
    if (sigsetjmp(escape, 1) == 0) {
        for (const uint64_t b : block_order) {
            blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                        static_cast<unsigned>(b / grid.x / grid.y)};
            if (shared.data != nullptr) memset(shared.data, kPoison, shared.bytes);
            if (dynamic_bytes > 0) memset(dynamic_begin, kPoison, round_up(dynamic_bytes, 16));
            if (order_seed != 0) std::shuffle(thread_order.begin(), thread_order.end(), random);
            run_block(block, thread_order);
            ++blocks_run;
        }
        error = cudaSuccess;
    } else {
        error = cudaErrorLaunchFailure;
    }
    running = false;
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaction(SIGBUS, &previous_bus, nullptr);
    sigaltstack(&previous_stack, nullptr);
}

}  // namespace cuda_shim

// ---- for the tests

using namespace cuda_shim;

extern "C" {

// 0: blocks and threads in their natural order; anything else seeds a shuffled one.
void cuda_shim_order(uint64_t seed) { order_seed = seed; }

int64_t cuda_shim_blocks() { return blocks_run; }

// The message of the last launch that failed, then none.
const char* cuda_shim_message() {
    static std::string last;
    last.swap(message);
    message.clear();
    return last.c_str();
}

// Memory filled with NaN, `misalignment` bytes off a multiple of 16 and ending as near as that allows to an
// inaccessible page.
void* cuda_shim_allocate(size_t bytes, size_t misalignment, const char* name) {
    Buffer buffer;
    buffer.name = name;
    buffer.bytes = bytes;
    buffer.page_bytes = round_up(bytes + misalignment + 16, kPage);
    buffer.pages = guarded_pages(buffer.page_bytes);
    memset(buffer.pages, kPoison, buffer.page_bytes);
    const size_t slack = buffer.page_bytes - bytes;
    char* begin = buffer.pages + (slack - misalignment) / 16 * 16 + misalignment;
    buffers[begin] = buffer;
    return begin;
}

void cuda_shim_read_only(void* begin) {
    const Buffer& buffer = buffers.at(static_cast<char*>(begin));
    mprotect(buffer.pages, buffer.page_bytes, PROT_READ);
}

// The name of a buffer beside which something was written, or none.
const char* cuda_shim_overrun() {
    const auto poisoned = [](char c) { return static_cast<unsigned char>(c) == kPoison; };
    for (const auto& [begin, buffer] : buffers)
        if (!std::all_of(buffer.pages, begin, poisoned) ||
            !std::all_of(begin + buffer.bytes, buffer.pages + buffer.page_bytes, poisoned))
            return buffer.name.c_str();
    return "";
}

void cuda_shim_free(void* begin) {
    const auto found = buffers.find(static_cast<char*>(begin));
    munmap(found->second.pages - kGuard, found->second.page_bytes + 2 * kGuard);
    buffers.erase(found);
}

// ---- what -fsanitize calls; the data begin with the place in the source

struct Source {
    const char* file;
    unsigned line, column;
};
struct TypeDescriptor {
    uint16_t kind, info;
    char name[1];
};
struct TypeMismatch {
    Source source;
    const TypeDescriptor* type;
    unsigned char log_alignment, kind;
};

static const char* base_name(const char* file) {
    const char* slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t address) {
    fail("%s:%u: access to %s at %p, which is %s", base_name(data->source.file), data->source.line, data->type->name,
         reinterpret_cast<void*>(address), address == 0 ? "null" : "not aligned to it");
}

#define CUDA_SHIM_HANDLER(name, text)                                                          \
    [[noreturn]] void __ubsan_handle_##name##_abort(const Source* source, uintptr_t value) {   \
        fail("%s:%u: " text, base_name(source->file), source->line, static_cast<long>(value)); \
    }
CUDA_SHIM_HANDLER(out_of_bounds, "array index %ld out of bounds")
CUDA_SHIM_HANDLER(shift_out_of_bounds, "shift of %ld by more than its bits")
CUDA_SHIM_HANDLER(add_overflow, "signed overflow, %ld + ...")
CUDA_SHIM_HANDLER(sub_overflow, "signed overflow, %ld - ...")
CUDA_SHIM_HANDLER(mul_overflow, "signed overflow, %ld * ...")
CUDA_SHIM_HANDLER(negate_overflow, "signed overflow, -(%ld)")
CUDA_SHIM_HANDLER(divrem_overflow, "division of %ld by zero or overflow")
}
