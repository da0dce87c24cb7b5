#include "shim.h"

#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

// An error on its way out of this file; no exception leaves it.
struct Failure : std::runtime_error {
    Failure(AccordionStatus status, std::string const& text) : std::runtime_error(text), status(status) {}
    AccordionStatus status;
};

template <typename Body>
int32_t guarded(char* message, size_t capacity, Body&& body) noexcept {
    auto const refused = [&](int32_t status, char const* text) {
        if (message != nullptr && capacity > 0) {
            std::strncpy(message, text, capacity - 1);
            message[capacity - 1] = '\0';
        }
        return status;
    };
    try {
        body();
        return ACCORDION_OK;
    } catch (Failure const& failure) {
        return refused(failure.status, failure.what());
    } catch (std::exception const& error) {
        return refused(ACCORDION_BUILD, error.what());
    }
}

// Passes messages on, and keeps the errors: NVIDIA's calls return null and say why only here.
class Logger final : public nvinfer1::ILogger {
public:
    explicit Logger(AccordionObserver observer) : observer_(observer) {}

    void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override {
        std::lock_guard<std::mutex> const lock(mutex_);
        if (severity <= Severity::kERROR) {
            try {
                if (!errors_.empty()) {
                    errors_ += "; ";
                }
                errors_ += text;
            } catch (std::exception const&) {
                // Out of memory: the message is lost, the failure is not.
            }
        }
        if (observer_.log != nullptr) {
            observer_.log(observer_.user, static_cast<int32_t>(severity), text);
        }
    }

    // What went wrong since this was last asked.
    std::string errors() {
        std::lock_guard<std::mutex> const lock(mutex_);
        std::string const told = errors_.empty() ? "no reason given" : errors_;
        errors_.clear();
        return told;
    }

    // From here on nobody hears.
    void detach() {
        std::lock_guard<std::mutex> const lock(mutex_);
        observer_ = {};
        errors_.clear();
    }

private:
    AccordionObserver observer_;
    std::mutex mutex_;
    std::string errors_;
};

// What a call of NVIDIA's returned, or why it returned nothing.
template <typename Object>
std::unique_ptr<Object> owned(Object* object, AccordionStatus status, Logger& logger) {
    if (object == nullptr) {
        throw Failure(status, logger.errors());
    }
    return std::unique_ptr<Object>(object);
}

class Monitor final : public nvinfer1::IProgressMonitor {
public:
    explicit Monitor(AccordionObserver observer) : observer_(observer) {}

    void phaseStart(char const* phase, char const*, int32_t steps) noexcept override {
        try {
            std::lock_guard<std::mutex> const lock(mutex_);
            steps_[phase] = steps;
        } catch (std::exception const&) {
            // The phase is shown without its length.
        }
        tell(phase, 0);
    }

    bool stepComplete(char const* phase, int32_t step) noexcept override { return tell(phase, step + 1); }

    void phaseFinish(char const*) noexcept override {}

private:
    bool tell(char const* phase, int32_t step) noexcept {
        if (observer_.progress == nullptr) {
            return true;
        }
        int32_t steps = 0;
        {
            std::lock_guard<std::mutex> const lock(mutex_);
            auto const found = steps_.find(phase);
            steps = found == steps_.end() ? 0 : found->second;
        }
        return observer_.progress(observer_.user, phase, step, steps) != 0;
    }

    AccordionObserver observer_;
    std::mutex mutex_;
    std::unordered_map<std::string, int32_t> steps_;
};

template <typename Function>
Function* symbol(void* library, char const* path, char const* name) {
    void* const address = dlsym(library, name);
    if (address == nullptr) {
        throw Failure(ACCORDION_LIBRARY, std::string(path) + ": there is no " + name);
    }
    return reinterpret_cast<Function*>(address);
}

void* opened(char const* path) {
    // Visible to what is opened next: the parser takes symbols of the library from here.
    void* const library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
        throw Failure(ACCORDION_LIBRARY, dlerror());
    }
    return library;
}

std::string version_text(int32_t version) {
    std::ostringstream text;
    text << version / 10000 << '.' << version / 100 % 100 << '.' << version % 100;
    return text.str();
}

