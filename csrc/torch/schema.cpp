// The operators behind the Python functions. The Python side has checked and shaped every tensor.
// "Real" is float64 for a float64 cost, else float32. A tensor that was not wanted comes back empty, with shape (0,).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(otface, m) {
  // Of the Sinkhorn operators, everything is batched as the cost is: (B, n, m), or (n, m) with no B anywhere. eps and tol are
  // float64, one number for all problems or (B,). Lengths are (B,), (1,) without a batch. Where the masses of a and b differ
  // by more than mass_tolerance, relative to the larger, the problem has no solution.
  // -> value (B,), transport_cost (B,), f (B, n), g (B, m), plan (B, n, m), error (B,), n_iter (B,), converged (B,),
  //    potentials (B, n + m) float64, history (B, max_iter, m + max(n, m)), rebuilt (B, max_iter) uint8
  m.def(
      "sinkhorn_forward(Tensor cost, Tensor eps, Tensor? a, Tensor? b, Tensor tol, Tensor? row_lengths, "
      "Tensor? col_lengths, Tensor? init_g, int max_iter, int check_every, bool want_plan, bool want_history, "
      "float mass_tolerance) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // All three -> the gradients of cost (B, n, m), a (B, n) and b (B, m), in Real.
  m.def(
      "sinkhorn_envelope_backward(Tensor cost, Tensor eps, Tensor? a, Tensor? b, Tensor? row_lengths, "
      "Tensor? col_lengths, Tensor potentials, Tensor grad_value, bool want_cost, bool want_a, bool want_b) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_unrolled_backward(Tensor cost, Tensor eps, Tensor? a, Tensor? b, Tensor? row_lengths, "
      "Tensor? col_lengths, Tensor potentials, Tensor n_iter, Tensor history, Tensor rebuilt, Tensor? grad_value, "
      "Tensor? grad_transport_cost, Tensor? grad_f, Tensor? grad_g, Tensor? grad_plan, bool want_cost, bool want_a, "
      "bool want_b) -> (Tensor, Tensor, Tensor)");
  // And whether the adjoint system of each problem was solved to `tol` in at most 100 + 10 min(n, m) steps, (B,); where
  // not, its gradients are NaN.
  m.def(
      "sinkhorn_implicit_backward(Tensor cost, Tensor eps, Tensor? a, Tensor? b, Tensor? row_lengths, "
      "Tensor? col_lengths, Tensor potentials, Tensor? grad_value, Tensor? grad_transport_cost, Tensor? grad_f, "
      "Tensor? grad_g, Tensor? grad_plan, float tol, bool want_cost, bool want_a, bool want_b) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // Margin operators. `rows` (B, 9) float64 is struct Row of margin/params.h. `numbers` are float64, on the CPU: m1, m2, m3
  // and scale, and label_smoothing for the loss. The rest of the margin is struct Margin, spread out.
  // -> loss (B,), 0 for ignored rows; and for the gradient scaled_x (B, d) product_dtype, rows, inverse_norms (C,),
  //    exponents (C + 1,) int32, and the cosines (B * C,) if store_logits: chunk after chunk, each (B, classes)
  m.def(
      "margin_softmax_forward(Tensor x, Tensor weight, Tensor labels, Tensor? class_weight, Tensor? weight_sum, "
      "Tensor numbers, int beyond_pi, bool easy, bool straight_through, int ignore_index, ScalarType product_dtype, "
      "int chunk_bytes, bool store_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Both backward operators -> the gradients of x (B, d) in Real, and of weight (C, d) in its dtype.
  m.def(
      "margin_softmax_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms, Tensor exponents, "
      "Tensor cosines, Tensor? class_weight, Tensor? weight_sum, Tensor grad_loss, Tensor numbers, int chunk_bytes, "
      "bool want_x, bool want_weight) -> (Tensor, Tensor)");
  // -> logits (B, C), scaled_x, rows, inverse_norms, exponents
  m.def(
      "margin_logits_forward(Tensor x, Tensor weight, Tensor labels, Tensor numbers, int beyond_pi, bool easy, "
      "bool straight_through, int ignore_index, ScalarType product_dtype, int chunk_bytes) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "margin_logits_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms, Tensor exponents, "
      "Tensor grad_logits, Tensor numbers, int chunk_bytes, bool want_x, bool want_weight) -> (Tensor, Tensor)");

  // On the CPU -> the first of labels (B,) that is no class and is not ignored, or -1; and how many are not ignored.
  m.def("look_at_labels(Tensor labels, int classes, int? ignore_index) -> (int, int)");
  // On the CPU, of cosines (N, N) and labels (N,) -> the triplets (T, 3), and how hard each is, (T,).
  m.def("hard_triplets(Tensor cosines, Tensor labels, float alpha, int? ignore_index) -> (Tensor, Tensor)");

  // Pairs of point sets, on the CPU; `rows`, `columns` and `sums` are explained in pairs/params.h.
  // -> rows (N, D, p, 16), columns (N, P, 16 D, 16), lengths (N, p) float64
  m.def("pack_points(Tensor points, bool want_columns) -> (Tensor, Tensor, Tensor)");
  // Of pairs first, second (K,): into cost (K, p, p), and from its gradient into the sums.
  m.def("pair_costs(Tensor rows, Tensor columns, Tensor first, Tensor second, Tensor(a!) cost) -> ()");
  m.def("pair_costs_backward(Tensor rows, Tensor grad_cost, Tensor first, Tensor second, Tensor(a!) sums) -> ()");
  m.def("unpack_gradient(Tensor sums, Tensor rows, Tensor lengths, Tensor(a!) grad) -> ()");

  // Costs (B, n, m) of x (B, n, d) and y (B, m, d) as a product gave them, with the squares (B, n), (B, m) of the points
  // about their centre; metric: 0 cosine, which has no squares, 1 sqeuclidean, 2 euclidean. See pairs/near.h.
  // The costs of near points are replaced.
  m.def("near_costs(Tensor(a!) cost, Tensor x, Tensor y, Tensor? x_squares, Tensor? y_squares, int metric) -> ()");
  // -> weights (B, n, m)
  m.def(
      "far_weights(Tensor cost, Tensor grad, Tensor x, Tensor y, Tensor x_squares, Tensor y_squares, int metric) -> "
      "Tensor");
  // -> the gradients of x and y, from what the product with the weights gave for them
  m.def(
      "near_gradient(Tensor cost, Tensor grad, Tensor x, Tensor y, Tensor x_squares, Tensor y_squares, int metric, "
      "Tensor far_x, Tensor far_y) -> (Tensor, Tensor)");
}
