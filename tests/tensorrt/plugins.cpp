// The plugin library in NVIDIA's own registry, without a GPU: what a parser, a builder and an engine do to a plugin is done here,
// in their order. Usage: plugins REGISTRY_LIBRARY PLUGIN_LIBRARY
//
// The library is one that was built without nvcc, so that enqueue can be called too: its numbers are held to the contracts, by
// rules that are written down here in another way than in the library.

#include "harness.h"

#include <cmath>
#include <dlfcn.h>
#include <limits>

namespace {

// ---- Tensors.

struct Random {
    uint64_t state;
    uint64_t below(uint64_t limit) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        return (state >> 33) % limit;
    }
};

// Small whole numbers, which all types hold exactly and whose products need no rounding, in the type's own bits.
uint32_t bits_of(float value, DataType type) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (type == DataType::kFLOAT) {
        return bits;
    }
    if (type == DataType::kBF16) {
        return bits >> 16;
    }
    if (std::isnan(value)) {
        return 0x7e00;
    }
    return value == 0.0F ? 0 : (bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023);
}

struct Tensor {
    PluginTensorDesc desc{};
    std::vector<unsigned char> bytes;
    std::vector<float> values; // of floats

    Tensor(DataType type, std::vector<int64_t> const& shape) {
        desc.type = type;
        desc.format = TensorFormat::kLINEAR;
        desc.dims.nbDims = static_cast<int32_t>(shape.size());
        int64_t count = 1;
        for (size_t i = 0; i < shape.size(); ++i) {
            desc.dims.d[i] = shape[i];
            count *= shape[i];
        }
        // Filled with what nobody would write, so that a row that is left out shows.
        bytes.assign(std::max<int64_t>(count * size(), 1), 0xa5);
        values.resize(count);
    }

    int64_t size() const { return desc.type == DataType::kINT64 ? 8 : desc.type == DataType::kFLOAT ? 4 : 2; }

    int64_t count() const { return static_cast<int64_t>(values.size()); }

    void set(int64_t at, float value) {
        values[at] = value;
        uint32_t const bits = bits_of(value, desc.type);
        std::memcpy(bytes.data() + at * size(), &bits, size());
    }

    void set_integer(int64_t at, int64_t value) { std::memcpy(bytes.data() + at * 8, &value, 8); }

    int64_t integer(int64_t at) const {
        int64_t value = 0;
        std::memcpy(&value, bytes.data() + at * 8, 8);
        return value;
    }

    float number(int64_t at) const {
        float value = 0;
        std::memcpy(&value, bytes.data() + at * 4, 4);
        return value;
    }

    Tensor& filled(Random& random, int64_t spread) {
        for (int64_t i = 0; i < count(); ++i) {
            set(i, static_cast<float>(random.below(2 * spread + 1)) - static_cast<float>(spread));
        }
        return *this;
    }
};

int32_t enqueue(IPluginV3OneRuntime& plugin, std::vector<Tensor*> const& inputs, std::vector<Tensor*> const& outputs,
    void* workspace = nullptr) {
    std::vector<PluginTensorDesc> in;
    std::vector<PluginTensorDesc> out;
    std::vector<void const*> from;
    std::vector<void*> to;
    for (Tensor* const tensor : inputs) {
        in.push_back(tensor->desc);
        from.push_back(tensor->bytes.data());
    }
    for (Tensor* const tensor : outputs) {
        out.push_back(tensor->desc);
        to.push_back(tensor->bytes.data());
    }
    CHECK(plugin.onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(), static_cast<int32_t>(out.size())) == 0);
    return plugin.enqueue(in.data(), out.data(), from.data(), to.data(), workspace, nullptr);
}

bool same_row(Tensor const& a, int64_t row_a, Tensor const& b, int64_t row_b, int64_t width) {
    int64_t const bytes = width * a.size();
    return std::memcmp(a.bytes.data() + row_a * bytes, b.bytes.data() + row_b * bytes, bytes) == 0;
}

// ---- TopKPrune.

struct Lengths {
    int64_t batch, heads, groups, width, length, hidden, layers, keep, prefix, suffix;
};

