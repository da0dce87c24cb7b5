// What the plugins of this library have in common.
//
// A plugin is one object with NVIDIA's three capabilities: core (what it is called), build (which shapes, types and layouts) and
// runtime (run). `Plugin` implements what is the same for all, `Creator` makes plugins from fields, of which a parser gives those
// of the graph's node and a plan those that were serialised.

#ifndef ACCORDION_TENSORRT_PLUGIN_H
#define ACCORDION_TENSORRT_PLUGIN_H

#include "../cuda/accordion_kernels.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

namespace accordion {

// The version under which the parser looks for plugins unless a graph says otherwise, and the namespace.
inline constexpr char const* PLUGIN_VERSION = "1";
inline constexpr char const* PLUGIN_NAMESPACE = "";

// What a call returns that refuses.
inline constexpr int32_t REFUSED = 1;

// Tells NVIDIA's logger, if the library was given one.
void log_error(std::string const& text) noexcept;

// The element type as the kernels count them, or nothing.
inline std::optional<int32_t> element_type(nvinfer1::DataType type) {
    switch (type) {
    case nvinfer1::DataType::kFLOAT: return ACCORDION_F32;
    case nvinfer1::DataType::kHALF: return ACCORDION_F16;
    case nvinfer1::DataType::kBF16: return ACCORDION_BF16;
    default: return std::nullopt;
    }
}

// Numbers that a plugin was created with. NVIDIA's types of numbers in fields are many; graphs have two.
class Fields {
public:
    explicit Fields(nvinfer1::PluginFieldCollection const* fields) : fields_(fields) {}

    // The integer `name`, or nothing if it is absent or no integer.
    std::optional<int64_t> integer(char const* name) const;
    // The float `name`, or nothing.
    std::optional<float> number(char const* name) const;

private:
    nvinfer1::PluginField const* find(char const* name) const;
    nvinfer1::PluginFieldCollection const* fields_;
};

// `Parameters` is what a plugin was created with; its `fields()` point into it.
template <typename Self, typename Parameters>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    explicit Plugin(Parameters const& parameters) : parameters_(parameters) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Self(parameters_); }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    char const* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }

    char const* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
        int32_t) noexcept override {
        return 0;
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const*, int32_t, nvinfer1::PluginTensorDesc const*,
        int32_t) noexcept override {
        return 0;
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        try {
            fields_ = parameters_.fields();
        } catch (std::exception const& error) {
            log_error(error.what());
            return nullptr;
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

protected:
    Parameters const parameters_;

private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// Creates plugins of one operator. `Parameters` has `static std::vector<PluginField> described()`, its fields with their types, and
// `with(fields)`, itself with what the fields say, or nothing if that is not enough.
template <typename Operator, typename Parameters>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(char const* name, Parameters const& defaults = {})
        : name_(name), defaults_(defaults), fields_(Parameters::described()),
          collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

    nvinfer1::IPluginV3* createPlugin(
        char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept override {
        try {
            if (auto const parameters = defaults_.with(Fields(fields))) {
                return new (std::nothrow) Operator(*parameters);
            }
            log_error(std::string(name_) + ": fields are missing or out of range");
        } catch (std::exception const& error) {
            log_error(error.what());
        }
        return nullptr;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

    char const* getPluginName() const noexcept override { return name_; }

    char const* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }

    char const* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }

private:
    char const* name_;
    Parameters defaults_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// The creators of each operator's file.
nvinfer1::IPluginCreatorInterface* topk_prune_creator();
nvinfer1::IPluginCreatorInterface* strided_compress_creator();
nvinfer1::IPluginCreatorInterface* strided_compress_mean_creator();

} // namespace accordion

#endif