AccordionBytes copied(void const* data, size_t size) {
    void* const copy = std::malloc(std::max<size_t>(size, 1));
    if (copy == nullptr) {
        throw std::bad_alloc();
    }
    std::memcpy(copy, data, size);
    return {copy, size};
}

std::string shape_text(nvinfer1::Dims const& dims) {
    std::ostringstream text;
    text << '[';
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text << (i > 0 ? ", " : "") << dims.d[i];
    }
    text << ']';
    return text.str();
}

AccordionRange const& range_of(AccordionRange const* ranges, size_t count, char const* what, nvinfer1::ITensor& input) {
    auto const* const end = ranges + count;
    auto const* const found
        = std::find_if(ranges, end, [&](auto const& range) { return std::strcmp(range.name, input.getName()) == 0; });
    if (found == end) {
        throw Failure(ACCORDION_PROFILE, std::string("input '") + input.getName() + "' of shape "
                + shape_text(input.getDimensions()) + " has no range of " + what);
    }
    return *found;
}

nvinfer1::Dims dims_of(int64_t const* extents, int32_t rank) {
    nvinfer1::Dims dims{};
    dims.nbDims = rank;
    std::copy_n(extents, rank, dims.d);
    return dims;
}

void store(nvinfer1::Dims const& dims, int64_t* extents, int32_t& rank, char const* name) {
    static_assert(nvinfer1::Dims::MAX_DIMS == ACCORDION_MAX_RANK, "the header says how many dimensions there may be");
    if (dims.nbDims < 0) {
        throw Failure(ACCORDION_RUN, std::string("there is no input or output '") + name + "'");
    }
    rank = dims.nbDims;
    std::copy_n(dims.d, dims.nbDims, extents);
}

void set_range(nvinfer1::IOptimizationProfile& target, AccordionProfile const& profile, nvinfer1::ITensor& input) {
    using nvinfer1::OptProfileSelector;
    std::string const name = input.getName();
    auto const refused = [&] {
        return Failure(ACCORDION_PROFILE, "input '" + name + "': its range is refused");
    };
    nvinfer1::Dims const dims = input.getDimensions();
    if (std::any_of(dims.d, dims.d + std::max(dims.nbDims, 0), [](int64_t extent) { return extent < 0; })) {
        auto const& range = range_of(profile.shapes, profile.num_shapes, "shapes", input);
        if (range.count != dims.nbDims) {
            throw Failure(ACCORDION_PROFILE, "input '" + name + "' has shape " + shape_text(dims) + ", and its range "
                    + std::to_string(range.count) + " dimensions");
        }
        if (!target.setDimensions(name.c_str(), OptProfileSelector::kMIN, dims_of(range.min, range.count))
            || !target.setDimensions(name.c_str(), OptProfileSelector::kOPT, dims_of(range.opt, range.count))
            || !target.setDimensions(name.c_str(), OptProfileSelector::kMAX, dims_of(range.max, range.count))) {
            throw refused();
        }
    }
    if (input.isShapeTensor()) {
        auto const& range = range_of(profile.values, profile.num_values, "values, which decide shapes", input);
        if (!target.setShapeValuesV2(name.c_str(), OptProfileSelector::kMIN, range.min, range.count)
            || !target.setShapeValuesV2(name.c_str(), OptProfileSelector::kOPT, range.opt, range.count)
            || !target.setShapeValuesV2(name.c_str(), OptProfileSelector::kMAX, range.max, range.count)) {
            throw refused();
        }
    }
}

std::string parse_errors(nvonnxparser::IParser const& parser) {
    std::ostringstream text;
    for (int i = 0; i < parser.getNbErrors(); ++i) {
        nvonnxparser::IParserError const* const error = parser.getError(i);
        text << (i > 0 ? "; " : "") << "node '" << error->nodeName() << "' (" << error->nodeOperator()
             << "): " << error->desc();
    }
    return text.str().empty() ? "no reason given" : text.str();
}

// There are dedicated kernels for attention in 16 bits only, and for some shapes. The builder refuses all other attention unless it
// may put it together from several kernels.
void allow_decomposition(nvinfer1::INetworkDefinition& network) {
#if defined(TRT_MAJOR_RTX) || NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 14)
    for (int32_t i = 0; i < network.getNbLayers(); ++i) {
        nvinfer1::ILayer* const layer = network.getLayer(i);
        if (layer->getType() == nvinfer1::LayerType::kATTENTION_INPUT) {
            static_cast<nvinfer1::IAttentionInputLayer*>(layer)->getAttention()->setDecomposable(true);
        }
    }
#else
    (void)network; // the parser of older versions puts attention together itself
#endif
}