int32_t prune(IPluginV3OneRuntime& plugin, Lengths const& n, DataType type, DataType hidden_type, Random random, bool hostile) {
    int64_t const nb = n.length + 3;
    Tensor query(type, {n.batch, n.heads, n.width});
    Tensor key(type, {n.batch, n.groups, n.length, n.width});
    Tensor bias(DataType::kFLOAT, {nb});
    Tensor positions(DataType::kINT64, {n.batch, n.length});
    Tensor hidden(hidden_type, {n.batch, n.length, n.hidden});
    Tensor kv(type, {n.batch, n.layers, 2, n.groups, n.length, n.width});
    Tensor prefix(DataType::kINT64, {1});
    Tensor suffix(DataType::kINT64, {1});
    query.filled(random, 1);
    key.filled(random, 1); // few different scores: there are ties everywhere
    bias.filled(random, 1);
    hidden.filled(random, 8);
    kv.filled(random, 8);
    prefix.set_integer(0, n.prefix);
    suffix.set_integer(0, n.suffix);
    for (int64_t b = 0; b < n.batch; ++b) {
        for (int64_t j = 0; j < n.length; ++j) {
            positions.set_integer(b * n.length + j, j + (j + 1 == n.length ? static_cast<int64_t>(random.below(3)) : 0));
        }
    }
    if (hostile) {
        float const infinity = std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < nb; j += 3) {
            bias.set(j, infinity); // a score of minus infinity
        }
        for (int64_t i = 0; i < key.count(); i += 5 * n.width) {
            key.set(i, std::numeric_limits<float>::quiet_NaN());
        }
    }
    Tensor keep_idx(DataType::kINT64, {n.batch, n.keep});
    Tensor kept_hidden(hidden_type, {n.batch, n.keep, n.hidden});
    Tensor kept_positions(DataType::kINT64, {n.batch, n.keep});
    Tensor kept_kv(type, {n.batch, n.layers, 2, n.groups, n.keep, n.width});
    Tensor scores(DataType::kFLOAT, {n.batch, n.length});
    Tensor metric(DataType::kFLOAT, {n.batch, n.heads, n.length});
    int32_t const status = enqueue(plugin, {&query, &key, &bias, &positions, &hidden, &kv, &prefix, &suffix},
        {&keep_idx, &kept_hidden, &kept_positions, &kept_kv, &scores, &metric});
    if (status != 0) {
        return status;
    }
    auto const equal = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (int64_t b = 0; b < n.batch; ++b) {
        std::vector<float> score(n.length);
        for (int64_t j = 0; j < n.length; ++j) {
            float best = -std::numeric_limits<float>::infinity();
            bool undefined = false;
            for (int64_t h = 0; h < n.heads; ++h) {
                int64_t const g = h / (n.heads / n.groups);
                float logit = 0;
                for (int64_t i = 0; i < n.width; ++i) {
                    logit += 0.5F * query.values[(b * n.heads + h) * n.width + i]
                        * key.values[((b * n.groups + g) * n.length + j) * n.width + i];
                }
                CHECK(equal(metric.number((b * n.heads + h) * n.length + j), logit));
                undefined |= std::isnan(logit);
                best = std::fmax(best, logit);
            }
            int64_t const distance = positions.integer(b * n.length + n.length - 1) - positions.integer(b * n.length + j);
            score[j] = undefined ? NAN : best - bias.values[distance];
            if (j < n.prefix || j >= n.length - n.suffix) {
                score[j] = std::numeric_limits<float>::infinity();
            }
            CHECK(equal(scores.number(b * n.length + j), score[j]));
        }
        // A row stays if fewer than `keep` rows are better: larger, or equal and before it; a number is better than none.
        int64_t stayed = 0;
        for (int64_t j = 0; j < n.length; ++j) {
            int64_t better = 0;
            for (int64_t i = 0; i < n.length; ++i) {
                bool const none_i = std::isnan(score[i]);
                bool const none_j = std::isnan(score[j]);
                bool const tie = none_i == none_j && (none_i || score[i] == score[j]);
                better += tie ? i < j : none_i != none_j ? none_j : score[i] > score[j];
            }
            if (better >= n.keep) {
                continue;
            }
            int64_t const k = b * n.keep + stayed++;
            CHECK(keep_idx.integer(k) == j);
            CHECK(kept_positions.integer(k) == positions.integer(b * n.length + j));
            CHECK(same_row(kept_hidden, k, hidden, b * n.length + j, n.hidden));
            for (int64_t p = 0; p < n.layers * 2 * n.groups; ++p) {
                int64_t const plane = b * n.layers * 2 * n.groups + p;
                CHECK(same_row(kept_kv, plane * n.keep + stayed - 1, kv, plane * n.length + j, n.width));
            }
        }
        CHECK(stayed == n.keep);
    }
    return 0;
}

