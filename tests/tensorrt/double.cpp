// The shim's interface without NVIDIA's libraries: what an engine computes is asked of callbacks that the test registers, when the
// emulated driver gets to it. What NVIDIA's library expects of its caller is checked, and a caller that breaks it ends the process.

#include "../../plugins/tensorrt/shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

extern "C" {

// An input or output in a call; `data` is null where only shapes are wanted and the tensor is not on the host.
struct DoubleTensor {
  const char *name;
  int32_t is_input, on_host, type, rank;
  int64_t shape[ACCORDION_MAX_RANK];
  void *data;
};

struct DoubleCallbacks {
  // Describes the engine of a plan, at most `capacity` tensors, whose names live on.
  int32_t (*open)(const void *plan, size_t bytes, uint64_t *handle, DoubleTensor *tensors, int32_t capacity, int32_t *count,
                  int32_t *profiles);
  // Computes; the shapes of outputs are written, and their data unless it is null.
  int32_t (*run)(uint64_t handle, DoubleTensor *tensors, int32_t count);
  void (*close)(uint64_t handle);
  // Tells of every layer of the engine, in the order of execution: what a run takes the device is the sum of their times.
  void (*layers)(uint64_t handle, void *user, void (*layer)(void *user, const char *name, const char *metadata, float milliseconds));
};

}  // extern "C"

namespace {

DoubleCallbacks callbacks;

[[noreturn]] void broken(const std::string &what) {
  fprintf(stderr, "double of the shim: %s\n", what.c_str());
  abort();
}

template <class Function>
Function *driver(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  if (!found) broken(std::string("the emulated driver has no ") + name);
  return reinterpret_cast<Function *>(found);
}

int refused(const std::string &why, char *message, size_t capacity) {
  snprintf(message, capacity, "%s", why.c_str());
  return ACCORDION_RUN;
}

// The number of the buffer in which these bytes of the device lie, which is no other buffer's; 0 if they are nobody's.
uint64_t owner(const void *address, size_t bytes) {
  return driver<uint64_t(uint64_t, size_t)>("emulated_driver_owner")(uint64_t(address), bytes);
}

size_t bytes_of(const DoubleTensor &tensor) {
  static const size_t sizes[] = {4, 2, 1, 4, 1, 1, 1, 2, 8};
  size_t bytes = sizes[tensor.type];
  for (int i = 0; i < tensor.rank; i++) bytes *= size_t(tensor.shape[i]);
  return bytes;
}

}  // namespace

struct AccordionTensorRt {};

struct Layer {
  std::string name, metadata;
  float milliseconds;
};

std::vector<Layer> layers_of(uint64_t handle) {
  std::vector<Layer> layers;
  callbacks.layers(handle, &layers, [](void *user, const char *name, const char *metadata, float milliseconds) {
    static_cast<std::vector<Layer> *>(user)->push_back({name, metadata, milliseconds});
  });
  return layers;
}

struct AccordionEngine {
  uint64_t handle;
  std::vector<DoubleTensor> tensors;
  int profiles;
  // How many there are of each profile.
  std::multiset<int> contexts;
};

struct AccordionContext {
  AccordionEngine *engine;
  int profile;
  void *stream;
  std::vector<DoubleTensor> tensors;
  std::vector<bool> shaped;
  // In which buffers the tensors and the memory for intermediate values lay when their addresses were given.
  std::vector<uint64_t> owners;
  uint64_t memory_owner = 0;
  bool inferred = false, has_run = false;
  // Whether it is still there, for work that is done later.
  std::shared_ptr<bool> open = std::make_shared<bool>(true);
  void *memory = nullptr;
  int64_t memory_bytes = 0;
  bool measures_layers = false;
  std::vector<Layer> measured = {};

  int64_t needed() const { return 1024 * (profile + 1); }

  DoubleTensor *find(const char *name) {
    inferred = false;
    for (DoubleTensor &tensor : tensors)
      if (!strcmp(tensor.name, name)) return &tensor;
    broken(std::string("there is no tensor ") + name);
  }
};

