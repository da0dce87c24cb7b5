//! Checkpoints with a compressor, and bundles of them: honest ones in every form there is, and ones that lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::recipe::{
    H, Recipe, V, llama, mamba_config, mamba_pairs, mamba_tensors, maps, neox, neox_config, neox_pairs, neox_tensors,
    qwen2, sharedllm,
};
use accordion::bundle::{Bundle, ExportOptions, MANIFEST_FILE, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, model_identity, rcc_json, sharedllm_json};
use accordion_graphs::architecture::{Architecture, Compressor, Encoder};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::Keep;
use serde_json::{Value, json};
use std::fs;

const RELEASED: RccSettings = RccSettings { window: 2048, ratio: 32, pairs: false, first_state_is_embedding: false };

#[test]
fn every_form_of_rcc_opens() {
    let small = RccSettings { window: 64, ratio: 8, ..RELEASED };
    let paired = RccSettings { pairs: true, ..small };
    let aliased = mamba_pairs().renamed("rcc_encoder", "mamba");
    let half_aliased = mamba_pairs().renamed("rcc_encoder.", "mamba.");
    for (name, recipe, settings, path, maps) in [
        ("NeoX", neox(), RELEASED, "gpt_neox.rcc_encoder", "gpt_neox.rcc_encoder"),
        ("NeoX pairs", neox_pairs(), paired, "gpt_neox.rcc_encoder", "gpt_neox.rcc_encoder"),
        ("Mamba", mamba_pairs(), paired, "gpt_neox.rcc_encoder", "gpt_neox.rcc_encoder"),
        ("Mamba by its name", aliased, paired, "gpt_neox.mamba", "gpt_neox.mamba"),
        ("Mamba by both", half_aliased, paired, "gpt_neox.mamba", "gpt_neox.rcc_encoder"),
        ("Qwen2", qwen2(), RELEASED, "model.rcc_decoder", "model.rcc_decoder"),
        ("Llama", llama(), small, "model.rcc_encoder", "model.rcc_encoder"),
    ] {
        let checkpoint = recipe.open();
        assert_eq!(checkpoint.rcc_settings(), Some(settings), "{name}");
        assert_eq!(checkpoint.sharedllm_settings(), None);
        let Some(Compressor::Rcc(model)) = checkpoint.compressor() else { panic!("{name}") };
        let paths = (model.encoder_path.as_str(), model.embed_map.clone(), model.layer_maps.clone());
        assert_eq!(paths, (path, format!("{maps}2gpt_embed"), format!("{maps}2gpt_A_matrix")), "{name}");
        assert_eq!(matches!(model.encoder, Encoder::Mamba(_)), name.starts_with("Mamba"));
        assert_eq!(model.encoder.num_layers(), if settings.pairs { 6 } else { 3 }, "{name}");
        // What is written for it opens as the same.
        let rewritten = recipe.clone().rcc(rcc_json(&model.encoder, settings)).open();
        assert_eq!(rewritten.compressor(), checkpoint.compressor(), "{name}");
        assert_eq!(rewritten.rcc_settings(), Some(settings), "{name}");
    }
}

#[test]
fn what_reaches_no_token_may_be_missing() {
    let dead = |name: &str| {
        name == "gpt_neox.embed_out.weight"
            || name == "gpt_neox.rcc_encoder2gpt_A_matrix.2.weight"
            || name == "gpt_neox.rcc_encoder.embed_out.weight"
            || name.starts_with("gpt_neox.rcc_encoder.gpt_neox.final_layer_norm")
            || name.starts_with("gpt_neox.rcc_encoder.gpt_neox.layers.2.")
    };
    neox().without(dead).open();
    for live in [
        "gpt_neox.rcc_encoder2gpt_A_matrix.1.weight",
        "gpt_neox.rcc_encoder.gpt_neox.embed_in.weight",
        "gpt_neox.rcc_encoder.gpt_neox.layers.1.mlp.dense_4h_to_h.bias",
        "gpt_neox.layers.2.mlp.dense_4h_to_h.bias",
        "gpt_neox.final_layer_norm.bias",
        "embed_out.weight",
    ] {
        neox().without(|name| name == live).refused(&["has no tensor", live]);
    }
    // Hugging Face's Mamba has no embedding among its states: one more block is live.
    let block = |index: usize| move |name: &str| name.contains(&format!("backbone.layers.{index}."));
    mamba_pairs().without(block(5)).open();
    mamba_pairs().without(|name| name.contains("layers.4.mixer.D")).refused(&["has no tensor", "layers.4.mixer.D"]);
    let mut embedding_first = mamba_pairs();
    embedding_first.rcc.as_mut().unwrap()["first_state_is_embedding"] = json!(true);
    assert!(embedding_first.open().rcc_settings().unwrap().first_state_is_embedding);
    embedding_first.without(|name| block(5)(name) || block(4)(name)).open();
}