void check_topk_prune(IPluginRegistry& registry) {
    auto& maker = creator(registry, "TopKPrune");
    PluginFieldCollection const* const names = maker.getFieldNames();
    CHECK(names->nbFields == 1 && std::strcmp(names->fields[0].name, "scale") == 0);
    CHECK(names->fields[0].type == PluginFieldType::kFLOAT32);
    float scale = 0.5F;
    PluginField const field("scale", &scale, PluginFieldType::kFLOAT32, 1);
    float const endless = std::numeric_limits<float>::infinity();
    CHECK(create(maker, {{"scale", &endless, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    CHECK(serialized(Made(create(maker, {}))).empty());
    Made made(create(maker, {field}));
    scale = 7; // fields belong to the caller, who may do with them what he likes
    CHECK(made.build->getNbOutputs() == 6);

    Builder builder;
    std::vector<DimsExprs> inputs{builder.shape({"B", "H", "64"}), builder.shape({"B", "8", "L", "64"}),
        builder.shape({"nb"}), builder.shape({"B", "L"}), builder.shape({"B", "L", "576"}),
        builder.shape({"B", "3", "2", "8", "L", "64"}), builder.shape({"1"}), builder.shape({"1"})};
    DimsExprs const keep = builder.shape({"K"});
    std::vector<DimsExprs> outputs(6);
    auto const shapes = [&](int32_t shape_inputs) {
        return made.build->getOutputShapes(inputs.data(), 8, &keep, shape_inputs, outputs.data(), 6, builder);
    };
    CHECK(shapes(1) == 0);
    char const* const expected[] = {"B K", "B K 576", "B K", "B 3 2 8 K 64", "B L", "B H L"};
    for (int i = 0; i < 6; ++i) {
        CHECK(text(outputs[i]) == expected[i]);
    }
    CHECK(shapes(0) != 0);
    std::swap(inputs[0], inputs[1]);
    CHECK(shapes(1) != 0);

    CHECK(combinations(*made.build, 8, 6).size() == 9);
    Made running = through_a_plan(maker, made);
    Random random{1};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        for (int64_t const length : {1, 2, 7, 64, 257}) {
            for (int64_t const batch : {1, 3}) {
                int64_t const prefix = random.below(length);
                int64_t const suffix = random.below(length - prefix + 1);
                int64_t const affixes = prefix + suffix;
                // All, the affixes alone, and something between them.
                int64_t const between = affixes + static_cast<int64_t>(random.below(length - affixes + 1));
                for (int64_t const keep_count : {length, affixes, between}) {
                    for (bool const hostile : {false, true}) {
                        Lengths const n{batch, 6, 3, 5, length, 7, 2, keep_count, prefix, suffix};
                        DataType const hidden = random.below(2) == 0 ? type : DataType::kFLOAT;
                        CHECK(prune(*running.runtime, n, type, hidden, Random{random.below(1 << 30)}, hostile) == 0);
                    }
                }
            }
        }
    }
    Lengths const tight{1, 1, 1, 4, 8, 4, 1, 3, 2, 2};
    CHECK(prune(*running.runtime, tight, DataType::kFLOAT, DataType::kFLOAT, random, false) != 0);
}

// ---- StridedCompress.

void check_strided_compress(IPluginRegistry& registry, bool mean) {
    auto& maker = creator(registry, mean ? "StridedCompressMean" : "StridedCompress");
    int32_t const ratio = 4;
    int64_t const offset = 3;
    int32_t const zero = 0;
    PluginField const ratio_field("ratio", &ratio, PluginFieldType::kINT32, 1);
    PluginField const offset_field("offset", &offset, PluginFieldType::kINT64, 1);
    CHECK(maker.getFieldNames()->nbFields == 2);
    CHECK(create(maker, {ratio_field}) == nullptr);
    CHECK(create(maker, {{"ratio", &zero, PluginFieldType::kINT32, 1}, {"offset", &zero, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(create(maker, {ratio_field, {"offset", &ratio, PluginFieldType::kINT32, 1}}) == nullptr);
    Made made(create(maker, {ratio_field, offset_field}));
    int32_t const count = mean ? 3 : 2;

    Builder builder;
    auto const shapes = [&](char const* window, DimsExprs& output) {
        std::vector<DimsExprs> inputs(count, builder.shape({"S", window, "He"}));
        inputs.back() = builder.shape({"H", "He"});
        return made.build->getOutputShapes(inputs.data(), count, nullptr, 0, &output, 1, builder);
    };
    DimsExprs output{};
    CHECK(shapes("2048", output) == 0 && text(output) == "(S * 512) H");
    CHECK(shapes("W", output) == 0 && text(output) == "(S * (W / 4)) H");
    CHECK(shapes("2049", output) != 0);
    CHECK(combinations(*made.build, count, 1).size() == 3);

    Made running = through_a_plan(maker, made);
    Random random{2};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        for (int64_t const segments : {1, 3}) {
            for (int64_t const window : {4, 8, 20}) {
                int64_t const from = 5;
                int64_t const to = 3;
                Tensor x(type, {segments, window, from});
                Tensor x2(type, {segments, window, from});
                Tensor weight(type, {to, from});
                x.filled(random, 2);
                x2.filled(random, 2);
                weight.filled(random, 1);
                Tensor y(type, {segments * window / ratio, to});
                std::vector<Tensor*> inputs{&x, &weight};
                if (mean) {
                    inputs.insert(inputs.begin() + 1, &x2);
                }
                std::vector<DynamicPluginTensorDesc> described(count);
                for (int32_t i = 0; i < count; ++i) {
                    described[i].desc = inputs[i]->desc;
                    described[i].max = inputs[i]->desc.dims;
                }
                std::vector<unsigned char> workspace(running.build->getWorkspaceSize(described.data(), count, nullptr, 1));
                CHECK(enqueue(*running.runtime, inputs, {&y}, workspace.data()) == 0);
                for (int64_t r = 0; r < segments * window / ratio; ++r) {
                    for (int64_t o = 0; o < to; ++o) {
                        float sum = 0;
                        for (int64_t i = 0; i < from; ++i) {
                            int64_t const at = (r * ratio + offset) * from + i;
                            float const row = mean ? (x.values[at] + x2.values[at]) / 2 : x.values[at];
                            sum += row * weight.values[o * from + i];
                        }
                        uint32_t const bits = bits_of(sum, type);
                        CHECK(std::memcmp(y.bytes.data() + (r * to + o) * y.size(), &bits, y.size()) == 0);
                    }
                }
            }
        }
    }
}

} // namespace

int main(int argc, char** argv) {
    CHECK(argc == 3);
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    auto* const find = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
    CHECK(find != nullptr);
    IPluginRegistry* const registry = find();
    CHECK(registry != nullptr);
    auto const handle = registry->loadLibrary(argv[2]);
    CHECK(handle != nullptr);
    int32_t creators = 0;
    registry->getAllCreators(&creators);
    CHECK(creators >= 3);
    check_topk_prune(*registry);
    check_strided_compress(*registry, false);
    check_strided_compress(*registry, true);
    registry->deregisterLibrary(handle);
    CHECK(registry->getCreator("TopKPrune", "1", "") == nullptr);
    std::printf("%d checks passed\n", checks);
}
