//! The reference's rows for RCC: its taps put together as the golden files hold them.

use super::super::{Tensors, VerifyError, missing};
use crate::goldens::RccCase;
use crate::goldens::rcc::{RccRun, RccStop, RccTraining};
use crate::reference::cache::Cache;
use crate::reference::decode::{Continuation, EndOfText};
use crate::reference::rcc::Rcc;
use crate::reference::training::next_token_loss;
use crate::reference::transformer::Transformer;
use crate::reference::{plain, to_tensor};
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Encoder;
use accordion_graphs::plan::rcc::RccPlan;
use ndarray::{Array1, Array2, ArrayD, Axis, IxDyn, concatenate, stack};
use std::collections::BTreeMap;

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// Everything of `case`, by golden name.
pub(super) fn run(case: &RccCase) -> Result<Tensors> {
    let rcc = Rcc::load(&case.decoder, &case.model, case.settings, |name| case.weight(name))?;
    let mut found = Tensors::new();
    for run in &case.runs {
        compress_and_continue(case, &rcc, run, &mut found)?;
    }
    for stop in &case.stops {
        if let Some(run) = case.runs.iter().find(|run| run.name == stop.run) {
            found.insert(stop.name.clone(), ids(&[&stopped(case, &rcc, run, stop)?])?);
        }
    }
    if let Some(training) = &case.training {
        train(case, &rcc, training, &mut found)?;
    }
    if let Some(ids) = &case.plain_ids {
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let model = rcc.decoder();
        let hidden = plain::forward(model, ids, &positions, &mut model.empty_cache(), &mut NoTaps)?;
        found.insert("eval_no_states/logits".into(), tensor(&model.logits(&hidden).insert_axis(Axis(0)).into_dyn())?);
    }
    Ok(found)
}

fn compress_and_continue(case: &RccCase, rcc: &Rcc, run: &RccRun, found: &mut Tensors) -> Result<()> {
    let mut insert = |name: &str, value: Tensor| drop(found.insert(format!("{}/{name}", run.name), value));
    let decoder = rcc.decoder();
    let plan = RccPlan::new(run.lengths(), case.settings)?;
    let mut trace = Trace::default();
    let segments = (0..plan.segments).map(|s| plan.segment(&run.text_ids, s));
    let mut continuation = Continuation::after(rcc.compress(segments, &mut trace)?);
    let prompt_logits = continuation.feed(decoder, &run.prompt_ids, &mut trace)?;
    insert("enc_hidden", tensor(&trace.encoder_hidden(case)?)?);
    insert("rcc_states", tensor(&trace.states(case)?.insert_axis(Axis(0)))?);
    insert("slot_embed", tensor(&trace.rows("maps.0")?.insert_axis(Axis(0)))?);
    let maps = each(1..=decoder.num_layers(), |i| trace.rows(&format!("maps.{i}")))?;
    insert("layer_maps", tensor(&maps.insert_axis(Axis(1)))?);
    let raw = each(0..decoder.num_layers(), |l| trace.rows(&format!("layers.{l}.out")))?;
    insert("dec_layer_out_raw", tensor(&raw.insert_axis(Axis(1)))?);
    let (hidden, logits) = trace.decoder_rows(decoder, plan.segments, &run.prompt_ids)?;
    insert("dec_hidden", tensor(&hidden.insert_axis(Axis(1)))?);
    insert("prefill_logits", tensor(&logits.insert_axis(Axis(0)).into_dyn())?);
    insert("prefill_kv", keys_values(&continuation.cache)?);

    let mut steps = Trace::default();
    let end = EndOfText { ids: case.decoder.eos_token_ids(), keeps_first: true };
    let last = prompt_logits.row(prompt_logits.nrows() - 1);
    let generated = continuation.greedy(decoder, &last, run.max_new_tokens - 1, end, &mut steps)?;
    insert("generated", ids(&[&generated.tokens])?);
    let fed = &generated.tokens[..generated.tokens.len() - 1];
    insert("step_ids", ids(&[fed])?);
    insert("step_logits", tensor(&generated.step_logits.insert_axis(Axis(0)).into_dyn())?);
    let (hidden, _) = steps.decoder_rows(decoder, 0, fed)?;
    insert("step_hidden", tensor(&hidden.insert_axis(Axis(1)))?);
    insert("final_kv", keys_values(&continuation.cache)?);
    Ok(())
}

