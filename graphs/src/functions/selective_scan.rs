//! `SelectiveScan`: the recurrence of a selective state space model.

use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope, Step};

/// `SelectiveScan(u [S, W, D], dt [S, W, D], A [D, N], B [S, W, N], C [S, W, N], skip [D]) -> y [S, W, D]`: in every segment,
/// from a state of zeros,
///
/// `state[d, n] = exp(dt[t, d] A[d, n]) state[d, n] + dt[t, d] B[t, n] u[t, d]`,
/// `y[t, d] = sum_n state[d, n] C[t, n] + skip[d] u[t, d]`.
pub const SELECTIVE_SCAN: Operator = Operator { name: "SelectiveScan", attributes: &[], body: selective_scan };

fn selective_scan(g: &Scope) {
    let dims = |names: &[&str]| names.iter().map(|&name| Dim::from(name)).collect::<Vec<_>>();
    let input = |name, shape: &[&str]| g.input(name, DType::F32, &dims(shape));
    let (by_channel, by_state) = (["segments", "window", "channels"], ["segments", "window", "states"]);
    let (u, dt) = (input("u", &by_channel), input("dt", &by_channel));
    let a = input("A", &["channels", "states"]);
    let (b, c) = (input("B", &by_state), input("C", &by_state));
    let skip = input("skip", &["channels"]);

    let extent = g.concat(&[&u.shape_at_run_time(0, 1), &a.shape_at_run_time(0, 2)], 0);
    let zeros = g.float(0.0).expand(&extent, &dims(&["segments", "channels", "states"]));
    // A loop's body reads nothing from outside: A is carried along.
    let scanned = g.scan(&[&zeros, &a], &[&u, &dt, &b, &c], 1, |_, state, now| {
        let (a, u, dt) = (&state[1], &now[0], &now[1].unsqueeze(2));
        let [b, c] = [&now[2], &now[3]].map(|v| v.unsqueeze(1));
        let next = (dt * a).exp() * &state[0] + dt * u.unsqueeze(2) * b;
        let y = (&next * c).reduce_sum(2);
        Step { state: vec![next, a.clone()], results: vec![y] }
    });
    g.output("y", &(&scanned.results[0] + u * skip));
}
