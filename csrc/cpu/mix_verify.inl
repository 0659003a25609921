// What is left of the target where the draft has had its turn: (v - q')+ of a row, from the scores
// of mix_sample. Derivation: mdkernels/ops/mix_verify/README.md. Included inside an anonymous
// namespace.

void mix_residual(float* scores, const float* draft, int64_t n, float max, float scale,
                  float log_mass, float cutoff) {
  const vf reference = vset(max), slope = vset(scale * kLog2E), shift = vset(log_mass * kLog2E);
  const vf kept = vset(cutoff), zero = vset(0.0f), to_base_2 = vset(kLog2E);
  for (int64_t i = 0; i < n; i += W) {
    const vf s = load_scores(scores + i, n - i);
    // The same product for both where the target is not processed: equal logarithms leave nothing.
    vf t[2] = {(s - reference) * slope - shift, load_scores(draft + i, n - i) * to_base_2};
    vexp2_each<2>(t);
    const vf left = vmax(vadd_where_ge(s, kept, zero, t[0]) - t[1], zero);
    if (n - i >= W)
      vstore(scores + i, left);
    else
      store1_part(scores + i, n - i, left);
  }
}