#[test]
fn wrong_shapes_are_named() {
    let path = "gpt_neox.rcc_encoder.gpt_neox.layers.0.attention.dense.weight";
    neox().shaped(path, &[H, H + 1]).refused(&[path, "has shape [16, 17], config.json asks for [16, 16]"]);
    let described = neox().rcc(json!({"encoder": neox_config(3)}));
    described.shaped(path, &[H, H + 1]).refused(&[path, "rcc.json asks for [16, 16]"]);
    let map = "gpt_neox.rcc_encoder2gpt_embed.weight";
    neox().shaped(map, &[H, 2 * H]).refused(&[map, "has shape [16, 32]"]);
    // The last map reaches no token.
    neox().shaped("gpt_neox.rcc_encoder2gpt_A_matrix.2.weight", &[1]).open();
    let conv = "gpt_neox.rcc_encoder.backbone.layers.0.mixer.conv1d.weight";
    mamba_pairs().shaped(conv, &[2 * H, 4]).refused(&[conv, "rcc.json asks for [32, 1, 4]"]);
}

#[test]
fn an_encoder_may_have_another_width_if_the_maps_have_it() {
    let narrow = |maps: usize| {
        let mut recipe = mamba_pairs();
        let encoder = &mut recipe.rcc.as_mut().unwrap()["encoder"];
        encoder["hidden_size"] = json!(8);
        encoder["expand"] = json!(4);
        for (name, shape) in &mut recipe.tensors {
            if name.contains("2gpt") {
                shape[1] = maps;
            } else if name.starts_with("gpt_neox.rcc_encoder.backbone") {
                let wide_by = |ends: [&str; 2]| ends.iter().any(|end| name.ends_with(end));
                if wide_by(["embeddings.weight", "in_proj.weight"]) {
                    shape[1] = 8;
                } else if wide_by(["norm.weight", "out_proj.weight"]) {
                    shape[0] = 8;
                }
            }
        }
        recipe
    };
    let checkpoint = narrow(8).open();
    let Some(Compressor::Rcc(model)) = checkpoint.compressor() else { panic!("RCC") };
    assert_eq!(model.encoder.hidden_size(), 8);
    narrow(16).refused(&["gpt_neox.rcc_encoder2gpt_embed.weight", "has shape [16, 16], rcc.json asks for [16, 8]"]);
}

#[test]
fn an_rcc_json_that_contradicts_the_tensors_is_refused() {
    let described = |recipe: Recipe, encoder: Value| {
        let mut rcc = recipe.rcc.clone().unwrap_or_else(|| json!({}));
        rcc["encoder"] = encoder;
        recipe.rcc(rcc)
    };
    let last = "tensor gpt_neox.rcc_encoder.gpt_neox.layers.2.";
    for layers in [1, 4, 9] {
        let found = "`encoder.num_hidden_layers` in ";
        let value = format!("rcc.json is {layers}, expected 3: ");
        described(neox(), neox_config(layers)).refused(&[found, &value, last]);
    }
    described(neox(), mamba_config(3)).refused(&[
        "`encoder.model_type` in",
        "rcc.json is \"mamba\"",
        "gpt_neox.rcc_encoder.gpt_neox.embed_in.weight",
    ]);
    described(mamba_pairs(), neox_config(6)).refused(&["`encoder.model_type`", "backbone.embeddings.weight"]);
    let mut wide = neox_config(3);
    wide["hidden_size"] = json!(2 * H);
    described(neox(), wide).refused(&["`encoder.hidden_size` in", "is 32, expected 16: tensor gpt_neox.rcc_encoder."]);
    let mut large = neox_config(3);
    large["vocab_size"] = json!(V + 1);
    described(neox(), large).refused(&["`encoder.vocab_size` in", "is 25, expected 24: tensor"]);
    // Without a description, the decoder's is at fault.
    let mut undescribed = neox_pairs();
    undescribed.rcc = None;
    undescribed.refused(&["`num_hidden_layers` in", "config.json is 3, expected 6", "`encoder` in rcc.json describes"]);
    let mut undescribed = mamba_pairs();
    undescribed.rcc = None;
    undescribed.refused(&["`model_type` in", "config.json is \"gpt_neox\"", "`encoder` in rcc.json describes"]);
    neox().rcc(json!({"pairs": true})).refused(&["rcc.json: number of encoder layers is 3, expected at least 6"]);
}

