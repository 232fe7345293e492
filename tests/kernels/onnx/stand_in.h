// A stand-in for ONNX Runtime: the slots that the library uses, for programs that run its ops.
//
// Tensors have exactly their size, either between the red zones of the heap, or so that they end
// where a page ends behind which nothing may be read. What ONNX Runtime does not promise, this does
// not do: tasks run in the reverse order, or on two threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort_abi.h"

namespace stand_in {

using namespace rgexport::ort;

using Dims = std::vector<int64_t>;

// ---- Memory of exactly a size ---------------------------------------------------------------

enum class Memory { kHeap, kPageEnd };

class Buffer {
 public:
  Buffer(Memory memory, size_t bytes) : bytes_(bytes) {
    if (memory == Memory::kHeap) {
      data_ = std::malloc(bytes);
      return;
    }
    const size_t page = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes + page - 1) / page * page + page;
    start_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) std::abort();
    char* end = static_cast<char*>(start_) + mapped_ - page;
    if (mprotect(end, page, PROT_NONE)) std::abort();
    data_ = end - bytes;
  }
  ~Buffer() {
    if (mapped_) {
      munmap(start_, mapped_);
    } else {
      std::free(data_);
    }
  }
  Buffer(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, mapped_ = 0;
  void *data_ = nullptr, *start_ = nullptr;
};

// Bytes of an element; 0 of a type that is not stood in for.
inline size_t size_of(ElementType type) {
  constexpr int kDouble = 11, kInt8 = 3;
  switch (static_cast<int>(type)) {
    case kFloat: return 4;
    case kFloat16: case kBfloat16: return 2;
    case kUint8: case kInt8: return 1;
    case kInt64: case kDouble: return 8;
    case kUndefined: break;
  }
  return 0;
}

// Elements; -1 where they are more than a test would have memory for, or a dimension is negative.
inline int64_t elements(const Dims& dims) {
  constexpr int64_t kMost = int64_t{1} << 24;
  int64_t count = 1;
  bool negative = false;
  for (int64_t d : dims) {
    negative |= d < 0;
    if (__builtin_mul_overflow(count, d, &count)) return -1;
  }
  return negative || count > kMost ? -1 : count;
}

struct Tensor {
  ElementType type;
  Dims dims;
  std::shared_ptr<Buffer> buffer;

  template <class T>
  T* as() const {
    return static_cast<T*>(buffer->data());
  }
};

// What a kernel is made of, and what one run of it sees.
struct Node {
  std::map<std::string, int64_t> integers;
  std::map<std::string, float> reals;
  std::vector<std::unique_ptr<Tensor>> inputs;  // null: missing
  std::vector<bool> constant;                   // of inputs; any after the last are not

  std::map<size_t, size_t> in_place;  // output → input
  Memory memory = Memory::kHeap;      // of outputs
  int threads = 2;
  std::vector<std::unique_ptr<Tensor>> outputs;
};

// ---- The slots ------------------------------------------------------------------------------

inline std::vector<const CustomOp*> registered;
inline std::atomic<int64_t> open_shapes{0};  // that an op has asked for and not released

inline Status* create_status(int, const char* text) { return new std::string(text); }
inline void release_status(Status* status) { delete static_cast<std::string*>(status); }
inline Status* create_domain(const char*, void** domain) {
  *domain = &registered;
  return nullptr;
}
inline Status* add_op(void*, const CustomOp* op) {
  registered.push_back(op);
  return nullptr;
}
inline Status* add_domain(void*, void*) { return nullptr; }
inline Status* data_of(void* value, void** data) {
  *data = static_cast<Tensor*>(value)->buffer->data();
  return nullptr;
}
inline Status* shape_of(const void* value, void** info) {
  ++open_shapes;
  *info = const_cast<void*>(value);
  return nullptr;
}
inline void release_shape(void*) { --open_shapes; }
inline Status* type_of(const void* info, int* type) {
  *type = static_cast<const Tensor*>(info)->type;
  return nullptr;
}
inline Status* rank_of(const void* info, size_t* rank) {
  *rank = static_cast<const Tensor*>(info)->dims.size();
  return nullptr;
}
inline Status* dims_of(const void* info, int64_t* dims, size_t) {
  for (int64_t d : static_cast<const Tensor*>(info)->dims) *dims++ = d;
  return nullptr;
}

