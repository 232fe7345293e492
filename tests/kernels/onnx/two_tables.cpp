// Registers the library with two stand-ins of ONNX Runtime, and runs an op of the first one.
//
//   two_tables LIBRARY
//
// Each must get a domain of its own, once, and the run and its refusal must call the first one only.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "op_cases.h"
#include "stand_in.h"

using namespace stand_in;

namespace {

// How often a stand-in was asked for a domain, for the inputs of a node, and for an error.
struct Calls {
  int domains = 0, runs = 0, errors = 0;
};
Calls calls[2];

template <int kIndex>
const void* const* counting_table(uint32_t) {
  static std::vector<const void*> slots = [] {
    std::vector<const void*> all(table(0), table(0) + 400);
    const auto set = [&](Slot slot, auto* function) {
      all[slot] = reinterpret_cast<const void*>(function);
    };
    set(kCreateCustomOpDomain, +[](const char* name, void** domain) {
      ++calls[kIndex].domains;
      return create_domain(name, domain);
    });
    set(kKernelContext_GetInputCount, +[](const void* context, size_t* count) {
      ++calls[kIndex].runs;
      return input_count(context, count);
    });
    set(kCreateStatus, +[](int code, const char* text) {
      ++calls[kIndex].errors;
      return create_status(code, text);
    });
    return all;
  }();
  return slots.data();
}

const ApiBase kFirst = {counting_table<0>, version}, kSecond = {counting_table<1>, version};

const CustomOp* op_named(const std::string& name) {
  for (const CustomOp* op : registered)
    if (name == op->GetName(op)) return op;
  return nullptr;
}

// Runs an op that was registered with the first stand-in; returns the error.
std::string run_first(const CustomOp* op, Node& node) {
  void* kernel = nullptr;
  if (op->CreateKernelV2(op, counting_table<0>(0), &node, &kernel)) return "no kernel";
  Status* failed = op->KernelComputeV2(kernel, &node);
  op->KernelDestroy(kernel);
  const std::string text = failed ? *static_cast<std::string*>(failed) : "";
  if (failed) release_status(failed);
  return text;
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  const auto start = library ? reinterpret_cast<void* (*)(void*, const ApiBase*)>(
                                   dlsym(library, "RegisterCustomOps"))
                             : nullptr;
  if (!start) return std::printf("%s\n", dlerror()), 1;
  for (const ApiBase* base : {&kFirst, &kSecond, &kFirst, &kSecond})
    if (start(nullptr, base)) return 1;
  std::vector<Case> cases;
  kCases.at("SoftCap")(cases);
  Node good = node_of(cases.front(), Memory::kHeap, false, false), empty;
  const std::string result = run_first(op_named("SoftCap"), good);
  const std::string refusal = run_first(op_named("SoftCap"), empty);
  for (const Calls& one : calls) std::printf("%d %d %d\n", one.domains, one.runs, one.errors);
  std::printf("%s\n%s\n", result.c_str(), refusal.c_str());
  return 0;
}