// Keeps what an execution context tells of its layers until it is asked for.
class LayerTimes final : public nvinfer1::IProfiler {
public:
    void reportLayerTime(char const* layer, float milliseconds) noexcept override {
        try {
            times_.emplace_back(layer, milliseconds);
        } catch (std::exception const&) {
            // Out of memory: this layer is missing.
        }
    }

    std::vector<std::pair<std::string, float>> taken() { return std::exchange(times_, {}); }

private:
    std::vector<std::pair<std::string, float>> times_;
};

} // namespace

// Members are destroyed in reverse order: every object before what it came from.
struct AccordionEngine {
    explicit AccordionEngine(AccordionObserver observer) : logger(observer) {}
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

struct AccordionContext {
    AccordionEngine& engine;
    LayerTimes layers;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
};

struct AccordionTensorRt {
    decltype(createInferBuilder_INTERNAL)* create_builder;
    decltype(createInferRuntime_INTERNAL)* create_runtime;
    decltype(createNvOnnxParser_INTERNAL)* create_parser;
    decltype(getPluginRegistry)* plugin_registry;
    decltype(getInferLibVersion)* library_version;
};

extern "C" int32_t accordion_tensorrt_open(
    char const* library, char const* parser, AccordionTensorRt** result, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        void* const infer = opened(library);
        auto* const version = symbol<decltype(getInferLibVersion)>(infer, library, "getInferLibVersion");
        // Newer libraries append to these classes and never reorder them, within a major version.
        int32_t const found = version();
        if (found / 10000 != NV_TENSORRT_MAJOR || found < static_cast<int32_t>(NV_TENSORRT_VERSION)) {
            throw Failure(ACCORDION_LIBRARY, std::string(library) + " is version " + version_text(found)
                    + ", and the headers are those of " + version_text(NV_TENSORRT_VERSION));
        }
        void* const onnx = opened(parser);
        *result = new AccordionTensorRt{
            symbol<decltype(createInferBuilder_INTERNAL)>(infer, library, "createInferBuilder_INTERNAL"),
            symbol<decltype(createInferRuntime_INTERNAL)>(infer, library, "createInferRuntime_INTERNAL"),
            symbol<decltype(createNvOnnxParser_INTERNAL)>(onnx, parser, "createNvOnnxParser_INTERNAL"),
            symbol<decltype(getPluginRegistry)>(infer, library, "getPluginRegistry"),
            version,
        };
    });
}

extern "C" void accordion_tensorrt_versions(AccordionTensorRt const* tensorrt, int32_t* headers, int32_t* library) {
    *headers = NV_TENSORRT_VERSION;
    *library = tensorrt->library_version();
}

extern "C" int32_t accordion_tensorrt_load_plugins(
    AccordionTensorRt* tensorrt, char const* path, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        nvinfer1::IPluginRegistry* const registry = tensorrt->plugin_registry();
        if (registry == nullptr || registry->loadLibrary(path) == nullptr) {
            throw Failure(ACCORDION_PLUGINS, std::string(path) + ": the plugin registry refuses it");
        }
    });
}