extern "C" {

void accordion_double_register(const DoubleCallbacks *registered) { callbacks = *registered; }

int32_t accordion_tensorrt_open(const char *, const char *, AccordionTensorRt **opened, char *, size_t) {
  return *opened = new AccordionTensorRt, ACCORDION_OK;
}

void accordion_tensorrt_versions(const AccordionTensorRt *, int32_t *headers, int32_t *library) {
  *headers = *library = 110400;
}

int32_t accordion_tensorrt_load_plugins(AccordionTensorRt *, const char *, char *, size_t) { return ACCORDION_OK; }

void accordion_tensorrt_close(AccordionTensorRt *tensorrt) { delete tensorrt; }

int32_t accordion_tensorrt_engine_open(AccordionTensorRt *, const void *plan, size_t bytes, AccordionObserver,
                                       AccordionEngine **opened, int32_t *tensors, int32_t *profiles, char *message,
                                       size_t capacity) {
  if (!callbacks.open) return refused("a plan of another library", message, capacity);
  constexpr int32_t MOST = 4096;
  std::vector<DoubleTensor> described(MOST);
  uint64_t handle = 0;
  if (callbacks.open(plan, bytes, &handle, described.data(), MOST, tensors, profiles) != 0)
    return refused("a plan of another library", message, capacity);
  described.resize(size_t(*tensors));
  *opened = new AccordionEngine{handle, described, *profiles, {}};
  return ACCORDION_OK;
}

int32_t accordion_tensorrt_engine_tensor(AccordionEngine *engine, int32_t index, AccordionTensor *tensor, char *, size_t) {
  const DoubleTensor &found = engine->tensors.at(size_t(index));
  *tensor = {found.name, found.is_input, found.on_host, found.type, 1, found.rank, {}};
  memcpy(tensor->shape, found.shape, sizeof(found.shape));
  return ACCORDION_OK;
}

void accordion_tensorrt_engine_close(AccordionEngine *engine) {
  if (!engine->contexts.empty()) broken("an engine is closed before its contexts");
  callbacks.close(engine->handle);
  delete engine;
}

int32_t accordion_tensorrt_context_open(AccordionEngine *engine, int32_t profile, void *stream, AccordionContext **opened,
                                        int64_t *memory_bytes, char *, size_t) {
  if (profile < 0 || profile >= engine->profiles) broken("there is no such profile");
  engine->contexts.insert(profile);
  auto *context = new AccordionContext{engine, profile, stream, engine->tensors, {}, {}};
  context->shaped.resize(context->tensors.size());
  context->owners.resize(context->tensors.size());
  *memory_bytes = context->needed();
  return *opened = context, ACCORDION_OK;
}

void accordion_tensorrt_context_set_memory(AccordionContext *context, void *memory, int64_t bytes) {
  context->memory = memory;
  context->memory_bytes = bytes;
  context->memory_owner = owner(memory, size_t(bytes));
}

int32_t accordion_tensorrt_context_set_shape(AccordionContext *context, const char *name, const int64_t *shape, int32_t rank,
                                             char *, size_t) {
  DoubleTensor *tensor = context->find(name);
  if (!tensor->is_input || rank != tensor->rank) broken(std::string("a shape that does not fit ") + name);
  memcpy(tensor->shape, shape, size_t(rank) * sizeof(int64_t));
  context->shaped[size_t(tensor - context->tensors.data())] = true;
  return ACCORDION_OK;
}

int32_t accordion_tensorrt_context_set_address(AccordionContext *context, const char *name, void *address, char *, size_t) {
  DoubleTensor *tensor = context->find(name);
  const bool inferred = !tensor->is_input;
  if (!address) broken(std::string("a null address for ") + name);
  if (!tensor->on_host && uint64_t(address) % 256 != 0) broken(std::string("an address that is not aligned for ") + name);
  tensor->data = address;
  if (!tensor->on_host) context->owners[size_t(tensor - context->tensors.data())] = owner(address, 1);
  context->inferred = inferred;
  return ACCORDION_OK;
}

int32_t accordion_tensorrt_context_infer_shapes(AccordionContext *context, char *message, size_t capacity) {
  std::vector<DoubleTensor> tensors = context->tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    DoubleTensor &tensor = tensors[i];
    if (tensor.is_input && (!context->shaped[i] || !tensor.data)) broken(std::string("not specified: ") + tensor.name);
    if (!tensor.on_host) tensor.data = nullptr;
  }
  if (callbacks.run(context->engine->handle, tensors.data(), int32_t(tensors.size())) != 0)
    return refused("the shapes do not go together", message, capacity);
  for (size_t i = 0; i < tensors.size(); i++)
    if (!tensors[i].is_input) {
      memcpy(context->tensors[i].shape, tensors[i].shape, sizeof(tensors[i].shape));
      context->tensors[i].rank = tensors[i].rank;
      // Every call has to say anew where its results go.
      context->tensors[i].data = nullptr;
    }
  context->inferred = true;
  return ACCORDION_OK;
}