/// The ids of a run that another end-of-text id ends.
fn stopped(case: &RccCase, rcc: &Rcc, run: &RccRun, stop: &RccStop) -> Result<Vec<u32>> {
    let plan = RccPlan::new(run.lengths(), case.settings)?;
    let segments = (0..plan.segments).map(|s| plan.segment(&run.text_ids, s));
    let mut continuation = Continuation::after(rcc.compress(segments, &mut NoTaps)?);
    let logits = continuation.feed(rcc.decoder(), &run.prompt_ids, &mut NoTaps)?;
    let end = EndOfText { ids: &[stop.eos_token_id], keeps_first: true };
    let last = logits.row(logits.nrows() - 1);
    Ok(continuation.greedy(rcc.decoder(), &last, run.max_new_tokens - 1, end, &mut NoTaps)?.tokens)
}

fn train(case: &RccCase, rcc: &Rcc, training: &RccTraining, found: &mut Tensors) -> Result<()> {
    let RccTraining { input_ids, labels, context_len } = training;
    let segments = context_len / case.settings.window;
    let (mut states, mut hidden, mut logits, mut decoder_ids) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ids in input_ids {
        let mut trace = Trace::default();
        logits.push(rcc.train(ids, *context_len, &mut trace)?);
        states.push(trace.states(case)?);
        hidden.push(trace.decoder_rows(rcc.decoder(), segments, &ids[*context_len..])?.0);
        // The places of the slots show the last ids of the context.
        decoder_ids.push(&ids[context_len - context_len / case.settings.ratio..]);
    }
    let batch = |axis: usize, values: &[ArrayD<f32>]| -> Result<Tensor> {
        tensor(&stack(Axis(axis), &values.iter().map(|v| v.view()).collect::<Vec<_>>())?)
    };
    let mut insert = |name: &str, value: Tensor| drop(found.insert(format!("train_b2/{name}"), value));
    insert("loss", Tensor::from_f32([1], vec![next_token_loss(&logits, labels)?])?);
    insert("dec_input_ids", ids(&decoder_ids)?);
    insert("rcc_states", batch(0, &states)?);
    insert("dec_hidden", batch(1, &hidden)?);
    insert("logits", batch(0, &logits.into_iter().map(Array2::into_dyn).collect::<Vec<_>>())?);
    Ok(())
}

/// Every value that a tap had, in the order of recording: of one segment after the other, then of what the decoder was fed.
#[derive(Default)]
struct Trace(BTreeMap<String, Vec<ArrayD<f32>>>);

impl TapSink for Trace {
    fn wants(&self, _name: &str) -> bool {
        true
    }

    fn record(&mut self, name: &str, value: Tensor) {
        // A tensor has as many elements as its shape says.
        let array = ArrayD::from_shape_vec(IxDyn(value.shape()), value.to_f32()).unwrap_or_default();
        self.0.entry(name.to_owned()).or_default().push(array);
    }
}

impl Trace {
    fn values(&self, name: &str) -> Result<&[ArrayD<f32>]> {
        self.0.get(name).map(Vec::as_slice).ok_or_else(|| missing(name))
    }

    /// All rows of the tap, `[rows, ...]`.
    fn rows(&self, name: &str) -> Result<ArrayD<f32>> {
        joined(self.values(name)?)
    }