extern "C" int32_t accordion_tensorrt_build(AccordionTensorRt* tensorrt, AccordionBuildRequest const* request,
    AccordionObserver observer, AccordionBytes* plan, AccordionBytes* timing_cache, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        Logger logger(observer);
        Monitor monitor(observer);
        auto const builder = owned(
            static_cast<nvinfer1::IBuilder*>(tensorrt->create_builder(&logger, NV_TENSORRT_VERSION)), ACCORDION_START,
            logger);
#if NV_TENSORRT_MAJOR == 10
        uint32_t const flags = 1U << static_cast<uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
        uint32_t const flags = 0; // types are always the graph's own
#endif
        auto const network = owned(builder->createNetworkV2(flags), ACCORDION_START, logger);
#ifndef TRT_MAJOR_RTX
        std::unique_ptr<nvinfer1::ITimingCache> cache; // outlives the configuration that refers to it
#endif
        auto const config = owned(builder->createBuilderConfig(), ACCORDION_START, logger);
        auto const parser = owned(static_cast<nvonnxparser::IParser*>(
                                      tensorrt->create_parser(network.get(), &logger, NV_ONNX_PARSER_VERSION)),
            ACCORDION_START, logger);
        if (!parser->parse(request->model, request->model_bytes, request->model_path)) {
            throw Failure(ACCORDION_PARSE, parse_errors(*parser));
        }
        allow_decomposition(*network);

        for (size_t p = 0; p < request->num_profiles; ++p) {
            nvinfer1::IOptimizationProfile* const profile = builder->createOptimizationProfile();
            for (int32_t i = 0; i < network->getNbInputs(); ++i) {
                set_range(*profile, request->profiles[p], *network->getInput(i));
            }
            if (!profile->isValid() || config->addOptimizationProfile(profile) < 0) {
                throw Failure(ACCORDION_PROFILE, logger.errors());
            }
        }
        config->setProgressMonitor(&monitor);
        // Names of the graph's nodes: without them nobody could tell what a fused layer computes.
        config->setProfilingVerbosity(nvinfer1::ProfilingVerbosity::kDETAILED);
        if (request->workspace_bytes > 0) {
            config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, request->workspace_bytes);
        }
        if (request->allow_tf32 == 0) {
            config->clearFlag(nvinfer1::BuilderFlag::kTF32);
        }
#ifndef TRT_MAJOR_RTX
        // A cache that belongs to another device or version is refused, and begun anew.
        auto const fresh = [&](void const* blob, size_t size) {
            return std::unique_ptr<nvinfer1::ITimingCache>(config->createTimingCache(blob, size));
        };
        cache = fresh(request->timing_cache, request->timing_cache_bytes);
        if (cache == nullptr || !config->setTimingCache(*cache, false)) {
            cache = fresh(nullptr, 0);
            if (cache == nullptr || !config->setTimingCache(*cache, false)) {
                throw Failure(ACCORDION_START, logger.errors());
            }
        }
#endif
        auto const serialized = owned(builder->buildSerializedNetwork(*network, *config), ACCORDION_BUILD, logger);
        *timing_cache = {nullptr, 0};
#ifndef TRT_MAJOR_RTX
        if (std::unique_ptr<nvinfer1::IHostMemory> const measured{cache->serialize()}) {
            *timing_cache = copied(measured->data(), measured->size());
        }
#endif
        *plan = copied(serialized->data(), serialized->size());
    });
}

extern "C" void accordion_tensorrt_free(AccordionBytes bytes) { std::free(bytes.data); }

extern "C" void accordion_tensorrt_close(AccordionTensorRt* tensorrt) { delete tensorrt; }

extern "C" int32_t accordion_tensorrt_engine_open(AccordionTensorRt* tensorrt, void const* plan, size_t plan_bytes,
    AccordionObserver observer, AccordionEngine** opened, int32_t* tensors, int32_t* profiles, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        auto engine = std::make_unique<AccordionEngine>(observer);
        engine->runtime = owned(
            static_cast<nvinfer1::IRuntime*>(tensorrt->create_runtime(&engine->logger, NV_TENSORRT_VERSION)),
            ACCORDION_START, engine->logger);
        engine->engine = owned(engine->runtime->deserializeCudaEngine(plan, plan_bytes), ACCORDION_START, engine->logger);
        engine->logger.detach();
        *tensors = engine->engine->getNbIOTensors();
        *profiles = engine->engine->getNbOptimizationProfiles();
        *opened = engine.release();
    });
}

extern "C" int32_t accordion_tensorrt_engine_tensor(
    AccordionEngine* opened, int32_t index, AccordionTensor* tensor, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        nvinfer1::ICudaEngine const& engine = *opened->engine;
        char const* const name = engine.getIOTensorName(index);
        if (name == nullptr) {
            throw Failure(ACCORDION_RUN, "there is no input or output " + std::to_string(index));
        }
        bool linear = true;
        for (int32_t profile = 0; profile < engine.getNbOptimizationProfiles(); ++profile) {
            linear = linear && engine.getTensorFormat(name, profile) == nvinfer1::TensorFormat::kLINEAR;
        }
        *tensor = AccordionTensor{};
        tensor->name = name;
        tensor->is_input = engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
        tensor->on_host = engine.getTensorLocation(name) == nvinfer1::TensorLocation::kHOST;
        tensor->type = static_cast<int32_t>(engine.getTensorDataType(name));
        tensor->is_linear = linear;
        store(engine.getTensorShape(name), tensor->shape, tensor->rank, name);
    });
}

