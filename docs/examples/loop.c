/* An ONNX artifact of rgexport through ONNX Runtime's C API: the likeliest tokens after some others.
 *
 *     cc loop.c -lonnxruntime -o loop && ./loop recurrentgemma-2b-it-int4-onnx/model.onnx 16 2 651 603
 *
 * The states are inputs and outputs of the same names but for their beginning. They start as zeros,
 * and what comes out of one call goes into the next one.
 */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 256 };
static const char PAST[] = "past_key_values", PRESENT[] = "present";
static const OrtApi* api;
static OrtAllocator* allocator;
static OrtMemoryInfo* memory;

static void need(OrtStatus* status) {
  if (!status) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

/* A state of one conversation: the batch axis, which the file leaves open, becomes 1. */
static OrtValue* zeros(OrtSession* session, size_t index) {
  OrtTypeInfo* info;
  const OrtTensorTypeAndShapeInfo* tensor;
  ONNXTensorElementDataType type;
  size_t rank;
  int64_t dims[8];
  OrtValue* value;
  void* data;
  need(api->SessionGetInputTypeInfo(session, index, &info));
  need(api->CastTypeInfoToTensorInfo(info, &tensor));
  need(api->GetTensorElementType(tensor, &type));
  need(api->GetDimensionsCount(tensor, &rank));
  need(api->GetDimensions(tensor, dims, rank));
  size_t bytes = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
  for (size_t i = 0; i < rank; ++i) bytes *= dims[i] = dims[i] < 0 ? 1 : dims[i];
  need(api->CreateTensorAsOrtValue(allocator, dims, rank, type, &value));
  need(api->GetTensorMutableData(value, &data));
  memset(data, 0, bytes);
  api->ReleaseTypeInfo(info);
  return value;
}

static OrtValue* int64s(int64_t* numbers, size_t count) {
  const int64_t dims[] = {1, (int64_t)count};
  OrtValue* value;
  need(api->CreateTensorWithDataAsOrtValue(memory, numbers, count * sizeof *numbers, dims, 2,
                                           ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
  return value;
}

static int64_t likeliest(OrtValue* logits) {
  float* data;
  size_t count;
  OrtTensorTypeAndShapeInfo* info;
  need(api->GetTensorTypeAndShape(logits, &info));
  need(api->GetTensorShapeElementCount(info, &count));
  need(api->GetTensorMutableData(logits, (void**)&data));
  api->ReleaseTensorTypeAndShapeInfo(info);
  int64_t best = 0;
  for (size_t i = 1; i < count; ++i) best = data[i] > data[best] ? (int64_t)i : best;
  return best;
}

int main(int argc, char** argv) {
  static int64_t ids[MOST], positions[MOST];
  static char names[2][MOST][64];
  const char *in[MOST], *out[MOST];
  OrtValue *values[MOST], *made[MOST];
  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  size_t inputs, seen = 0, count = 0;
  if (argc < 4 || argc - 3 > MOST) return fprintf(stderr, "loop MODEL COUNT ID...\n"), 2;
  for (int i = 3; i < argc; ++i) ids[count++] = atoll(argv[i]);

  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  need(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "loop", &env));
  need(api->CreateSessionOptions(&options));
  need(api->CreateSession(env, argv[1], options, &session));
  need(api->GetAllocatorWithDefaultOptions(&allocator));
  need(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  need(api->SessionGetInputCount(session, &inputs));
  in[0] = "input_ids", in[1] = "position_ids", out[0] = "logits";
  for (size_t i = 2; i < inputs; ++i) {
    char* name;
    need(api->SessionGetInputName(session, i, allocator, &name));
    snprintf(names[0][i], sizeof names[0][i], "%s", name);
    snprintf(names[1][i], sizeof names[1][i], "%s%s", PRESENT, name + strlen(PAST));
    in[i] = names[0][i], out[i - 1] = names[1][i];
    values[i] = zeros(session, i);
    need(api->AllocatorFree(allocator, name));
  }
  for (int left = atoi(argv[2]); left > 0; --left) {
    for (size_t i = 0; i < count; ++i) positions[i] = (int64_t)(seen + i);
    values[0] = int64s(ids, count), values[1] = int64s(positions, count);
    memset(made, 0, sizeof made);
    need(api->Run(session, NULL, in, (const OrtValue* const*)values, inputs, out, inputs - 1, made));
    seen += count, count = 1, ids[0] = likeliest(made[0]);
    printf("%lld ", (long long)ids[0]);
    for (size_t i = 0; i < inputs; ++i) api->ReleaseValue(values[i]);
    for (size_t i = 2; i < inputs; ++i) values[i] = made[i - 1];
    api->ReleaseValue(made[0]);
  }
  printf("\n");
  return 0;
}
