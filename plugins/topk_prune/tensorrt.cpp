// ai.accordion::TopKPrune as a TensorRT plugin: contract.md beside this file.
//
// `keep` decides shapes: it is a shape input, which NVIDIA does not count among the inputs that have memory. How many rows stay is
// read from the outputs then.

#include "../tensorrt/plugin.h"

#include <cmath>

namespace accordion {
namespace {

using nvinfer1::DataType;

enum Input { QUERY_LAST, KEY, BIAS, POSITION_IDS, HIDDEN, KV, PREFIX_LENGTH, SUFFIX_LENGTH, INPUTS };
enum Output { KEEP_IDX, KEPT_HIDDEN, KEPT_POSITION_IDS, KEPT_KV, SCORES, METRIC, OUTPUTS };

// Ranks of the inputs.
constexpr int32_t RANKS[INPUTS] = {3, 4, 1, 2, 3, 6, 1, 1};

struct Parameters {
    // 1 / sqrt(head width) if it is not given.
    std::optional<float> scale;

    static std::vector<nvinfer1::PluginField> described() {
        return {{"scale", nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1}};
    }

    std::optional<Parameters> with(Fields const& fields) const {
        auto const scale = fields.number("scale");
        if (scale && !std::isfinite(*scale)) {
            return std::nullopt;
        }
        return Parameters{scale};
    }

    std::vector<nvinfer1::PluginField> fields() const {
        if (!scale) {
            return {};
        }
        return {{"scale", &*scale, nvinfer1::PluginFieldType::kFLOAT32, 1}};
    }
};

class TopKPrune final : public Plugin<TopKPrune, Parameters> {
public:
    using Plugin::Plugin;

    char const* getPluginName() const noexcept override { return "TopKPrune"; }

    int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

    int32_t getOutputDataTypes(
        DataType* types, int32_t outputs, DataType const* inputs, int32_t count) const noexcept override {
        if (outputs != OUTPUTS || count != INPUTS) {
            return REFUSED;
        }
        types[KEEP_IDX] = DataType::kINT64;
        types[KEPT_HIDDEN] = inputs[HIDDEN];
        types[KEPT_POSITION_IDS] = DataType::kINT64;
        types[KEPT_KV] = inputs[KV];
        types[SCORES] = DataType::kFLOAT;
        types[METRIC] = DataType::kFLOAT;
        return 0;
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::DimsExprs const* shape_inputs,
        int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
        nvinfer1::IExprBuilder&) noexcept override {
        if (count != INPUTS || shape_count != 1 || output_count != OUTPUTS || shape_inputs[0].nbDims != 1) {
            return REFUSED;
        }
        for (int32_t i = 0; i < INPUTS; ++i) {
            if (inputs[i].nbDims != RANKS[i]) {
                return REFUSED;
            }
        }
        auto const* const keep = shape_inputs[0].d[0];
        auto const* const batch = inputs[HIDDEN].d[0];
        auto const* const length = inputs[HIDDEN].d[1];
        outputs[KEEP_IDX].nbDims = 2;
        outputs[KEEP_IDX].d[0] = batch;
        outputs[KEEP_IDX].d[1] = keep;
        outputs[KEPT_HIDDEN] = inputs[HIDDEN];
        outputs[KEPT_HIDDEN].d[1] = keep;
        outputs[KEPT_POSITION_IDS] = outputs[KEEP_IDX];
        outputs[KEPT_KV] = inputs[KV];
        outputs[KEPT_KV].d[4] = keep;
        outputs[SCORES] = outputs[KEEP_IDX];
        outputs[SCORES].d[1] = length;
        outputs[METRIC].nbDims = 3;
        outputs[METRIC].d[0] = batch;
        outputs[METRIC].d[1] = inputs[QUERY_LAST].d[1];
        outputs[METRIC].d[2] = length;
        return 0;
    }

    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        if (inputs != INPUTS || outputs != OUTPUTS || position < 0 || position >= INPUTS + OUTPUTS
            || tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) {
            return false;
        }
        auto const type = [&](int32_t at) { return tensors[at].desc.type; };
        auto const is = [&](DataType wanted) { return type(position) == wanted; };
        switch (position) {
        case QUERY_LAST:
        case HIDDEN: return element_type(type(position)).has_value();
        case KEY:
        case KV:
        case INPUTS + KEPT_KV: return is(type(QUERY_LAST));
        case INPUTS + KEPT_HIDDEN: return is(type(HIDDEN));
        case BIAS:
        case INPUTS + SCORES:
        case INPUTS + METRIC: return is(DataType::kFLOAT);
        default: return is(DataType::kINT64);
        }
    }

    char const* getTimingCacheID() noexcept override { return "1"; } // no parameter changes how long it takes

    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) noexcept override {
        auto const type = element_type(in[KEY].type);
        auto const hidden_type = element_type(in[HIDDEN].type);
        if (!type || !hidden_type) {
            log_error("TopKPrune: an element type that it was not built for");
            return REFUSED;
        }
        auto const* const kv = in[KV].dims.d;
        AccordionTopKPrune call{};
        call.query_last = inputs[QUERY_LAST];
        call.key = inputs[KEY];
        call.bias = static_cast<float const*>(inputs[BIAS]);
        call.position_ids = static_cast<int64_t const*>(inputs[POSITION_IDS]);
        call.hidden = inputs[HIDDEN];
        call.kv = inputs[KV];
        call.prefix_length_at = static_cast<int64_t const*>(inputs[PREFIX_LENGTH]);
        call.suffix_length_at = static_cast<int64_t const*>(inputs[SUFFIX_LENGTH]);
        call.keep_idx = static_cast<int64_t*>(outputs[KEEP_IDX]);
        call.kept_hidden = outputs[KEPT_HIDDEN];
        call.kept_position_ids = static_cast<int64_t*>(outputs[KEPT_POSITION_IDS]);
        call.kept_kv = outputs[KEPT_KV];
        call.scores = static_cast<float*>(outputs[SCORES]);
        call.metric = static_cast<float*>(outputs[METRIC]);
        call.batch = kv[0];
        call.heads = in[QUERY_LAST].dims.d[1];
        call.kv_heads = kv[3];
        call.head_dim = kv[5];
        call.length = kv[4];
        call.hidden_size = in[HIDDEN].dims.d[2];
        call.layers = kv[1];
        call.keep = out[KEEP_IDX].dims.d[1];
        call.bias_length = in[BIAS].dims.d[0];
        call.scale = parameters_.scale.value_or(1.0F / std::sqrt(static_cast<float>(call.head_dim)));
        call.type = *type;
        call.hidden_type = *hidden_type;
        if (char const* const refusal = accordion_topk_prune(&call, stream)) {
            log_error(refusal);
            return REFUSED;
        }
        return 0;
    }
};

} // namespace

nvinfer1::IPluginCreatorInterface* topk_prune_creator() {
    static Creator<TopKPrune, Parameters> creator("TopKPrune");
    return &creator;
}

} // namespace accordion
