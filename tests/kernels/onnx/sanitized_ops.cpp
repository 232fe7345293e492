// Runs all ops of the library over odd shapes, for the sanitizers to watch.
//
//   sanitized_ops LIBRARY
//
// Stands in for ONNX Runtime: a table with the slots that the library uses. Tensors have exactly
// their size, either between the red zones of the heap, or so that they end where a page ends
// behind which nothing may be read; ParallelFor is two threads. Also checks that every output is
// written whole, and that it is the same in both kinds of memory, in place or not.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "op_cases.h"
#include "ort_abi.h"

using namespace rgexport::ort;

namespace {

int64_t product(const Dims& dims) {
  int64_t count = 1;
  for (int64_t d : dims) count *= d;
  return count;
}

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

struct Tensor {
  Dims dims;
  std::shared_ptr<Buffer> buffer;
};

// ---- The stand-in ---------------------------------------------------------------------------

std::vector<const CustomOp*> registered;

struct Run {
  std::vector<std::unique_ptr<Tensor>> inputs;
  std::vector<std::unique_ptr<Tensor>> outputs;
  std::map<size_t, size_t> in_place;
  Memory memory;
};

Status* create_status(int, const char* text) { return new std::string(text); }
void release_status(Status* status) { delete static_cast<std::string*>(status); }
Status* create_domain(const char*, void** domain) {
  *domain = &registered;
  return nullptr;
}
Status* add_op(void*, const CustomOp* op) {
  registered.push_back(op);
  return nullptr;
}
Status* add_domain(void*, void*) { return nullptr; }
Status* data_of(void* value, void** data) {
  *data = static_cast<Tensor*>(value)->buffer->data();
  return nullptr;
}
Status* shape_of(const void* value, void** info) {
  *info = new Dims(static_cast<const Tensor*>(value)->dims);
  return nullptr;
}
void release_shape(void* info) { delete static_cast<Dims*>(info); }
Status* rank_of(const void* info, size_t* rank) {
  *rank = static_cast<const Dims*>(info)->size();
  return nullptr;
}
Status* dims_of(const void* info, int64_t* dims, size_t) {
  for (int64_t d : *static_cast<const Dims*>(info)) *dims++ = d;
  return nullptr;
}
// What a kernel is made of.
struct Node {
  const Case& one;
  const Run& run;
  bool constants;  // all inputs but the first and the states

  bool is_constant(size_t index) const {
    if (!constants || index < 1 || index >= run.inputs.size()) return false;
    for (const auto& state : one.in_place)
      if (state.second == index) return false;
    return true;
  }
};

Status* attribute(const void* info, const char* name, int64_t* value) {
  const auto& all = static_cast<const Node*>(info)->one.attributes;
  const auto found = all.find(name);
  if (found == all.end()) return create_status(1, "no such attribute");
  *value = found->second;
  return nullptr;
}
Status* no_float(const void*, const char*, float*) { return create_status(1, "the default"); }
Status* constant_input(const void* info, size_t index, int* constant, const void** value) {
  const auto& node = *static_cast<const Node*>(info);
  *constant = node.is_constant(index);
  if (*constant) *value = node.run.inputs[index].get();
  return nullptr;
}
Status* input_count(const void* context, size_t* count) {
  *count = static_cast<const Run*>(context)->inputs.size();
  return nullptr;
}
Status* input(const void* context, size_t index, const void** value) {
  *value = static_cast<const Run*>(context)->inputs[index].get();
  return nullptr;
}
Status* output(void* context, size_t index, const int64_t* dims, size_t rank, void** value) {
  Run& run = *static_cast<Run*>(context);
  if (run.outputs.size() <= index) run.outputs.resize(index + 1);
  auto tensor = std::make_unique<Tensor>();
  tensor->dims.assign(dims, dims + rank);
  const size_t count = product(tensor->dims) * sizeof(float);
  const auto shared = run.in_place.find(index);
  if (shared != run.in_place.end()) {
    tensor->buffer = run.inputs[shared->second]->buffer;
    if (tensor->buffer->bytes() != count) return create_status(1, "a state changes its size");
  } else {
    tensor->buffer = std::make_shared<Buffer>(run.memory, count);
    std::memset(tensor->buffer->data(), 0xff, count);  // not numbers
  }
  *value = tensor.get();
  run.outputs[index] = std::move(tensor);
  return nullptr;
}
Status* parallel_for(const void*, void (*body)(void*, size_t), size_t count, size_t, void* user) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) body(user, i);
  };
  std::thread other(work);
  work();
  other.join();
  return nullptr;
}

