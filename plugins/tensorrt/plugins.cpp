// What the plugin library exports, and NVIDIA's registry looks for when it loads one.

#include "plugin.h"

#include <array>
#include <atomic>
#include <cstring>

namespace accordion {

namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}

void log_error(std::string const& text) noexcept {
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    }
}

nvinfer1::PluginField const* Fields::find(char const* name) const {
    for (int32_t i = 0; fields_ != nullptr && i < fields_->nbFields; ++i) {
        nvinfer1::PluginField const& field = fields_->fields[i];
        if (field.name != nullptr && std::strcmp(field.name, name) == 0 && field.data != nullptr && field.length == 1) {
            return &field;
        }
    }
    return nullptr;
}

std::optional<int64_t> Fields::integer(char const* name) const {
    nvinfer1::PluginField const* const field = find(name);
    if (field != nullptr && field->type == nvinfer1::PluginFieldType::kINT32) {
        return *static_cast<int32_t const*>(field->data);
    }
    if (field != nullptr && field->type == nvinfer1::PluginFieldType::kINT64) {
        return *static_cast<int64_t const*>(field->data);
    }
    return std::nullopt;
}

std::optional<float> Fields::number(char const* name) const {
    nvinfer1::PluginField const* const field = find(name);
    if (field != nullptr && field->type == nvinfer1::PluginFieldType::kFLOAT32) {
        return *static_cast<float const*>(field->data);
    }
    return std::nullopt;
}

} // namespace accordion

#define ACCORDION_EXPORT extern "C" __attribute__((visibility("default")))

ACCORDION_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { accordion::logger_finder.store(finder); }

ACCORDION_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::array<nvinfer1::IPluginCreatorInterface*, 3> const creators{accordion::topk_prune_creator(),
        accordion::strided_compress_creator(), accordion::strided_compress_mean_creator()};
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