template <class Value>
Status* attribute(const std::map<std::string, Value>& all, const char* name, Value* value) {
  const auto found = all.find(name);
  if (found == all.end()) return create_status(1, "no such attribute");
  *value = found->second;
  return nullptr;
}
inline Status* integer(const void* info, const char* name, int64_t* value) {
  return attribute(static_cast<const Node*>(info)->integers, name, value);
}
inline Status* real(const void* info, const char* name, float* value) {
  return attribute(static_cast<const Node*>(info)->reals, name, value);
}
inline Status* constant_input(const void* info, size_t index, int* constant, const void** value) {
  const auto& node = *static_cast<const Node*>(info);
  *constant = index < node.inputs.size() && index < node.constant.size() && node.constant[index];
  if (*constant) *value = node.inputs[index].get();
  return nullptr;
}
inline Status* input_count(const void* context, size_t* count) {
  *count = static_cast<const Node*>(context)->inputs.size();
  return nullptr;
}
inline Status* input(const void* context, size_t index, const void** value) {
  *value = static_cast<const Node*>(context)->inputs[index].get();
  return nullptr;
}
inline Status* output(void* context, size_t index, const int64_t* dims, size_t rank, void** value) {
  Node& node = *static_cast<Node*>(context);
  if (node.outputs.size() <= index) node.outputs.resize(index + 1);
  auto tensor = std::make_unique<Tensor>();
  tensor->type = kFloat;
  tensor->dims.assign(dims, dims + rank);
  const int64_t count = elements(tensor->dims);
  if (count < 0) return create_status(1, "no memory for an output");
  const size_t bytes = count * sizeof(float);
  const auto shared = node.in_place.find(index);
  if (shared != node.in_place.end() && node.inputs[shared->second]) {
    tensor->buffer = node.inputs[shared->second]->buffer;
    if (tensor->buffer->bytes() != bytes) return create_status(1, "a state changes its size");
  } else {
    tensor->buffer = std::make_shared<Buffer>(node.memory, bytes);
    std::memset(tensor->buffer->data(), 0xff, bytes);  // not numbers
  }
  *value = tensor.get();
  node.outputs[index] = std::move(tensor);
  return nullptr;
}
inline Status* parallel_for(const void* context, void (*body)(void*, size_t), size_t count, size_t,
                            void* user) {
  if (static_cast<const Node*>(context)->threads < 2) {
    while (count > 0) body(user, --count);
    return nullptr;
  }
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) body(user, i);
  };
  std::thread other(work);
  work();
  other.join();
  return nullptr;
}

inline const void* const* table(uint32_t) {
  static const std::vector<const void*> api = [] {
    std::vector<const void*> all(400, nullptr);
    const auto set = [&](Slot slot, auto* function) {
      all[slot] = reinterpret_cast<const void*>(function);
    };
    set(kCreateStatus, create_status);
    set(kReleaseStatus, release_status);
    set(kCreateCustomOpDomain, create_domain);
    set(kCustomOpDomain_Add, add_op);
    set(kAddCustomOpDomain, add_domain);
    set(kGetTensorMutableData, data_of);
    set(kGetTensorTypeAndShape, shape_of);
    set(kGetTensorElementType, type_of);
    set(kReleaseTensorTypeAndShapeInfo, release_shape);
    set(kGetDimensionsCount, rank_of);
    set(kGetDimensions, dims_of);
    set(kKernelInfoGetAttribute_int64, integer);
    set(kKernelInfoGetAttribute_float, real);
    set(kKernelInfoGetConstantInput_tensor, constant_input);
    set(kKernelContext_GetInputCount, input_count);
    set(kKernelContext_GetInput, input);
    set(kKernelContext_GetOutput, output);
    set(kKernelContext_ParallelFor, parallel_for);
    return all;
  }();
  return api.data();
}
inline const char* version() { return "a stand-in"; }
inline const ApiBase kBase = {table, version};

// Makes a kernel and runs it once; what refused it, or nothing.
inline std::string run(const CustomOp* op, Node& node) {
  const auto text = [](Status* failed) {
    const std::string found = *static_cast<std::string*>(failed);
    release_status(failed);
    return found;
  };
  void* kernel = nullptr;
  if (Status* failed = op->CreateKernelV2(op, table(0), &node, &kernel)) return text(failed);
  Status* failed = op->KernelComputeV2(kernel, &node);
  op->KernelDestroy(kernel);
  if (open_shapes != 0) return "shapes were not released";
  return failed ? text(failed) : "";
}

}  // namespace stand_in
