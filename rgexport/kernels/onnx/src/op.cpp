#include "op.h"

namespace rgexport {

using namespace ort;

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

Tensor Context::input(size_t index) {
  Tensor tensor;
  const void* value = nullptr;
  void *info = nullptr, *data = nullptr;
  size_t count = 0;
  if (!done(kKernelContext_GetInputCount, static_cast<const void*>(context_), &count)) return {};
  if (index >= count) return {};
  if (!done(kKernelContext_GetInput, static_cast<const void*>(context_), index, &value)) return {};
  if (!value || !done(kGetTensorTypeAndShape, value, &info)) return {};
  bool shaped = done(kGetDimensionsCount, static_cast<const void*>(info), &tensor.rank);
  if (tensor.rank > kMaxRank) shaped = kept(failure("an input has more than four dimensions"));
  shaped = shaped && done(kGetDimensions, static_cast<const void*>(info), tensor.dims, tensor.rank);
  call<void>(api_, kReleaseTensorTypeAndShapeInfo, info);
  if (!shaped || !done(kGetTensorMutableData, const_cast<void*>(value), &data)) return {};
  tensor.data = data;
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

Status* Context::failure(const char* text) const {
  constexpr int kInvalidArgument = 2;
  return call<Status*>(api_, kCreateStatus, kInvalidArgument, text);
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
