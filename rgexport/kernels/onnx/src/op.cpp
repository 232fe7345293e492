#include "op.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace rgexport {

using namespace ort;

namespace {

// Elements of a tensor, were its empty dimensions 1: so every product of some of its dimensions is a
// number, and what is eight bytes of each, and somewhat more, too.
constexpr int64_t kMostElements = int64_t{1} << 56;

// What is wrong with an input, or null.
const char* wrong(const Tensor& tensor, ElementType wanted) {
  const bool either = wanted < 0 && (tensor.type == kFloat || tensor.type == -wanted);
  if (tensor.type != wanted && !either) return "has another type of elements than this op takes";
  Size all = 1;
  for (size_t i = 0; i < tensor.rank; ++i) {
    if (tensor.dims[i] < 0) return "has a negative dimension";
    all = all * (tensor.dims[i] ? tensor.dims[i] : 1);
  }
  return all.fits() && all.count() <= kMostElements ? nullptr : "is larger than any memory";
}

// Reads a value; null if it is as an op needs it. Otherwise what is wrong, or "" with a refusal of
// ONNX Runtime.
const char* read(const void* const* api, const void* value, ElementType wanted, Tensor& tensor,
                 Status*& refusal) {
  void *info = nullptr, *data = nullptr;
  if ((refusal = call<Status*>(api, kGetTensorTypeAndShape, value, &info))) return "";
  const auto* shape = static_cast<const void*>(info);
  Tensor found;
  int type = 0;
  const char* bad = nullptr;
  refusal = call<Status*>(api, kGetTensorElementType, shape, &type);
  if (!refusal) refusal = call<Status*>(api, kGetDimensionsCount, shape, &found.rank);
  if (!refusal && found.rank > kMaxRank) {
    bad = "has more than four dimensions";
  } else if (!refusal) {
    refusal = call<Status*>(api, kGetDimensions, shape, &found.dims[0], found.rank);
  }
  call<void>(api, kReleaseTensorTypeAndShapeInfo, info);
  found.type = static_cast<ElementType>(type);
  if (!refusal && !bad) bad = wrong(found, wanted);
  if (!refusal && !bad)
    refusal = call<Status*>(api, kGetTensorMutableData, const_cast<void*>(value), &data);
  if (refusal) return "";
  if (bad) return bad;
  found.data = data;
  found.given = true;
  found.count = 1;
  for (size_t i = 0; i < found.rank; ++i) found.count *= found.dims[i];
  tensor = found;
  return nullptr;
}

}  // namespace

ShapeText::ShapeText(const Tensor& tensor) {
  if (!tensor.given) {
    std::snprintf(text_, sizeof text_, "missing");
    return;
  }
  int at = std::snprintf(text_, sizeof text_, "[");
  for (size_t i = 0; i < tensor.rank; ++i)
    at += std::snprintf(text_ + at, sizeof text_ - at, "%s%" PRId64, i ? ", " : "", tensor.dims[i]);
  std::snprintf(text_ + at, sizeof text_ - at, "]");
}

int64_t Attributes::integer(const char* name, int64_t otherwise) const {
  int64_t value = otherwise;
  if (Status* missing = call<Status*>(api_, kKernelInfoGetAttribute_int64, info_, name, &value)) {
    call<void>(api_, kReleaseStatus, missing);
    return otherwise;
  }
  return value;
}

float Attributes::real(const char* name, float otherwise) const {
  float value = otherwise;
  if (Status* missing = call<Status*>(api_, kKernelInfoGetAttribute_float, info_, name, &value)) {
    call<void>(api_, kReleaseStatus, missing);
    return otherwise;
  }
  return value;
}

Constants::Constants(const void* const* api, const void* info, const Signature& signature) {
  for (size_t i = 0; i < signature.inputs; ++i) {
    int constant = 0;
    const void* value = nullptr;
    Status* refusal =
        call<Status*>(api, kKernelInfoGetConstantInput_tensor, info, i, &constant, &value);
    if (!refusal && constant && value)
      read(api, value, signature.input_types[i], tensors_[i], refusal);
    if (refusal) call<void>(api, kReleaseStatus, refusal);  // a run asks again, and tells
  }
}

Context::Context(const void* const* api, void* context, const Signature& signature,
                 const Constants& constants)
    : api_(api), context_(context), signature_(signature), constants_(constants) {
  done(kKernelContext_GetInputCount, static_cast<const void*>(context_), &inputs_);
}

Tensor Context::input(size_t index) {
  if (constants_[index].given) return constants_[index];
  Tensor tensor;
  const void* value = nullptr;
  const auto* context = static_cast<const void*>(context_);
  if (index < inputs_ && !done(kKernelContext_GetInput, context, index, &value)) return {};
  if (!value) {
    if (index < signature_.required) refuse("input %zu is missing", index);
    return {};
  }
  Status* refusal = nullptr;
  const char* bad = read(api_, value, signature_.input_types[index], tensor, refusal);
  if (refusal) {
    kept(refusal);
  } else if (bad) {
    refuse("input %zu %s", index, bad);
  }
  return tensor;
}

float* Context::output(size_t index, const int64_t* dims, size_t rank) {
  static float nothing;
  Size count = sizeof(float);
  for (size_t i = 0; i < rank; ++i) count = count * dims[i];
  if (!count.fits()) {
    refuse("output %zu would be larger than any memory", index);
    return nullptr;
  }
  void *value = nullptr, *data = nullptr;
  if (!done(kKernelContext_GetOutput, context_, index, dims, rank, &value)) return nullptr;
  if (value && !done(kGetTensorMutableData, value, &data)) return nullptr;
  if (count.is(0)) return &nothing;
  if (!data) refuse("output %zu has no place", index);
  return static_cast<float*>(data);
}

void Context::refuse(const char* format, ...) {
  char text[512];
  int at = std::snprintf(text, sizeof text, "%s: ", signature_.name);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + at, sizeof text - at, format, arguments);
  va_end(arguments);
  if (!refusal_) refusal_ = failure(api_, text);
}

void Context::each(size_t count, void (*body)(void*, size_t), void* user) {
  if (!count) return;
  done(kKernelContext_ParallelFor, static_cast<const void*>(context_), body, count, size_t{0},
       user);
}

bool Context::kept(Status* status) {
  if (!status) return true;
  if (!refusal_) {
    refusal_ = status;
  } else {
    call<void>(api_, kReleaseStatus, status);
  }
  return false;
}

}  // namespace rgexport
