// C interface to NVIDIA's builder and ONNX parser, which offer C++ only.
//
// shim.cpp is compiled once per flavour, with the headers of TensorRT or those of TensorRT-RTX: their builder classes differ,
// and an object of one must never meet the code of the other. Nothing is linked: the libraries are opened by path.

#ifndef ACCORDION_TENSORRT_SHIM_H
#define ACCORDION_TENSORRT_SHIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// What went wrong; the text tells the rest.
enum AccordionStatus {
    ACCORDION_OK = 0,
    ACCORDION_LIBRARY = 1,  // a library cannot be opened, or is not the one the headers describe
    ACCORDION_START = 2,    // a library does not start: no driver, no device
    ACCORDION_PARSE = 3,    // the parser refuses the graph
    ACCORDION_PROFILE = 4,  // an input has no range of shapes, or not one that fits it
    ACCORDION_BUILD = 5,    // the builder refuses the network, or was stopped
    ACCORDION_PLUGINS = 6,  // the plugin library cannot be loaded
    ACCORDION_RUN = 7,      // an engine cannot be run: a shape it was not built for, a tensor it does not have, the device
};

// The libraries of one flavour, open.
typedef struct AccordionTensorRt AccordionTensorRt;

// Shortest, most usual and longest extents of an input; or, of an input whose values decide shapes, its values.
typedef struct AccordionRange {
    char const* name;
    int32_t count;
    int64_t const* min;
    int64_t const* opt;
    int64_t const* max;
} AccordionRange;

// One optimization profile.
typedef struct AccordionProfile {
    AccordionRange const* shapes;
    size_t num_shapes;
    AccordionRange const* values;
    size_t num_values;
} AccordionProfile;

typedef struct AccordionBuildRequest {
    void const* model;       // a serialised ONNX model
    size_t model_bytes;
    char const* model_path;  // where it would lie: its weights are found relative to that
    AccordionProfile const* profiles;
    size_t num_profiles;
    void const* timing_cache;  // of an earlier build, or null
    size_t timing_cache_bytes;
    size_t workspace_bytes;  // most device memory a layer may take while it runs; 0 for the library's own limit
    int32_t allow_tf32;      // whether fp32 products may be rounded to 10 bits
} AccordionBuildRequest;

// Severity is NVIDIA's: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose. `progress` returns 0 to stop the build.
// Both may be called from any thread.
typedef struct AccordionObserver {
    void* user;
    void (*log)(void* user, int32_t severity, char const* message);
    int32_t (*progress)(void* user, char const* phase, int32_t step, int32_t steps);
} AccordionObserver;

// Memory that accordion_tensorrt_free releases.
typedef struct AccordionBytes {
    void* data;
    size_t size;
} AccordionBytes;

// Opens the library and the ONNX parser by path. On failure, `message` has the reason, cut to `capacity`.
int32_t accordion_tensorrt_open(
    char const* library, char const* parser, AccordionTensorRt** opened, char* message, size_t capacity);

// Versions as major * 10000 + minor * 100 + patch: of the headers this was compiled with, and of the open library.
void accordion_tensorrt_versions(AccordionTensorRt const* tensorrt, int32_t* headers, int32_t* library);

// Registers the plugins of a library for every build to come.
int32_t accordion_tensorrt_load_plugins(
    AccordionTensorRt* tensorrt, char const* path, char* message, size_t capacity);

// Parses and builds. `plan` and, where the flavour has one, `timing_cache` are to be freed.
int32_t accordion_tensorrt_build(AccordionTensorRt* tensorrt, AccordionBuildRequest const* request,
    AccordionObserver observer, AccordionBytes* plan, AccordionBytes* timing_cache, char* message, size_t capacity);

void accordion_tensorrt_free(AccordionBytes bytes);

// Most dimensions of an input or output: NVIDIA's limit.
enum { ACCORDION_MAX_RANK = 8 };

// A loaded engine.
typedef struct AccordionEngine AccordionEngine;

// What runs an engine with the shapes of one optimization profile.
typedef struct AccordionContext AccordionContext;

// An input or output of an engine.
typedef struct AccordionTensor {
    char const* name;  // lives as long as the engine
    int32_t is_input;
    int32_t on_host;    // whether its values decide shapes: then its memory is the host's
    int32_t type;       // nvinfer1::DataType
    int32_t is_linear;  // whether it is row-major in every profile
    int32_t rank;
    int64_t shape[ACCORDION_MAX_RANK];  // -1 where a call decides
} AccordionTensor;

// Loads a serialised engine and says how many inputs and outputs and how many profiles it has. The observer hears of the loading
// alone. There must be a driver: without one the library answers with an address that is neither null nor an object.
int32_t accordion_tensorrt_engine_open(AccordionTensorRt* tensorrt, void const* plan, size_t plan_bytes,
    AccordionObserver observer, AccordionEngine** opened, int32_t* tensors, int32_t* profiles, char* message, size_t capacity);

int32_t accordion_tensorrt_engine_tensor(
    AccordionEngine* engine, int32_t index, AccordionTensor* tensor, char* message, size_t capacity);

// All of its contexts have been closed, and what they did is done.
void accordion_tensorrt_engine_close(AccordionEngine* engine);

// A context for `profile`, which is selected on `stream` (a CUstream); a profile has one context at most. `memory_bytes` is what
// accordion_tensorrt_context_set_memory has to give it.
int32_t accordion_tensorrt_context_open(AccordionEngine* engine, int32_t profile, void* stream, AccordionContext** opened,
    int64_t* memory_bytes, char* message, size_t capacity);

// Device memory for intermediate values, in use until what was put on the stream is done.
void accordion_tensorrt_context_set_memory(AccordionContext* context, void* memory, int64_t bytes);

int32_t accordion_tensorrt_context_set_shape(AccordionContext* context, char const* name, int64_t const* shape, int32_t rank,
    char* message, size_t capacity);

// Where an input or output is: on the device at a multiple of 256 bytes, or on the host until the context was put on a stream.
int32_t accordion_tensorrt_context_set_address(
    AccordionContext* context, char const* name, void* address, char* message, size_t capacity);

// Checks that all inputs have shapes and, where they are on the host, addresses, and computes the shapes of outputs.
int32_t accordion_tensorrt_context_infer_shapes(AccordionContext* context, char* message, size_t capacity);

// The shape of an input or output, of at most ACCORDION_MAX_RANK dimensions.
int32_t accordion_tensorrt_context_shape(
    AccordionContext* context, char const* name, int64_t* shape, int32_t* rank, char* message, size_t capacity);

// Puts the work on `stream` (a CUstream) and does not wait for it.
int32_t accordion_tensorrt_context_enqueue(AccordionContext* context, void* stream, char* message, size_t capacity);

// Has the context measure its layers from now on. Whatever is enqueued is waited for then, and cannot be captured.
void accordion_tensorrt_context_measure_layers(AccordionContext* context);

// Tells `layer` of every layer that was measured since this was last called, in the order of execution, and forgets them.
void accordion_tensorrt_context_layer_times(
    AccordionContext* context, void* user, void (*layer)(void* user, char const* name, float milliseconds));

// What the engine says of its layers: NVIDIA's JSON, which is to be freed.
int32_t accordion_tensorrt_engine_layers(AccordionEngine* engine, AccordionBytes* json, char* message, size_t capacity);

// What was put on a stream is done.
void accordion_tensorrt_context_close(AccordionContext* context);

// The libraries themselves stay loaded: their plugin registry outlives every user of it.
void accordion_tensorrt_close(AccordionTensorRt* tensorrt);

#ifdef __cplusplus
}
#endif

#endif
