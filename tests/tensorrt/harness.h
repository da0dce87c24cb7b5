// What stands in for parser, builder and engine in front of a plugin.

#ifndef ACCORDION_TESTS_HARNESS_H
#define ACCORDION_TESTS_HARNESS_H

#include <NvInfer.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

inline int checks = 0;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        ++checks;                                                                                                      \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                               \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (false)

// ---- Dimensions as a builder has them: numbers, or names of numbers known at run time.

class Expression final : public IDimensionExpr, apiv::VDimensionExpr {
public:
    Expression(std::string text, int64_t value, bool constant) : text(std::move(text)), value_(value), constant_(constant) {
        mImpl = this;
    }
    bool isConstant() const override { return constant_; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }
    std::string const text;

private:
    int64_t value_;
    bool constant_;
};

class Builder final : public IExprBuilder, apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }

    IDimensionExpr const* constant(int64_t value) override {
        return &made_.emplace_back(std::to_string(value), value, true);
    }

    IDimensionExpr const* named(char const* name) { return &made_.emplace_back(name, 0, false); }

    IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) override {
        CHECK(op == DimensionOperation::kPROD || op == DimensionOperation::kFLOOR_DIV);
        bool const product = op == DimensionOperation::kPROD;
        if (first.isConstant() && second.isConstant()) {
            int64_t const a = first.getConstantValue();
            int64_t const b = second.getConstantValue();
            return constant(product ? a * b : a / b);
        }
        return &made_.emplace_back("(" + text(&first) + (product ? " * " : " / ") + text(&second) + ")", 0, false);
    }

    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }

    static std::string text(IDimensionExpr const* expression) {
        return static_cast<Expression const*>(expression)->text;
    }

    // A shape from names and numbers.
    DimsExprs shape(std::vector<char const*> const& dims) {
        DimsExprs shape{};
        shape.nbDims = static_cast<int32_t>(dims.size());
        for (size_t i = 0; i < dims.size(); ++i) {
            char* end = nullptr;
            long const number = std::strtol(dims[i], &end, 10);
            shape.d[i] = *end == '\0' ? constant(number) : named(dims[i]);
        }
        return shape;
    }

private:
    std::deque<Expression> made_;
};

inline std::string text(DimsExprs const& shape) {
    std::string text;
    for (int32_t i = 0; i < shape.nbDims; ++i) {
        text += (i > 0 ? " " : "") + Builder::text(shape.d[i]);
    }
    return text;
}

// ---- A plugin with its three capabilities.

struct Made {
    std::unique_ptr<IPluginV3> plugin;
    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;

    explicit Made(IPluginV3* made) : plugin(made) {
        CHECK(made != nullptr);
        core = static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
        build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
        runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        CHECK(core != nullptr && build != nullptr && runtime != nullptr);
    }
};

inline IPluginCreatorV3One& creator(IPluginRegistry& registry, char const* name) {
    auto* const found = registry.getCreator(name, "1", "");
    CHECK(found != nullptr);
    auto* const creator = static_cast<IPluginCreatorV3One*>(found);
    CHECK(std::strcmp(creator->getPluginName(), name) == 0);
    return *creator;
}

inline IPluginV3* create(IPluginCreatorV3One& creator, std::vector<PluginField> const& fields,
    TensorRTPhase phase = TensorRTPhase::kBUILD) {
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator.createPlugin("a node", &collection, phase);
}

inline std::vector<PluginField> serialized(Made const& made) {
    PluginFieldCollection const* const collection = made.runtime->getFieldsToSerialize();
    CHECK(collection != nullptr);
    return {collection->fields, collection->fields + collection->nbFields};
}

// What an engine that is loaded again makes of what a plugin gave to be serialised, and what a context makes of that.
inline Made through_a_plan(IPluginCreatorV3One& creator, Made const& made) {
    Made loaded(create(creator, serialized(made), TensorRTPhase::kRUNTIME));
    Made attached(loaded.runtime->attachToContext(nullptr));
    CHECK(std::strcmp(attached.core->getPluginName(), made.core->getPluginName()) == 0);
    CHECK(std::strcmp(attached.core->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(attached.core->getPluginNamespace(), "") == 0);
    auto const before = serialized(made);
    auto const after = serialized(attached);
    CHECK(before.size() == after.size());
    for (size_t i = 0; i < before.size(); ++i) {
        CHECK(std::strcmp(before[i].name, after[i].name) == 0 && before[i].type == after[i].type);
        CHECK(before[i].length == 1 && after[i].length == 1 && std::memcmp(before[i].data, after[i].data, 4) == 0);
    }
    return attached;
}

// All combinations of types that a plugin takes, asked for as a builder does: position by position, with what lies behind unset.
inline std::vector<std::vector<DataType>> combinations(IPluginV3OneBuild& plugin, int32_t inputs, int32_t outputs) {
    std::vector<DataType> const types{DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT64,
        DataType::kINT32, DataType::kINT8, DataType::kBOOL};
    std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
    for (auto& tensor : tensors) {
        tensor.desc.format = TensorFormat::kLINEAR;
        tensor.desc.type = DataType::kBOOL;
    }
    std::vector<std::vector<DataType>> found;
    std::vector<DataType> chosen;
    auto const extend = [&](auto const& self, int32_t position) -> void {
        if (position == inputs + outputs) {
            found.push_back(chosen);
            return;
        }
        for (DataType const type : types) {
            tensors[position].desc.type = type;
            bool const taken = plugin.supportsFormatCombination(position, tensors.data(), inputs, outputs);
            tensors[position].desc.format = TensorFormat::kCHW32;
            CHECK(!plugin.supportsFormatCombination(position, tensors.data(), inputs, outputs));
            tensors[position].desc.format = TensorFormat::kLINEAR;
            if (taken) {
                chosen.push_back(type);
                self(self, position + 1);
                chosen.pop_back();
            }
        }
        tensors[position].desc.type = DataType::kBOOL;
    };
    extend(extend, 0);
    CHECK(!plugin.supportsFormatCombination(0, tensors.data(), inputs - 1, outputs));
    for (auto const& types_of : found) {
        std::vector<DataType> given(outputs);
        CHECK(plugin.getOutputDataTypes(given.data(), outputs, types_of.data(), inputs) == 0);
        CHECK(std::equal(given.begin(), given.end(), types_of.begin() + inputs));
    }
    return found;
}

#endif
