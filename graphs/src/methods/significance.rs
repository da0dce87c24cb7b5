//! The probe that significance calibration runs: the plain model's last-token logits, layer by layer.

use super::Source;
use crate::blocks::Rows;
use crate::dtype::DType;
use crate::functions::last_row_logits;
use crate::onnx::{Dim, Scope};

/// Inputs `input_ids` and `position_ids [batch, length]`; output `scores [batch, N, length]`: for every layer the
/// maximum over heads of the last row's attention logits, what [`crate::functions::TOPK_PRUNE`] calls a raw score.
pub fn probe(source: &Source) -> Scope {
    let g = source.graph("significance_probe");
    let (arch, model) = (&source.arch, source.decoder());
    let shape = [Dim::from("batch"), "length".into()];
    let [ids, positions] = ["input_ids", "position_ids"].map(|name| g.input(name, DType::I64, &shape));
    let rows = Rows::new(&g, &model, &positions, None);
    let mut x = model.embed(&g, &ids);
    let mut scores = Vec::with_capacity(arch.num_layers());
    let heads = [shape[0].clone(), arch.num_heads().into(), arch.head_dim().into()];
    for l in 0..arch.num_layers() {
        let layer = model.layer(&g, l);
        let attended = rows.attend(&layer, &x, None);
        let probe = layer.scope("significance");
        let query_last = attended.query.within(&probe).last(1).reshape(&heads);
        let scale = probe.float((1.0 / (arch.head_dim() as f64).sqrt()) as f32);
        scores.push(last_row_logits(&probe, &query_last, &attended.key, &scale).reduce_max(1).unsqueeze(1));
        if l + 1 < arch.num_layers() {
            x = model.mlp_residual(&layer, &attended.residual);
        }
    }
    g.output("scores", &g.concat(&scores.iter().collect::<Vec<_>>(), 1));
    g
}
