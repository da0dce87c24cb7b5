// NVIDIA's library as far as the shim calls it to run engines, with NVIDIA's headers and the double behind them: so the shim itself
// is run. `unused.h` is made of the headers and has every function that is not here.

#include <NvInfer.h>
#include <NvInferRuntime.h>

#include <memory>

#include "double.cpp"

[[noreturn]] static void unexpected() { broken("a function of NVIDIA's that is not expected"); }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "unused.h"
#pragma GCC diagnostic pop

namespace {

using nvinfer1::Dims;
using Text = char[1024];

Dims dims(const int64_t *shape, int32_t rank) {
  Dims dims{};
  dims.nbDims = rank;
  memcpy(dims.d, shape, size_t(rank) * sizeof(int64_t));
  return dims;
}

bool told(nvinfer1::ILogger &logger, int32_t status, const char *text) {
  if (status != ACCORDION_OK) logger.log(nvinfer1::ILogger::Severity::kERROR, text);
  return status == ACCORDION_OK;
}

struct ContextImpl : UnusedExecutionContext {
  nvinfer1::ILogger &logger;
  AccordionEngine *engine;
  AccordionContext *context = nullptr;
  nvinfer1::IProfiler *profiler = nullptr;
  Text text{};

  ContextImpl(nvinfer1::ILogger &logger, AccordionEngine *engine) : logger(logger), engine(engine) {}
  ~ContextImpl() noexcept override {
    if (context) accordion_tensorrt_context_close(context);
  }

  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override {
    if (context) broken("a context changes its profile");
    int64_t bytes = 0;
    return told(logger, accordion_tensorrt_context_open(engine, profile, stream, &context, &bytes, text, sizeof(text)), text);
  }
  void setDeviceMemoryV2(void *memory, int64_t bytes) noexcept override {
    accordion_tensorrt_context_set_memory(context, memory, bytes);
  }
  bool setInputShape(const char *name, const Dims &shape) noexcept override {
    return told(logger, accordion_tensorrt_context_set_shape(context, name, shape.d, shape.nbDims, text, sizeof(text)), text);
  }
  bool setTensorAddress(const char *name, void *data) noexcept override {
    return told(logger, accordion_tensorrt_context_set_address(context, name, data, text, sizeof(text)), text);
  }
  int32_t inferShapes(int32_t, const char **) noexcept override {
    return told(logger, accordion_tensorrt_context_infer_shapes(context, text, sizeof(text)), text) ? 0 : -1;
  }
  Dims getTensorShape(const char *name) const noexcept override {
    int64_t shape[ACCORDION_MAX_RANK];
    int32_t rank = -1;
    accordion_tensorrt_context_shape(context, name, shape, &rank, nullptr, 0);
    return dims(shape, rank);
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    const bool done = told(logger, accordion_tensorrt_context_enqueue(context, stream, text, sizeof(text)), text);
    if (profiler)
      accordion_tensorrt_context_layer_times(context, profiler, [](void *user, const char *layer, float milliseconds) {
        static_cast<nvinfer1::IProfiler *>(user)->reportLayerTime(layer, milliseconds);
      });
    return done;
  }
  void setProfiler(nvinfer1::IProfiler *set) noexcept override {
    profiler = set;
    accordion_tensorrt_context_measure_layers(context);
  }
};

struct Context : nvinfer1::IExecutionContext {
  ContextImpl impl;
  Context(nvinfer1::ILogger &logger, AccordionEngine *engine) : impl(logger, engine) { mImpl = &impl; }
};

struct InspectorImpl : UnusedEngineInspector {
  std::string json;

  const char *getEngineInformation(nvinfer1::LayerInformationFormat format) const noexcept override {
    if (format != nvinfer1::LayerInformationFormat::kJSON) broken("layers are asked for in another format");
    return json.c_str();
  }
};

struct Inspector : nvinfer1::IEngineInspector {
  InspectorImpl impl;
  explicit Inspector(AccordionEngine *engine) {
    AccordionBytes json{};
    accordion_tensorrt_engine_layers(engine, &json, nullptr, 0);
    impl.json.assign(static_cast<const char *>(json.data), json.size);
    accordion_tensorrt_free(json);
    mImpl = &impl;
  }
};

struct EngineImpl : UnusedCudaEngine {
  nvinfer1::ILogger &logger;
  AccordionEngine *engine;