extern "C" void accordion_tensorrt_engine_close(AccordionEngine* engine) { delete engine; }

extern "C" int32_t accordion_tensorrt_context_open(AccordionEngine* engine, int32_t profile, void* stream,
    AccordionContext** opened, int64_t* memory_bytes, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        // Engines of one stream take turns, so that one piece of memory serves all of them.
        auto context = owned(
            engine->engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED),
            ACCORDION_START, engine->logger);
        if (!context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream))) {
            throw Failure(ACCORDION_START, engine->logger.errors());
        }
        *memory_bytes = engine->engine->getDeviceMemorySizeForProfileV2(profile);
        *opened = new AccordionContext{*engine, {}, std::move(context)};
    });
}

extern "C" void accordion_tensorrt_context_set_memory(AccordionContext* context, void* memory, int64_t bytes) {
    context->context->setDeviceMemoryV2(memory, bytes);
}

extern "C" int32_t accordion_tensorrt_context_set_shape(AccordionContext* context, char const* name, int64_t const* shape,
    int32_t rank, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        if (rank < 0 || rank > ACCORDION_MAX_RANK || !context->context->setInputShape(name, dims_of(shape, rank))) {
            throw Failure(ACCORDION_RUN, std::string("input '") + name + "': " + context->engine.logger.errors());
        }
    });
}

extern "C" int32_t accordion_tensorrt_context_set_address(
    AccordionContext* context, char const* name, void* address, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        if (!context->context->setTensorAddress(name, address)) {
            throw Failure(ACCORDION_RUN, std::string("'") + name + "': " + context->engine.logger.errors());
        }
    });
}

extern "C" int32_t accordion_tensorrt_context_infer_shapes(AccordionContext* context, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        char const* lacking[4] = {};
        int32_t const count = context->context->inferShapes(4, lacking);
        if (count > 0) {
            std::string text = "these inputs have no shape or no value:";
            for (int32_t i = 0; i < std::min(count, 4); ++i) {
                text += std::string(" '") + lacking[i] + "'";
            }
            throw Failure(ACCORDION_RUN, text);
        }
        if (count < 0) {
            throw Failure(ACCORDION_RUN, context->engine.logger.errors());
        }
    });
}

extern "C" int32_t accordion_tensorrt_context_shape(
    AccordionContext* context, char const* name, int64_t* shape, int32_t* rank, char* message, size_t capacity) {
    return guarded(message, capacity, [&] { store(context->context->getTensorShape(name), shape, *rank, name); });
}

extern "C" int32_t accordion_tensorrt_context_enqueue(
    AccordionContext* context, void* stream, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        if (!context->context->enqueueV3(static_cast<cudaStream_t>(stream))) {
            throw Failure(ACCORDION_RUN, context->engine.logger.errors());
        }
    });
}

extern "C" void accordion_tensorrt_context_measure_layers(AccordionContext* context) {
    context->context->setProfiler(&context->layers);
}

extern "C" void accordion_tensorrt_context_layer_times(
    AccordionContext* context, void* user, void (*layer)(void* user, char const* name, float milliseconds)) {
    for (auto const& [name, milliseconds] : context->layers.taken()) {
        layer(user, name.c_str(), milliseconds);
    }
}

extern "C" int32_t accordion_tensorrt_engine_layers(
    AccordionEngine* engine, AccordionBytes* json, char* message, size_t capacity) {
    return guarded(message, capacity, [&] {
        auto const inspector = owned(engine->engine->createEngineInspector(), ACCORDION_RUN, engine->logger);
        char const* const text = inspector->getEngineInformation(nvinfer1::LayerInformationFormat::kJSON);
        if (text == nullptr) {
            throw Failure(ACCORDION_RUN, engine->logger.errors());
        }
        *json = copied(text, std::strlen(text));
    });
}

extern "C" void accordion_tensorrt_context_close(AccordionContext* context) { delete context; }