#[test]
fn an_rcc_json_that_makes_no_sense_is_refused() {
    for (rcc, words) in [
        (json!([]), "`the file` in"),
        (json!({"schema": "accordion.rcc/2"}), "schema 'accordion.rcc/2'"),
        (json!({"memory_len": 32}), "field 'memory_len'"),
        (json!({"window": 0}), "`window` in"),
        (json!({"window": u64::MAX}), "`window` in"),
        (json!({"window": 64, "ratio": 7}), "ratio is 7, expected a divisor of the window, 64"),
        (json!({"ratio": -1}), "`ratio` in"),
        (json!({"pairs": "yes"}), "`pairs` in"),
        (json!({"first_state_is_embedding": 1}), "`first_state_is_embedding` in"),
        (json!({"encoder": "gpt_neox"}), "`encoder` in"),
        (json!({"encoder": {}}), "`encoder.model_type` is missing in"),
        (json!({"encoder": {"model_type": "bert"}}), "encoder.model_type 'bert'"),
        (json!({"encoder": {"model_type": "mamba", "hidden_size": u64::MAX}}), "`encoder.hidden_size` in"),
    ] {
        neox().rcc(rcc).refused(&["rcc.json", words]);
    }
    let dir = neox().write();
    for text in ["", "{", "\u{feff}{}", &"[".repeat(1 << 20)] {
        fs::write(dir.path().join("rcc.json"), text).unwrap();
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("rcc.json"), "{message}");
    }
    fs::File::options().write(true).open(dir.path().join("rcc.json")).unwrap().set_len(1 << 40).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("rcc.json has 1099511627776 bytes; at most"), "{message}");
}

#[test]
fn an_encoder_is_neither_overlooked_nor_ambiguous() {
    let plain = Recipe { config: neox_config(3), rcc: None, tensors: neox_tensors("", 3) };
    assert!(plain.open().compressor().is_none());
    plain.rcc(json!({})).refused(&["rcc.json describes an encoder", "gpt_neox.rcc_encoder2gpt_embed.weight"]);
    let mut two = neox();
    two.tensors.extend(maps("gpt_neox.mamba", 3));
    two.refused(&["both gpt_neox.rcc_encoder2gpt_embed.weight and gpt_neox.mamba2gpt_embed.weight"]);
    // The number of a layer that no computer can count to.
    let mut endless = neox();
    let name = format!("gpt_neox.rcc_encoder.gpt_neox.layers.{}.mlp.x", usize::MAX);
    endless.tensors.push((name.clone(), vec![1]));
    endless.refused(&["`num_hidden_layers` in", &name]);
}

#[test]
fn a_mamba_alone_is_refused_by_name() {
    let alone = Recipe { config: mamba_config(2), rcc: None, tensors: mamba_tensors("", 2) };
    alone.refused(&["model_type 'mamba' in", "only as the encoder in rcc.json"]);
}

#[test]
fn the_fingerprint_covers_rcc_json() {
    let fingerprints =
        [neox(), neox().rcc(json!({})), neox().rcc(json!({"window": 64}))].map(|r| r.open().fingerprint());
    let distinct: std::collections::BTreeSet<_> = fingerprints.iter().collect();
    assert_eq!(distinct.len(), 3);
    assert_eq!(fingerprints[0], neox().open().fingerprint());
    assert_eq!(model_identity(&neox().open()).rope, "theta 10000 unscaled rotated 2 of 8");
}

#[test]
fn sharedllm_opens_and_names_what_is_missing() {
    let checkpoint = sharedllm().open();
    let settings = checkpoint.sharedllm_settings().unwrap();
    assert_eq!((settings.keep, settings.chunk_len, settings.tree_depth), (Keep::Tokens(4), 1024, 3));
    assert_eq!(checkpoint.rcc_settings(), None);
    let (Some(Compressor::SharedLlm(model)), Architecture::Llama(upper)) =
        (checkpoint.compressor(), checkpoint.architecture())
    else {
        panic!("SharedLLM")
    };
    assert_eq!((model.injected_layers, model.lower.num_layers), (2, 3));
    let rewritten = Recipe { config: sharedllm_json(upper, model, &settings), ..sharedllm() }.open();
    assert_eq!(rewritten.compressor(), checkpoint.compressor());
    assert_eq!(rewritten.sharedllm_settings(), Some(settings));
    // Layers of the lower model that are not injected are not needed.
    sharedllm().without(|name| name.starts_with("encoder.layers.2.")).open();
    for needed in [
        "encoder.embed_tokens.weight",
        "encoder.norm.weight",
        "encoder.layers.1.self_attn.k_proj.weight",
        "model.layers.1.cross_attn.layernorm.weight",
        "model.layers.0.cross_attn.o_proj.weight",
    ] {
        sharedllm().without(|name| name == needed).refused(&["has no tensor", needed]);
    }
    let query = "model.layers.0.cross_attn.q_proj.weight";
    sharedllm().shaped(query, &[H, 1]).refused(&[query, "has shape [16, 1]"]);
    let mut biased = sharedllm();
    biased.tensors.push(("model.layers.1.cross_attn.q_proj.bias".to_owned(), vec![H]));
    biased.refused(&["tensor 'model.layers.1.cross_attn.q_proj.bias'", "without biases"]);
    // The reading of every field has its tests beside it.
    let mut positive = sharedllm();
    positive.config["num_cross_attn_layers"] = json!(2);
    positive.refused(&["`num_cross_attn_layers` in", "config.json is 2, expected -M"]);
}

