// What an op is to ONNX Runtime: a signature, attributes read once, and a run over a context.
//
// An op is a class with
//   static constexpr Signature kSignature;
//   explicit Op(const Attributes&);
//   const char* run(Context&) const;    // null, or what is wrong with the inputs
// and one row in the table of register.cpp. One object may run in several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ort_abi.h"

namespace rgexport {

constexpr size_t kMaxInputs = 13;
constexpr size_t kMaxRank = 4;

struct Signature {
  const char* name;
  size_t inputs;
  size_t required;  // the inputs after these are optional
  ort::ElementType input_types[kMaxInputs];
  size_t outputs;   // all of them float32
  int since = 1;    // the version of the domain in which the op became what it is
};

struct Tensor {
  void* data = nullptr;  // null where an optional input is missing
  size_t rank = 0;
  int64_t dims[kMaxRank] = {};  // those after the rank are 0

  // Number of elements; none of a missing or refused input.
  int64_t size() const {
    int64_t count = data ? 1 : 0;
    for (size_t i = 0; i < rank; ++i) count *= dims[i];
    return count;
  }

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

class Attributes {
 public:
  Attributes(const void* const* api, const void* info) : api_(api), info_(info) {}
  // An integer attribute; `otherwise` where the node has none of that name.
  int64_t integer(const char* name, int64_t otherwise) const;
  // Likewise a float.
  float real(const char* name, float otherwise) const;

 private:
  const void* const* api_;
  const void* info_;
};

// The inputs of a node that never change, read once: asking for them in every run takes longer than
// many an op.
class Constants {
 public:
  Constants(const void* const* api, const void* info, size_t inputs);
  // Without data where an input is not constant, or not there.
  const Tensor& operator[](size_t index) const { return tensors_[index]; }

 private:
  Tensor tensors_[kMaxInputs];
};

// The inputs and outputs of one run. What ONNX Runtime refuses is kept and becomes the result of
// the run, so that an op need not look after it.
class Context {
 public:
  Context(const void* const* api, void* context, const Constants& constants);

  // An input; one of more dimensions than kMaxRank is refused.
  Tensor input(size_t index);

  // The buffer of an output, which may be that of an input where the caller bound them to one.
  // Null where ONNX Runtime gives none, as for a bound buffer of another shape: return then.
  float* output(size_t index, const int64_t* dims, size_t rank);

  // Runs body(0) … body(count - 1) on ONNX Runtime's own threads, in any order.
  template <class Body>
  void parallel_for(size_t count, const Body& body) {
    if (count == 1) return body(0);
    each(count, [](void* user, size_t index) { (*static_cast<const Body*>(user))(index); },
         const_cast<Body*>(&body));
  }

  // The first refusal of ONNX Runtime, or null; the caller releases it.
  ort::Status* refusal() const { return refusal_; }

 private:
  void each(size_t count, void (*body)(void*, size_t), void* user);

  // Calls a slot that gives a status; whether it succeeded.
  template <class... Arguments>
  bool done(ort::Slot slot, Arguments... arguments) {
    return kept(ort::call<ort::Status*>(api_, slot, arguments...));
  }
  bool kept(ort::Status* status);

  const void* const* api_;
  void* context_;
  const Constants& constants_;
  size_t inputs_ = 0;  // of the node
  ort::Status* refusal_ = nullptr;
};

}  // namespace rgexport
