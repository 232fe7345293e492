// The ops of this library, as ONNX Runtime and library.py see them.
#include <atomic>
#include <mutex>
#include <new>

#include "cpu.h"
#include "floats.h"
#include "op.h"
#include "ops.h"
#include "quant_matmul.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace rgexport {
namespace {

using namespace ort;

constexpr char kDomain[] = "ai.rgexport";

template <class Op>
struct Registered {
  static inline std::atomic<int64_t> calls{0};

  // `api` is of the ONNX Runtime that made it: a process may have several.
  struct Kernel {
    Kernel(const void* const* api, const void* info)
        : api(api), op(Attributes(api, info)), constants(api, info, Op::kSignature) {}
    const void* const* const api;
    const Op op;
    const Constants constants;
  };

  // The only file that is compiled with exceptions: what the standard library throws ends here.
  static Status* create(const CustomOp*, const void* table, const void* info, void** kernel) {
    const auto api = static_cast<const void* const*>(table);
    *kernel = nullptr;
    try {
      *kernel = new Kernel(api, info);
      return nullptr;
    } catch (...) {
      return failure(api, "no memory is left for a kernel");
    }
  }
  static Status* compute(void* kernel, void* context) {
    calls.fetch_add(1, std::memory_order_relaxed);
    const auto& [api, op, constants] = *static_cast<const Kernel*>(kernel);
    try {
      Context run(api, context, Op::kSignature, constants);
      if (!run.refused()) op.run(run);
      return run.refusal();
    } catch (...) {
      return failure(api, "no memory is left for a run");
    }
  }
  static constexpr Presence presence(const CustomOp*, size_t index) {
    return index < Op::kSignature.required ? kRequired : kOptional;
  }
  static constexpr CustomOp make() {
    CustomOp op{};
    op.version = kApiVersion;
    op.GetName = [](const CustomOp*) { return Op::kSignature.name; };
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op.GetInputType = [](const CustomOp*, size_t i) {
      const ElementType type = Op::kSignature.input_types[i];
      return type < 0 ? kUndefined : type;
    };
    op.GetInputTypeCount = [](const CustomOp*) { return Op::kSignature.inputs; };
    op.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
    op.GetOutputTypeCount = [](const CustomOp*) { return Op::kSignature.outputs; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.GetInputCharacteristic = presence;
    op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
    op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.GetStartVersion = [](const CustomOp*) { return Op::kSignature.since; };
    op.GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
    return op;
  }
  static inline CustomOp op = make();
};

struct Row {
  const char* name;
  CustomOp* op;
  std::atomic<int64_t>* calls;
};

template <class Op>
Row row() {
  return {Op::kSignature.name, &Registered<Op>::op, &Registered<Op>::calls};
}

const Row kOps[] = {
    row<QuantLinear<1>>(),    row<QuantLinear<2>>(),    row<QuantLinear<3>>(),
    row<RgLruScan>(),         row<LocalAttention>(),    row<CausalConv1d>(),
    row<GeluMul>(),           row<RmsNorm>(),           row<AddRmsNorm>(),
    row<SoftCap>(),           row<TwoLevelLinear<2>>(), row<TwoLevelLinear<3>>(),
    row<TwoLevelLinear<4>>(), row<TwoLevelLinear<5>>(), row<TwoLevelLinear<6>>(),
};
constexpr size_t kCount = sizeof kOps / sizeof *kOps;

// Makes the domain with all ops; null if that fails.
void* make_domain(const void* const* api) {
  const auto done = [api](Status* status) {
    if (status) call<void>(api, kReleaseStatus, status);
    return !status;
  };
  void* domain = nullptr;
  bool made = done(call<Status*>(api, kCreateCustomOpDomain, &kDomain[0], &domain));
  for (const Row& row : kOps) {
    made = made && done(call<Status*>(api, kCustomOpDomain_Add, domain, row.op));
  }
  return made ? domain : nullptr;
}

// Returns the domain of the ONNX Runtime whose table `api` is; null if it cannot be made. It lives as
// long as the process, as the sessions that use it may.
void* domain_of(const void* const* api) {
  struct Entry {
    const void* const* api;
    void* domain;
    const Entry* next;
  };
  static std::mutex mutex;
  static const Entry* first = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry* entry = first; entry; entry = entry->next)
    if (entry->api == api) return entry->domain;
  void* domain = make_domain(api);
  const Entry* entry = domain ? new (std::nothrow) Entry{api, domain, first} : nullptr;
  if (entry) first = entry;
  return domain;
}

}  // namespace
}  // namespace rgexport

EXPORT void* RegisterCustomOps(void* options, const rgexport::ort::ApiBase* base) {
  using namespace rgexport;
  const void* const* api = base->GetApi(kApiVersion);
  if (!api) return nullptr;  // an older one: the bodies of the functions run
  void* domain = domain_of(api);
  return domain ? call<Status*>(api, kAddCustomOpDomain, options, domain)
                : failure(api, "the domain ai.rgexport cannot be made");
}

// The name of the instruction set whose kernels run here.
EXPORT const char* rgexport_instruction_set() { return rgexport::instruction_set_name(); }

// Up to so many tokens of a step, of all rows together, give the bits that each gives alone.
EXPORT int64_t rgexport_exact_tokens() {
  const int64_t several = rgexport::quant_kernels().most_several;
  return several < rgexport::kEachAlone ? several : rgexport::kEachAlone;
}

// The names of the levels of this architecture, null after the last one, and which are here.
EXPORT const char* rgexport_level(size_t index) { return rgexport::level_name(index); }
EXPORT int rgexport_level_is_here(size_t index) { return rgexport::level_is_here(index); }

// The name of op `index`, or null after the last one.
EXPORT const char* rgexport_op(size_t index) {
  return index < rgexport::kCount ? rgexport::kOps[index].name : nullptr;
}

// How often op `index` has run in this process.
EXPORT int64_t rgexport_calls(size_t index) { return rgexport::kOps[index].calls->load(); }
