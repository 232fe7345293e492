#include "op.h"

namespace rgexport {

using namespace ort;

namespace {

// Shape and data of a value; `tensor` gets its data last, and only where nothing was refused.
Status* read(const void* const* api, const void* value, Tensor& tensor) {
  void *info = nullptr, *data = nullptr;
  if (Status* refusal = call<Status*>(api, kGetTensorTypeAndShape, value, &info)) return refusal;
  const auto* shape = static_cast<const void*>(info);
  Status* refusal = call<Status*>(api, kGetDimensionsCount, shape, &tensor.rank);
  if (!refusal && tensor.rank > kMaxRank)
    refusal = failure(api, "an input has more than four dimensions");
  if (!refusal) refusal = call<Status*>(api, kGetDimensions, shape, tensor.dims, tensor.rank);
  call<void>(api, kReleaseTensorTypeAndShapeInfo, info);
  if (!refusal) refusal = call<Status*>(api, kGetTensorMutableData, const_cast<void*>(value), &data);
  if (!refusal) tensor.data = data;
  return refusal;
}

}  // namespace

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

Constants::Constants(const void* const* api, const void* info, size_t inputs) {
  for (size_t i = 0; i < inputs; ++i) {
    int constant = 0;
    const void* value = nullptr;
    Status* refusal =
        call<Status*>(api, kKernelInfoGetConstantInput_tensor, info, i, &constant, &value);
    if (!refusal && constant && value) refusal = read(api, value, tensors_[i]);
    if (refusal) call<void>(api, kReleaseStatus, refusal);  // a run asks again, and tells
  }
}

Context::Context(const void* const* api, void* context, const Constants& constants)
    : api_(api), context_(context), constants_(constants) {
  done(kKernelContext_GetInputCount, static_cast<const void*>(context_), &inputs_);
}

Tensor Context::input(size_t index) {
  if (constants_[index].data) return constants_[index];
  Tensor tensor;
  const void* value = nullptr;
  if (index >= inputs_) return {};
  if (!done(kKernelContext_GetInput, static_cast<const void*>(context_), index, &value)) return {};
  if (!value || !kept(read(api_, value, tensor))) return {};
  return tensor;
}

float* Context::output(size_t index, const int64_t* dims, size_t rank) {
  void *value = nullptr, *data = nullptr;
  if (!done(kKernelContext_GetOutput, context_, index, dims, rank, &value)) return nullptr;
  if (!value || !done(kGetTensorMutableData, value, &data)) return nullptr;
  return static_cast<float*>(data);
}

void Context::each(size_t count, void (*body)(void*, size_t), void* user) {
  if (!count) return;
  done(kKernelContext_ParallelFor, static_cast<const void*>(context_), body, count, size_t{0}, user);
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