#[test]
fn a_bundle_that_lies_about_its_compressor_is_refused() {
    type Edit = fn(&mut Value);
    let rcc: [(&str, Edit); 10] = [
        ("num_hidden_layers", |m| m["compressor"]["encoder"]["num_layers"] = json!(1_u64 << 60)),
        ("state_size", |m| m["compressor"]["encoder"]["state_size"] = json!(0)),
        ("`hidden_size`", |m| m["architecture"]["num_heads"] = json!(3)),
        ("rotary_pct", |m| m["architecture"]["rotary_dims"] = json!(3)),
        ("layer_norm_eps", |m| m["architecture"]["layer_norm_eps"] = json!(-1.0)),
        ("unknown variant", |m| m["compressor"]["encoder"]["kind"] = json!("tree")),
        ("gpt_neox.nowhere.backbone", |m| m["compressor"]["encoder_path"] = json!("gpt_neox.nowhere")),
        ("window", |m| m["method"]["settings"]["window"] = json!(u64::MAX)),
        ("number of encoder layers is 6", |m| {
            m["architecture"]["num_layers"] = json!(4);
        }),
        ("method rcc needs a compressor", |m| drop(m.as_object_mut().unwrap().remove("compressor"))),
    ];
    let rcc_method = json!({"name": "rcc", "settings": {
        "window": 64, "ratio": 8, "pairs": true, "first_state_is_embedding": false,
    }});
    let shared: [(&str, Edit); 7] = [
        ("encoder_config.hidden_size is 32", |m| m["compressor"]["lower"]["hidden_size"] = json!(32)),
        ("num_cross_attn_layers is -5", |m| m["compressor"]["injected_layers"] = json!(5)),
        ("num_cross_attn_layers is 0", |m| m["compressor"]["injected_layers"] = json!(0)),
        ("encoder_config.num_hidden_layers is 3", |m| m["compressor"]["injected_layers"] = json!(4)),
        ("vocab_size", |m| m["compressor"]["lower"]["vocab_size"] = json!(u64::MAX)),
        ("chunk length", |m| m["method"]["settings"]["chunk_len"] = json!(1_u64 << 62)),
        ("model.layers.2.cross_attn.layernorm.weight", |m| m["compressor"]["injected_layers"] = json!(3)),
    ];
    let shared_method = json!({"name": "sharedllm", "settings": {
        "chunk_len": 64, "tree_depth": 3, "keep": {"tokens": 4}, "retrieval": true, "quirks": "faithful",
    }});
    for (recipe, method, lies) in [(mamba_pairs(), rcc_method, &rcc[..]), (sharedllm(), shared_method, &shared[..])] {
        let folder = recipe.write();
        let out = folder.path().join("bundle");
        // What the graphs hold does not matter here.
        let options = ExportOptions {
            method: MethodSettings::Plain,
            target: Target::Portable,
            weights: WeightStorage::Link,
            recipe: accordion::precision::Recipe::fp32(),
            force: false,
        };
        export(&Checkpoint::open(folder.path()).unwrap(), &out, &options).unwrap();
        let path = out.join(MANIFEST_FILE);
        let mut honest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        honest["method"] = method;
        fs::write(&path, honest.to_string()).unwrap();
        Bundle::open(&out).unwrap();
        for (words, lie) in lies {
            let mut manifest = honest.clone();
            lie(&mut manifest);
            fs::write(&path, manifest.to_string()).unwrap();
            let message = Bundle::open(&out).map(|_| "it opened").unwrap_err().to_string();
            assert!(message.contains(words), "'{words}' is not in: {message}");
            assert!(message.contains(&out.display().to_string()), "no file is named: {message}");
        }
    }
}