    /// `[S, Le + 1, 1, W, H]`.
    fn encoder_hidden(&self, case: &RccCase) -> Result<ArrayD<f32>> {
        let layers = case.model.encoder.num_layers();
        let layer = |l: usize| format!("encoder.layers.{l}.out");
        let mut names = match case.model.encoder {
            Encoder::Mamba(_) => (0..layers).map(layer).collect::<Vec<_>>(),
            _ => std::iter::once("encoder.embed".to_owned()).chain((0..layers - 1).map(layer)).collect(),
        };
        names.push("encoder.norm".to_owned());
        let segments = self.values("encoder.norm")?.len();
        let hidden = each(0..segments, |segment| {
            each(0..names.len(), |state| Ok(self.values(&names[state])?[segment].clone()))
        })?;
        Ok(hidden.insert_axis(Axis(2)))
    }

    /// `[K, Le + 1, H]`.
    fn states(&self, case: &RccCase) -> Result<ArrayD<f32>> {
        let states = 0..=case.model.encoder.num_layers();
        let by_state = each(states, |m| self.rows(&format!("encoder.states.{m}")))?;
        Ok(by_state.permuted_axes(IxDyn(&[1, 0, 2])))
    }

    /// What enters every layer of the decoder and, normalised, leaves the last one, `[L + 1, rows, H]`, and the logits of the
    /// rows: the slots of `segments`, whose stream is the one after the addition, then the tokens `fed`.
    fn decoder_rows(
        &self,
        decoder: &dyn Transformer,
        segments: usize,
        fed: &[u32],
    ) -> Result<(ArrayD<f32>, Array2<f32>)> {
        let slots = |name: &str| if segments == 0 { Ok(Vec::new()) } else { self.values(name).map(<[_]>::to_vec) };
        let mut streams = vec![joined(&[slots("embed")?, vec![decoder.embed(fed)?.into_dyn()]].concat())?];
        for layer in 0..decoder.num_layers() {
            let injected = slots(&format!("layers.{layer}.injected"))?;
            let tokens = self.values(&format!("layers.{layer}.out"))?[segments..].to_vec();
            streams.push(joined(&[injected, tokens].concat())?);
        }
        let last = streams.pop().ok_or_else(|| missing("layers"))?.into_dimensionality()?;
        streams.push(decoder.final_norm(&last).into_dyn());
        Ok((each(0..streams.len(), |i| Ok(streams[i].clone()))?, decoder.logits(&last)))
    }
}

/// The values of `indices` along a new first axis.
fn each(indices: impl Iterator<Item = usize>, value: impl Fn(usize) -> Result<ArrayD<f32>>) -> Result<ArrayD<f32>> {
    let values = indices.map(value).collect::<Result<Vec<_>>>()?;
    Ok(stack(Axis(0), &values.iter().map(|v| v.view()).collect::<Vec<_>>())?)
}

fn joined(parts: &[ArrayD<f32>]) -> Result<ArrayD<f32>> {
    Ok(concatenate(Axis(0), &parts.iter().map(|part| part.view()).collect::<Vec<_>>())?)
}

/// `[L, 2, 1, G, rows, d]`.
fn keys_values(cache: &Cache) -> Result<Tensor> {
    let layers = cache.layers.iter().map(|kv| stack(Axis(0), &[kv.k.view(), kv.v.view()]));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let all = stack(Axis(0), &layers.iter().map(|kv| kv.view()).collect::<Vec<_>>())?;
    tensor(&all.insert_axis(Axis(2)).into_dyn())
}

fn tensor(array: &ArrayD<f32>) -> Result<Tensor> {
    Ok(to_tensor(array)?)
}

/// Rows of ids, all of the same length.
fn ids(rows: &[&[u32]]) -> Result<Tensor> {
    let values: Array1<i64> = rows.iter().flat_map(|row| row.iter().copied().map(i64::from)).collect();
    let len = rows.first().map_or(0, |row| row.len());
    Ok(Tensor::from_i64([rows.len(), len], values.to_vec())?)
}
