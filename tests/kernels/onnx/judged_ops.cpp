// Holds the library against the oracles of fuzz/ops, and the oracles against answers that are wrong.
//
//   judged_ops LIBRARY
//
// The answers of op_cases.h have to be right, and one changed number of any output wrong; all of
// refusals.h has to be what the oracles forbid.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "examine.h"
#include "op_cases.h"
#include "refusals.h"

using stand_in::CustomOp;
using stand_in::Memory;
using stand_in::registered;

namespace {

void require(bool holds, const std::string& op, const std::string& what) {
  if (holds) return;
  std::printf("%s: %s\n", op.c_str(), what.c_str());
  std::exit(1);
}

void check_case(const CustomOp* op, const Case& one, size_t index, bool in_bfloat16) {
  Node node = node_of(one, Memory::kHeap, index % 2, index % 3);
  const fuzz::Question question = fuzz::question_of(op, node, in_bfloat16);
  const fuzz::Answer answer = fuzz::examine(op, node, question);
  require(!answer.refused && answer.finding.empty(), one.op, answer.finding);
  std::vector<fuzz::Array> outputs = fuzz::copies_of(node.outputs);
  for (fuzz::Array& output : outputs) {
    if (output.floats.empty()) continue;
    float& number = output.floats[index * 7919 % output.floats.size()];
    const float right = number;
    // AMX sums products of activations in bfloat16, which a fault has to exceed.
    const float fault = (in_bfloat16 ? 1024 : 1) * (0.5f + std::fabs(right));
    for (const float wrong : {right + fault, NAN, INFINITY}) {
      number = wrong;
      require(!fuzz::judge(question, outputs).empty(), one.op, "its oracle takes a wrong answer");
    }
    number = right;
  }
}

void check_cases(const CustomOp* op, bool in_bfloat16) {
  std::vector<Case> cases;
  kCases.at(op->GetName(op))(cases);
  for (size_t i = 0; i < cases.size(); ++i) check_case(op, cases[i], i, in_bfloat16);
}

void check_refusals() {
  std::vector<Refusal> all;
  add_refusals(all);
  for (const Refusal& one : all)
    for (const CustomOp* op : registered)
      if (one.op == op->GetName(op))
        require(!fuzz::is_sound(fuzz::question_of(op, one.node, false)), one.op,
                "its oracle allows what is refused with " + one.word);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  require(library, "the library", library ? "" : dlerror());
  const auto start = reinterpret_cast<void* (*)(void*, const stand_in::ApiBase*)>(
      dlsym(library, "RegisterCustomOps"));
  const auto set = reinterpret_cast<const char* (*)()>(dlsym(library, "rgexport_instruction_set"));
  if (start(nullptr, &stand_in::kBase)) return 1;
  for (const CustomOp* op : registered) {
    check_cases(op, set() == std::string("amx"));
    std::printf("%s %s\n", set(), op->GetName(op));
  }
  check_refusals();
  return 0;
}