int32_t accordion_tensorrt_context_shape(AccordionContext *context, const char *name, int64_t *shape, int32_t *rank, char *,
                                         size_t) {
  if (!context->inferred) broken("a shape is asked for before it is known");
  const DoubleTensor *tensor = context->find(name);
  context->inferred = true;
  memcpy(shape, tensor->shape, sizeof(tensor->shape));
  return *rank = tensor->rank, ACCORDION_OK;
}

int32_t accordion_tensorrt_context_enqueue(AccordionContext *context, void *stream, char *message, size_t capacity) {
  if (stream != context->stream || !context->inferred) broken("another stream, or shapes that are not known");
  if (!context->memory || context->memory_bytes < context->needed()) broken("too little memory");
  const bool records = driver<bool()>("emulated_driver_records")();
  if (records && !context->has_run) broken("a context is recorded that has not run yet");
  if (records && context->measures_layers) broken("a context is recorded that measures its layers");
  struct Call {
    uint64_t handle;
    std::vector<DoubleTensor> tensors;
    std::vector<uint64_t> owners;
    std::vector<std::string> host;
    void *memory;
    size_t memory_bytes;
    uint64_t memory_owner;
    std::shared_ptr<bool> open;
  };
  Call call{context->engine->handle, context->tensors, context->owners, {}, context->memory, size_t(context->memory_bytes),
            context->memory_owner, context->open};
  for (DoubleTensor &tensor : call.tensors) {
    if (!tensor.data) broken(std::string("no address for ") + tensor.name);
    // What is on the host is read now, and need not stay.
    if (tensor.on_host) call.host.emplace_back(static_cast<const char *>(tensor.data), bytes_of(tensor));
  }
  const std::function<void()> work = [call]() mutable {
    if (!*call.open) broken("a context was closed while its work was under way");
    if (!call.memory_owner || owner(call.memory, call.memory_bytes) != call.memory_owner)
      broken("memory for intermediate values is gone");
    memset(call.memory, 0x3c, call.memory_bytes);
    size_t host = 0;
    for (size_t i = 0; i < call.tensors.size(); i++) {
      DoubleTensor &tensor = call.tensors[i];
      if (tensor.on_host)
        tensor.data = const_cast<char *>(call.host[host++].data());
      else if (!call.owners[i] || owner(tensor.data, bytes_of(tensor)) != call.owners[i])
        broken(std::string("memory is gone: ") + tensor.name);
    }
    if (callbacks.run(call.handle, call.tensors.data(), int32_t(call.tensors.size())) != 0) broken("a run failed");
    for (const Layer &layer : layers_of(call.handle))
      driver<void(uint64_t)>("emulated_driver_spend")(uint64_t(double(layer.milliseconds) * 1e6));
  };
  if (!driver<bool(const std::function<void()> *)>("emulated_driver_defer")(&work))
    return refused("a layer cannot be recorded", message, capacity);
  context->has_run = true;
  if (context->measures_layers) {
    // NVIDIA's library waits here, too.
    driver<int(void *)>("cuStreamSynchronize")(stream);
    for (const Layer &layer : layers_of(context->engine->handle)) context->measured.push_back(layer);
  }
  return ACCORDION_OK;
}

void accordion_tensorrt_context_measure_layers(AccordionContext *context) { context->measures_layers = true; }

void accordion_tensorrt_context_layer_times(AccordionContext *context, void *user,
                                            void (*layer)(void *user, const char *name, float milliseconds)) {
  for (const Layer &measured : context->measured) layer(user, measured.name.c_str(), measured.milliseconds);
  context->measured.clear();
}

int32_t accordion_tensorrt_engine_layers(AccordionEngine *engine, AccordionBytes *json, char *, size_t) {
  // Layers without metadata are listed by their names, as those of an engine that was built to keep no more.
  std::string text = "{\"Layers\": [";
  for (const Layer &layer : layers_of(engine->handle)) {
    const std::string name = "\"" + layer.name + "\"";
    if (text.back() != '[') text += ", ";
    text += layer.metadata.empty() ? name
                                   : "{\"Name\": " + name + ", \"LayerType\": \"kgen\", \"Metadata\": \"" + layer.metadata + "\"}";
  }
  text += "], \"Bindings\": []}";
  json->data = malloc(text.size());
  json->size = text.size();
  memcpy(json->data, text.data(), text.size());
  return ACCORDION_OK;
}

void accordion_tensorrt_context_close(AccordionContext *context) {
  *context->open = false;
  context->engine->contexts.erase(context->engine->contexts.find(context->profile));
  delete context;
}

void accordion_tensorrt_free(AccordionBytes bytes) { free(bytes.data); }

}  // extern "C"
