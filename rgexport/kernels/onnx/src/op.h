// What an op is to ONNX Runtime: a signature, attributes read once, and a run over a context.
//
// An op is a class with
//   static constexpr Signature kSignature;
//   explicit Op(const Attributes&);
//   void run(Context&) const;           // refuses what is wrong with the inputs
// and one row in the table of register.cpp. One object may run in several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "ort_abi.h"
#include "sizes.h"

namespace rgexport {

constexpr size_t kMaxInputs = 13;
constexpr size_t kMaxRank = 4;

// The types of an input that may be float32 or another one, which is written as its negative number.
// ONNX Runtime lets every type pass; `Context` refuses the others.
constexpr auto kFloatOrHalf = static_cast<ort::ElementType>(-ort::kFloat16);
constexpr auto kFloatOrBfloat16 = static_cast<ort::ElementType>(-ort::kBfloat16);

struct Signature {
  const char* name;
  size_t inputs;
  size_t required;  // the inputs after these are optional
  ort::ElementType input_types[kMaxInputs];
  size_t outputs;  // all of them float32
  int since = 1;   // the version of the domain in which the op became what it is
};

struct Tensor {
  void* data = nullptr;  // null where an optional input is missing, and perhaps where it is empty
  bool given = false;
  ort::ElementType type = ort::kUndefined;
  size_t rank = 0;
  int64_t dims[kMaxRank] = {};  // those after the rank are 0
  int64_t count = 0;            // of elements

  int64_t size() const { return count; }

  bool is(std::initializer_list<int64_t> shape) const {
    if (!given || rank != shape.size()) return false;
    const int64_t* dim = dims;
    for (int64_t wanted : shape)
      if (*dim++ != wanted) return false;
    return true;
  }
  bool has_shape_of(const Tensor& other) const {
    bool same = given == other.given && rank == other.rank;
    for (size_t i = 0; i < rank; ++i) same = same && dims[i] == other.dims[i];
    return same;
  }

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// The shape of a tensor for messages, such as [1, 7, 64].
class ShapeText {
 public:
  explicit ShapeText(const Tensor& tensor);
  const char* text() const { return text_; }

 private:
  char text_[24 * kMaxRank + 8];
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
  Constants(const void* const* api, const void* info, const Signature& signature);
  // Not given where an input is not constant, not there, or not what the signature says.
  const Tensor& operator[](size_t index) const { return tensors_[index]; }

 private:
  Tensor tensors_[kMaxInputs];
};

// The inputs and outputs of one run. What is refused, by the op or by ONNX Runtime, is kept and
// becomes the result of the run.
class Context {
 public:
  Context(const void* const* api, void* context, const Signature& signature,
          const Constants& constants);

  // An input. Refused are one that the op needs and that is missing, another type of elements than
  // the signature's, more dimensions than kMaxRank, and sizes that no memory has.
  Tensor input(size_t index);

  // The buffer of an output, which may be that of an input where the caller bound them to one; some
  // address if it is empty. Null where it is refused, as a bound buffer of another shape: return then.
  float* output(size_t index, const int64_t* dims, size_t rank);

  // Refuses the run, in a line that begins with the op's name; the first refusal is kept.
  [[gnu::format(printf, 2, 3)]] void refuse(const char* format, ...);
  bool refused() const { return refusal_ != nullptr; }

  // Runs body(0) … body(count - 1) on ONNX Runtime's own threads, in any order.
  template <class Body>
  void parallel_for(size_t count, const Body& body) {
    if (count == 1) return body(0);
    each(
        count, [](void* user, size_t index) { (*static_cast<const Body*>(user))(index); },
        const_cast<Body*>(&body));
  }

  // The first refusal, or null; the caller releases it.
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
  const Signature& signature_;
  const Constants& constants_;
  size_t inputs_ = 0;  // of the node
  ort::Status* refusal_ = nullptr;
};

}  // namespace rgexport
