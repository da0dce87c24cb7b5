// ai.accordion::StridedCompress and StridedCompressMean as TensorRT plugins: contract.md beside this file.

#include "../tensorrt/plugin.h"

namespace accordion {
namespace {

using nvinfer1::DataType;

struct Parameters {
    // Whether it has the input x2 and takes the mean of both.
    bool mean = false;
    int32_t ratio = 1;
    int32_t offset = 0;

    static std::vector<nvinfer1::PluginField> described() {
        return {{"ratio", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
            {"offset", nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
    }

    std::optional<Parameters> with(Fields const& fields) const {
        auto const ratio = fields.integer("ratio");
        auto const offset = fields.integer("offset");
        if (!ratio || !offset || *ratio < 1 || *ratio > INT32_MAX || *offset < 0 || *offset >= *ratio) {
            return std::nullopt;
        }
        return Parameters{mean, static_cast<int32_t>(*ratio), static_cast<int32_t>(*offset)};
    }

    std::vector<nvinfer1::PluginField> fields() const {
        return {{"ratio", &ratio, nvinfer1::PluginFieldType::kINT32, 1},
            {"offset", &offset, nvinfer1::PluginFieldType::kINT32, 1}};
    }
};

class StridedCompress final : public Plugin<StridedCompress, Parameters> {
public:
    using Plugin::Plugin;

    ~StridedCompress() override {
        if (cublaslt_ != nullptr) {
            accordion_cublaslt_close(cublaslt_);
        }
    }

    char const* getPluginName() const noexcept override {
        return parameters_.mean ? "StridedCompressMean" : "StridedCompress";
    }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(
        DataType* types, int32_t outputs, DataType const* inputs, int32_t count) const noexcept override {
        if (outputs != 1 || count != weight() + 1) {
            return REFUSED;
        }
        types[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::DimsExprs const*,
        int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
        nvinfer1::IExprBuilder& builder) noexcept override {
        using nvinfer1::DimensionOperation;
        if (count != weight() + 1 || shape_count != 0 || output_count != 1 || inputs[0].nbDims != 3
            || inputs[weight()].nbDims != 2) {
            return REFUSED;
        }
        auto const& window = *inputs[0].d[1];
        if (window.isConstant() && window.getConstantValue() % parameters_.ratio != 0) {
            log_error("StridedCompress: the ratio does not divide the window");
            return REFUSED;
        }
        auto const* const kept
            = builder.operation(DimensionOperation::kFLOOR_DIV, window, *builder.constant(parameters_.ratio));
        outputs[0].nbDims = 2;
        outputs[0].d[0] = builder.operation(DimensionOperation::kPROD, *inputs[0].d[0], *kept);
        outputs[0].d[1] = inputs[weight()].d[0];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        if (inputs != weight() + 1 || outputs != 1 || position < 0 || position >= inputs + outputs
            || tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) {
            return false;
        }
        auto const type = tensors[position].desc.type;
        return position == 0 ? element_type(type).has_value() : type == tensors[0].desc.type;
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        auto const type = element_type(inputs[0].desc.type);
        if (!type) {
            return 0;
        }
        AccordionStridedCompress call = shaped(inputs[0].max, inputs[weight()].max, *type);
        // Only whether there is a second input matters, and its memory is not there yet.
        call.rows.x2 = parameters_.mean ? &parameters_ : nullptr;
        return accordion_strided_compress_workspace(&call);
    }

    char const* getTimingCacheID() noexcept override {
        try {
            timing_id_ = std::to_string(parameters_.ratio);
        } catch (std::exception const&) {
            return nullptr;
        }
        return timing_id_.c_str();
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        auto const type = element_type(in[0].type);
        if (!type) {
            log_error("StridedCompress: an element type that it was not built for");
            return REFUSED;
        }
        AccordionStridedCompress call = shaped(in[0].dims, in[weight()].dims, *type);
        call.rows.x = inputs[0];
        call.rows.x2 = parameters_.mean ? inputs[1] : nullptr;
        call.rows.y = outputs[0];
        call.weight = inputs[weight()];
        call.workspace = workspace;
        call.workspace_bytes = accordion_strided_compress_workspace(&call);
        char const* refusal = cublaslt_ == nullptr ? accordion_cublaslt_open(nullptr, &cublaslt_) : nullptr;
        if (refusal == nullptr) {
            refusal = accordion_strided_compress(cublaslt_, &call, stream);
        }
        if (refusal != nullptr) {
            log_error(refusal);
            return REFUSED;
        }
        return 0;
    }

private:
    // The index of the weight, which is the last input.
    int32_t weight() const { return parameters_.mean ? 2 : 1; }

    // A call on x [S, W, He] and weight [H, He] without their memory.
    AccordionStridedCompress shaped(nvinfer1::Dims const& x, nvinfer1::Dims const& weight, int32_t type) const {
        AccordionStridedCompress call{};
        call.rows.segments = x.d[0];
        call.rows.window = x.d[1];
        call.rows.width = x.d[2];
        call.rows.ratio = parameters_.ratio;
        call.rows.offset = parameters_.offset;
        call.rows.type = type;
        call.out_width = weight.d[0];
        return call;
    }

    // Opened with the first call: every execution context has a plugin of its own.
    AccordionCublasLt* cublaslt_ = nullptr;
    std::string timing_id_;
};

} // namespace

nvinfer1::IPluginCreatorInterface* strided_compress_creator() {
    static Creator<StridedCompress, Parameters> creator("StridedCompress");
    return &creator;
}

nvinfer1::IPluginCreatorInterface* strided_compress_mean_creator() {
    static Creator<StridedCompress, Parameters> creator("StridedCompressMean", Parameters{true});
    return &creator;
}

} // namespace accordion
