// A libFuzzer target: one run of one op, which has to end in an error where its definition forbids
// what was asked, and otherwise in the oracle's answer.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "dispatch.h"
#include "examine.h"

extern "C" void* RegisterCustomOps(void* options, const rgexport::ort::ApiBase* base);

namespace fuzz {
namespace {

void tell(const Question& question, const char* set, const std::string& what) {
  std::fprintf(stderr, "FINDING %s on %s: %s\n", question.op.c_str(), set, what.c_str());
  for (const auto& [name, value] : question.integers)
    std::fprintf(stderr, "  %s = %lld\n", name.c_str(), static_cast<long long>(value));
  for (const auto& [name, value] : question.reals)
    std::fprintf(stderr, "  %s = %g\n", name.c_str(), static_cast<double>(value));
  for (size_t i = 0; i < question.inputs.size(); ++i) {
    const Array& input = question.inputs[i];
    std::fprintf(stderr, "  input %zu: %s type %d [", i, input.given ? "" : "missing", input.type);
    for (int64_t d : input.dims) std::fprintf(stderr, " %lld", static_cast<long long>(d));
    std::fprintf(stderr, " ]");
    for (size_t k = 0; k < input.floats.size() && k < 6; ++k)
      std::fprintf(stderr, " %.9g", static_cast<double>(input.floats[k]));
    for (size_t k = 0; k < input.positions.size() && k < 6; ++k)
      std::fprintf(stderr, " %lld", static_cast<long long>(input.positions[k]));
    std::fprintf(stderr, "\n");
  }
  std::abort();
}

// How often each op ran and how often it refused, told when the process ends.
struct Counts {
  std::map<std::string, std::pair<long, long>> of;
  ~Counts() {
    for (const auto& [op, counts] : of)
      std::fprintf(stderr, "COUNT %s %ld %ld\n", op.c_str(), counts.first, counts.second);
  }
};
Counts counts;

// Half of the time one of the scan, attention and the convolution, which stand in this order: the
// products have so much code that libFuzzer comes back to them by itself.
const stand_in::CustomOp* an_op(Bytes& bytes) {
  constexpr size_t kScan = 3, kWithStates = 3;
  const size_t count = stand_in::registered.size(), at = bytes.below(2 * count);
  return stand_in::registered[at < count ? at : kScan + at % kWithStates];
}

// One of those here; AMX seldom, for its emulation takes ten times as long as all the others.
const std::string& a_set(Bytes& bytes) {
  const auto& all = instruction_sets();
  const std::string& found = all[bytes.below(all.size())];
  return found == "amx" && !bytes.one_in(8) ? all.front() : found;
}

void run_one(Bytes& bytes) {
  const stand_in::CustomOp* op = an_op(bytes);
  const std::string& set = a_set(bytes);
  choose(set, bytes.next());
  Node node;
  node.threads = bytes.one_in(64) ? 2 : 1;
  Maker(bytes).make(op->GetName(op), node);
  const Question question = question_of(op, node, set == "amx");
  const Answer answer = examine(op, node, question);
  (answer.refused ? counts.of[question.op].second : counts.of[question.op].first) += 1;
  if (!answer.finding.empty()) tell(question, set.c_str(), answer.finding);
}

}  // namespace
}  // namespace fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  if (RegisterCustomOps(nullptr, &stand_in::kBase)) std::abort();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  fuzz::run_one(bytes);
  return 0;
}