  EngineImpl(nvinfer1::ILogger &logger, AccordionEngine *engine) : logger(logger), engine(engine) {}
  ~EngineImpl() noexcept override { accordion_tensorrt_engine_close(engine); }

  const DoubleTensor &tensor(const char *name) const {
    for (const DoubleTensor &tensor : engine->tensors)
      if (!strcmp(tensor.name, name)) return tensor;
    unexpected();
  }

  int32_t getNbIOTensors() const noexcept override { return int32_t(engine->tensors.size()); }
  const char *getIOTensorName(int32_t index) const noexcept override { return engine->tensors.at(size_t(index)).name; }
  int32_t getNbOptimizationProfiles() const noexcept override { return engine->profiles; }
  nvinfer1::TensorIOMode getTensorIOMode(const char *name) const noexcept override {
    return tensor(name).is_input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::TensorLocation getTensorLocation(const char *name) const noexcept override {
    return tensor(name).on_host ? nvinfer1::TensorLocation::kHOST : nvinfer1::TensorLocation::kDEVICE;
  }
  nvinfer1::DataType getTensorDataType(const char *name) const noexcept override {
    return nvinfer1::DataType(tensor(name).type);
  }
  nvinfer1::TensorFormat getTensorFormatV2(const char *name, int32_t) const noexcept override {
    return tensor(name), nvinfer1::TensorFormat::kLINEAR;
  }
  Dims getTensorShape(const char *name) const noexcept override { return dims(tensor(name).shape, tensor(name).rank); }
  int64_t getDeviceMemorySizeForProfileV2(int32_t profile) const noexcept override { return 1024 * (profile + 1); }
  nvinfer1::IExecutionContext *createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    if (strategy != nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED) broken("memory is the caller's to give");
    return new Context(logger, engine);
  }
  nvinfer1::IEngineInspector *createEngineInspector() const noexcept override { return new Inspector(engine); }
};

struct Engine : nvinfer1::ICudaEngine {
  EngineImpl impl;
  Engine(nvinfer1::ILogger &logger, AccordionEngine *engine) : impl(logger, engine) { mImpl = &impl; }
};

struct RuntimeImpl : UnusedRuntime {
  nvinfer1::ILogger &logger;
  explicit RuntimeImpl(nvinfer1::ILogger &logger) : logger(logger) {}

  nvinfer1::ICudaEngine *deserializeCudaEngine(const void *plan, size_t bytes) noexcept override {
    AccordionEngine *engine = nullptr;
    int32_t tensors = 0, profiles = 0;
    Text text{};
    AccordionTensorRt nothing;
    const int32_t status =
        accordion_tensorrt_engine_open(&nothing, plan, bytes, {}, &engine, &tensors, &profiles, text, sizeof(text));
    return told(logger, status, text) ? new Engine(logger, engine) : nullptr;
  }
};

struct Runtime : nvinfer1::IRuntime {
  RuntimeImpl impl;
  explicit Runtime(nvinfer1::ILogger &logger) : impl(logger) { mImpl = &impl; }
};

}  // namespace

extern "C" {

int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
void *createInferRuntime_INTERNAL(void *logger, int32_t) noexcept {
  return static_cast<nvinfer1::IRuntime *>(new Runtime(*static_cast<nvinfer1::ILogger *>(logger)));
}
void *createInferBuilder_INTERNAL(void *, int32_t) noexcept { unexpected(); }
void *createNvOnnxParser_INTERNAL(void *, void *, int) noexcept { unexpected(); }
nvinfer1::IPluginRegistry *getPluginRegistry() noexcept { unexpected(); }

}  // extern "C"
