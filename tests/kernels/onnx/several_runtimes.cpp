// Runs a model in each of several ONNX Runtimes that one process has loaded, on Linux or on Windows.
//
//   several_runtimes KERNELS MODEL COLUMNS RUNTIME...
//
// The model takes x [1, n, COLUMNS], the numbers of stdin. All sessions are opened before the first
// one runs. Each runs twice: with x, and with x in an unsuitable shape. Prints a line for each run: the
// bits of the output, or the error; and at last how often our kernels ran.
#include <cstring>
#include <vector>

#include "load_library.h"  // Windows' own headers must be read before ONNX Runtime's

#include <onnxruntime_c_api.h>

namespace {

constexpr uint32_t kVersion = 18;

std::basic_string<ORTCHAR_T> native(const char* path) { return {path, path + std::strlen(path)}; }

class Runtime {
 public:
  Runtime(const char* path, const LoadedLibrary& kernels, const char* model) {
    const OrtApiBase* base = LoadedLibrary(path).get<const OrtApiBase*()>("OrtGetApiBase")();
    std::printf("%s\n", base->GetVersionString());
    api_ = base->GetApi(kVersion);
    OrtEnv* env = nullptr;
    OrtSessionOptions* options = nullptr;
    require(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "test", &env));
    require(api_->CreateSessionOptions(&options));
    using Register = OrtStatus*(OrtSessionOptions*, const OrtApiBase*);
    require(kernels.get<Register>("RegisterCustomOps")(options, base));
    require(api_->CreateSession(env, native(model).c_str(), options, &session_));
  }

  // The bits of the first output, or the error.
  std::string run(std::vector<float> x, std::vector<int64_t> dims) const {
    OrtMemoryInfo* memory = nullptr;
    require(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    OrtValue *input = nullptr, *output = nullptr;
    require(api_->CreateTensorWithDataAsOrtValue(memory, x.data(), x.size() * sizeof(float),
                                                 dims.data(), dims.size(),
                                                 ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
    const char *in = "x", *out = "y";
    if (OrtStatus* failed = api_->Run(session_, nullptr, &in, &input, 1, &out, 1, &output))
      return text(failed);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t count = 0;
    float* y = nullptr;
    require(api_->GetTensorTypeAndShape(output, &info));
    require(api_->GetTensorShapeElementCount(info, &count));
    require(api_->GetTensorMutableData(output, reinterpret_cast<void**>(&y)));
    std::string bits;
    for (size_t i = 0; i < count; ++i) {
      uint32_t word;
      char digits[9];
      std::memcpy(&word, y + i, sizeof word);
      std::snprintf(digits, sizeof digits, "%08x", word);
      bits += digits;
    }
    return bits;
  }

 private:
  std::string text(OrtStatus* failed) const {
    const std::string message = api_->GetErrorMessage(failed);
    api_->ReleaseStatus(failed);
    return message;
  }
  void require(OrtStatus* failed) const {
    if (failed) fail(text(failed).c_str());
  }

  const OrtApi* api_ = nullptr;
  OrtSession* session_ = nullptr;
};

std::vector<float> numbers() {
  std::vector<float> all;
  for (float x; std::scanf("%f", &x) == 1;) all.push_back(x);
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) fail("usage: several_runtimes KERNELS MODEL COLUMNS RUNTIME...");
  const LoadedLibrary kernels(arguments[1]);
  const int64_t columns = std::atoll(arguments[3]);
  const std::vector<float> x = numbers();
  const int64_t rows = static_cast<int64_t>(x.size()) / columns;
  std::vector<Runtime> runtimes;
  for (int i = 4; i < count; ++i) runtimes.emplace_back(arguments[i], kernels, arguments[2]);
  for (const auto& dims : {std::vector<int64_t>{1, rows, columns}, {1, columns, rows}})
    for (const Runtime& runtime : runtimes) std::printf("%s\n", runtime.run(x, dims).c_str());
  int64_t calls = 0;
  const auto name = kernels.get<const char*(size_t)>("rgexport_op");
  const auto calls_of = kernels.get<int64_t(size_t)>("rgexport_calls");
  for (size_t i = 0; name(i); ++i) calls += calls_of(i);
  std::printf("%d\n", static_cast<int>(calls));
  return 0;
}
