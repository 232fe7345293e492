// Runs all ops of the library over odd shapes, for the sanitizers to watch.
//
//   sanitized_ops LIBRARY            the cases of op_cases.h
//   sanitized_ops LIBRARY refusals   those of refusals.h, each of which must end in an error
//
// Checks that every output is written whole, and that it is the same in both kinds of memory, in
// place or not.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "op_cases.h"
#include "refusals.h"
#include "stand_in.h"

using namespace stand_in;

namespace {

// ---- The runs -------------------------------------------------------------------------------

std::vector<std::vector<float>> run(const CustomOp* op, const Case& one, Memory memory,
                                    bool in_place, bool constants = false) {
  Node node = node_of(one, memory, in_place, constants);
  const std::string failed = stand_in::run(op, node);
  if (!failed.empty()) {
    std::printf("%s: %s\n", one.op.c_str(), failed.c_str());
    std::exit(1);
  }
  std::vector<std::vector<float>> results;
  for (const auto& tensor : node.outputs) {
    const float* data = tensor->as<float>();
    results.emplace_back(data, data + elements(tensor->dims));
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

// Every one is refused, by an error that begins with the op's name and has the value in it.
int refuse_all(const char* set) {
  std::vector<Refusal> all;
  add_refusals(all);
  for (Refusal& one : all) {
    const CustomOp* op = nullptr;
    for (const CustomOp* known : registered)
      if (one.op == known->GetName(known)) op = known;
    const std::string failed = op ? stand_in::run(op, one.node) : "no such op";
    if (failed.rfind(one.op + ": ", 0) != 0 || failed.find(one.word) == std::string::npos) {
      std::printf("%s, %s: \"%s\"\n", one.op.c_str(), one.word.c_str(), failed.c_str());
      return 1;
    }
  }
  std::printf("%s refusals %zu\n", set, all.size());
  return 0;
}

int check_all(const char* set) {
  for (const CustomOp* op : registered) {
    const auto found = kCases.find(op->GetName(op));
    if (found == kCases.end()) {
      std::printf("%s: no cases in this program\n", op->GetName(op));
      return 1;
    }
    std::vector<Case> cases;
    found->second(cases);
    for (const Case& one : cases) check(op, one);
    std::printf("%s %s %zu\n", set, found->first.c_str(), cases.size());
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  const auto start = reinterpret_cast<void* (*)(void*, const ApiBase*)>(
      dlsym(library, "RegisterCustomOps"));
  const auto set = reinterpret_cast<const char* (*)()>(dlsym(library, "rgexport_instruction_set"));
  if (start(nullptr, &kBase)) return 1;
  return count > 2 ? refuse_all(set()) : check_all(set());
}