std::vector<const void*> make_api() {
  std::vector<const void*> api(400, nullptr);
  const auto set = [&](Slot slot, auto* function) {
    api[slot] = reinterpret_cast<const void*>(function);
  };
  set(kCreateStatus, create_status);
  set(kReleaseStatus, release_status);
  set(kCreateCustomOpDomain, create_domain);
  set(kCustomOpDomain_Add, add_op);
  set(kAddCustomOpDomain, add_domain);
  set(kGetTensorMutableData, data_of);
  set(kGetTensorTypeAndShape, shape_of);
  set(kReleaseTensorTypeAndShapeInfo, release_shape);
  set(kGetDimensionsCount, rank_of);
  set(kGetDimensions, dims_of);
  set(kKernelInfoGetAttribute_int64, attribute);
  set(kKernelInfoGetAttribute_float, no_float);
  set(kKernelInfoGetConstantInput_tensor, constant_input);
  set(kKernelContext_GetInputCount, input_count);
  set(kKernelContext_GetInput, input);
  set(kKernelContext_GetOutput, output);
  set(kKernelContext_ParallelFor, parallel_for);
  return api;
}

const std::vector<const void*> api = make_api();

// ---- The runs -------------------------------------------------------------------------------

std::unique_ptr<Tensor> make(const Input& input, Memory memory, uint32_t seed) {
  static const std::map<ElementType, size_t> sizes = {{kFloat, 4}, {kUint8, 1}, {kInt64, 8}};
  if (sizes.find(input.type) == sizes.end()) return nullptr;
  auto tensor = std::make_unique<Tensor>();
  tensor->dims = input.dims;
  const size_t count = product(input.dims);
  tensor->buffer = std::make_shared<Buffer>(memory, count * sizes.at(input.type));
  void* data = tensor->buffer->data();
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    if (input.type == kFloat) static_cast<float*>(data)[i] = input.middle + int32_t(seed) * 0x1p-31f;
    if (input.type == kUint8) static_cast<uint8_t*>(data)[i] = seed >> 24;
    if (input.type == kInt64) static_cast<int64_t*>(data)[i] = input.start + i % input.dims[1];
  }
  return tensor;
}

std::vector<std::vector<float>> run(const CustomOp* op, const Case& one, Memory memory,
                                    bool in_place, bool constants = false) {
  Run context;
  context.memory = memory;
  if (in_place) context.in_place = one.in_place;
  for (const Input& input : one.inputs)
    context.inputs.push_back(make(input, memory, context.inputs.size() + 1));
  const Node node{one, context, constants};
  void* kernel = nullptr;
  Status* failed = op->CreateKernelV2(op, api.data(), &node, &kernel);
  if (!failed) failed = op->KernelComputeV2(kernel, &context);
  if (failed) {
    std::printf("%s: %s\n", one.op.c_str(), static_cast<std::string*>(failed)->c_str());
    std::exit(1);
  }
  op->KernelDestroy(kernel);
  std::vector<std::vector<float>> results;
  for (const auto& tensor : context.outputs) {
    const float* data = static_cast<const float*>(tensor->buffer->data());
    results.emplace_back(data, data + product(tensor->dims));
  }
  return results;
}

void require(bool good, const Case& one, const char* what) {
  if (good) return;
  std::printf("%s: %s; inputs:", one.op.c_str(), what);
  for (const Input& input : one.inputs) {
    std::printf(" [");
    for (int64_t d : input.dims) std::printf(" %lld", static_cast<long long>(d));
    std::printf(" ]");
  }
  for (const auto& [name, value] : one.attributes)
    std::printf(" %s=%lld", name.c_str(), static_cast<long long>(value));
  std::printf("\n");
  std::exit(1);
}

void check(const CustomOp* op, const Case& one) {
  const auto results = run(op, one, Memory::kHeap, false);
  for (const auto& result : results)
    for (float y : result) require(std::isfinite(y), one, "an output is not written whole");
  require(run(op, one, Memory::kPageEnd, false) == results, one, "memory changes the result");
  require(run(op, one, Memory::kHeap, false, true) == results, one, "constants are another result");
  if (!one.in_place.empty()) {
    require(run(op, one, Memory::kHeap, true) == results, one, "in place it is another result");
    require(run(op, one, Memory::kPageEnd, true) == results, one, "in place it is another result");
  }
}

const void* const* table(uint32_t) { return api.data(); }
const char* version() { return "a stand-in"; }

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  const auto start = reinterpret_cast<void* (*)(void*, const ApiBase*)>(
      dlsym(library, "RegisterCustomOps"));
  const auto set = reinterpret_cast<const char* (*)()>(dlsym(library, "rgexport_instruction_set"));
  const ApiBase base = {table, version};
  if (start(nullptr, &base)) return 1;
  for (const CustomOp* op : registered) {
    const auto found = kCases.find(op->GetName(op));
    if (found == kCases.end()) {
      std::printf("%s: no cases in this program\n", op->GetName(op));
      return 1;
    }
    std::vector<Case> cases;
    found->second(cases);
    for (const Case& one : cases) check(op, one);
    std::printf("%s %s %zu\n", set(), found->first.c_str(), cases.size());
  }
  return 0;
}
