// A libFuzzer target: one run of one op, which has to end in an error where its definition forbids
// what was asked, and otherwise in the oracle's answer.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "dispatch.h"
#include "question.h"

extern "C" void* RegisterCustomOps(void* options, const rgexport::ort::ApiBase* base);

namespace fuzz {
namespace {

Array copy_of(const Tensor* tensor) {
  Array copy;
  if (!tensor) return copy;
  copy.given = true;
  copy.type = tensor->type;
  copy.dims = tensor->dims;
  const int64_t count = tensor->buffer->bytes() / std::max<size_t>(1, stand_in::size_of(tensor->type));
  if (tensor->type == kFloat) copy.floats.assign(tensor->as<float>(), tensor->as<float>() + count);
  if (tensor->type == kUint8) copy.bytes.assign(tensor->as<uint8_t>(), tensor->as<uint8_t>() + count);
  if (tensor->type == kInt64)
    copy.positions.assign(tensor->as<int64_t>(), tensor->as<int64_t>() + count);
  return copy;
}

std::vector<Array> copies_of(const std::vector<std::unique_ptr<Tensor>>& tensors) {
  std::vector<Array> all;
  for (const auto& tensor : tensors) all.push_back(copy_of(tensor.get()));
  return all;
}

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

// One of those here; AMX seldom, for its emulation takes ten times as long as all the others.
const std::string& a_set(Bytes& bytes) {
  const auto& all = instruction_sets();
  const std::string& found = all[bytes.below(all.size())];
  return found == "amx" && !bytes.one_in(8) ? all.front() : found;
}

// Half of the time one of the scan, attention and the convolution, which stand in this order: the
// products have so much code that libFuzzer comes back to them by itself.
const stand_in::CustomOp* an_op(Bytes& bytes) {
  constexpr size_t kScan = 3, kWithStates = 3;
  const size_t count = stand_in::registered.size(), at = bytes.below(2 * count);
  return stand_in::registered[at < count ? at : kScan + at % kWithStates];
}

void run_one(Bytes& bytes) {
  const stand_in::CustomOp* op = an_op(bytes);
  const std::string& set = a_set(bytes);
  choose(set, bytes.next());
  Node node;
  node.threads = bytes.one_in(64) ? 2 : 1;
  Question question;
  question.op = op->GetName(op);
  Maker(bytes).make(question.op, node);
  question.integers = node.integers;
  question.reals = node.reals;
  question.inputs = copies_of(node.inputs);
  question.in_bfloat16 = set == "amx";
  const bool sound = is_sound(question);
  const std::string refusal = stand_in::run(op, node);
  (refusal.empty() ? counts.of[question.op].first : counts.of[question.op].second) += 1;
  if (!refusal.empty()) {
    if (sound && refusal != "no memory for an output")
      tell(question, set.c_str(), "refuses what is sound: " + refusal);
    if (!sound && refusal.rfind(question.op + ": ", 0) != 0)
      tell(question, set.c_str(), "a refusal without the op's name: " + refusal);
    return;
  }
  if (!sound) tell(question, set.c_str(), "runs what it has to refuse");
  const std::string wrong = judge(question, copies_of(node.outputs));
  if (!wrong.empty()) tell(question, set.c_str(), wrong);
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
