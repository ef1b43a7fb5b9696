// What the margin operators take: plain structs of raw pointers, the same for every device.
//
// For embeddings x_b, class weights w_j, labels y_b and a scale s, with cos_bj = <x_b, w_j> / (|x_b| |w_j|):
//
//   logit_bj = s cos_bj, but logit_{b, y_b} = s margin(cos_{b, y_b})            (formula.h)
//   loss_b = -sum_j q_bj log softmax(logit_b)_j,   q_bj = (1 - e) u_y [j = y_b] + (e / C) u_j
//
// with the label smoothing e and the class weights u. A zero row of x or w has cosine 0 with everything.
//
// The products x w^T are torch's. Nothing is normalised before them: the classes come in chunks of n, and what follows a
// chunk's product is one kernel. What belongs to the target alone is computed once per row, in double, and the other
// classes go without it: so a loss near zero keeps its digits, and the slope at cos = 1 is that of the true angle.
//
// The gradient of a row v of x or w through its length is a projection: where g is the gradient from the raw products,
// dv = g - v <v, g> / |v|^2. So neither product is done again for it.
//
// Two kinds of rows are too much for the products, are rare, and have kernels of their own (cpu_rare.h, rare.cuh):
//   - a class whose weight is so long or short that products or their gradients would leave the range of Real is rescaled:
//     it counts as w'_j = w_j 2^-exponent_j, with a length in [1/2, 1). For all others exponent_j is 0;
//   - a row that is aligned with its target: the gradient of the angle is lost in the projection. It is taken from the
//     difference of the two unit vectors instead.
//
// "Real" is the type of the arithmetic and of the results: double for double inputs, else float. Strides count elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace otface::margin {

struct Matrix {
  const void* data;  // [rows, cols], columns adjacent
  DType dtype;
  int64_t rows, cols, row_stride;
};

enum class BeyondPi : int { none, fallback, periodic };

struct Margin {
  double m1, m2, m3;      // cos(m1 theta + m2) - m3
  BeyondPi beyond_pi;     // where m1 theta + m2 > pi
  bool easy;              // no margin where cos <= 0
  bool straight_through;  // the slope counts as 1
};

// What is known of a row of x. The operators hand it on as a float64 tensor [B, 9].
struct Row {
  double power;         // x' = x * power, exactly, has a length in [1/2, 1); 0 for a row that takes no part
  double inverse_norm;  // of x'; 0 for a zero row
  double logit;         // of the target; NaN where there is none because the label is out of range
  double slope;         // d logit / d cos of the target
  double most;          // the largest cosine of the other classes; -inf before the first
  double sum;           // the sum of exp(scale (cos - most)) over them
  double weighted;      // the sum of u_j logit_j over them, where labels are smoothed
  double target;        // the class; -1 for a row to be ignored, -2 where the label is out of range
  double aligned;       // 1 near theta = 0 of the target, -1 near pi, where the slope is that of the angle; else 0
};

// Labels to rows: x' and what concerns the target. Ignored rows get x' = 0 if `drop_ignored`.
struct StartParams {
  bool is_double;         // Real
  Matrix x;               // [B, d]
  Matrix weight;          // [C, d]
  const int64_t* labels;  // [B]
  int64_t ignore_index;
  bool drop_ignored;
  Margin margin;
  double scale;
  DType product_dtype;    // of the matrix products; on the CPU always Real
  void* scaled_x;         // [B, d] product_dtype, contiguous: x'
  Row* rows;              // [B]
  int32_t* any_rescaled;  // [1], set to 0 if there are rows
};

// 1 / |w'_j|, 0 for a zero row; and the exponents.
struct NormsParams {
  bool is_double;
  Matrix weight;          // [n, d], a chunk in the dtype of the products
  void* inverse_norms;    // [n] Real
  int32_t* exponents;     // [n]
  int32_t* any_rescaled;  // [1], set to 1 where an exponent is not 0
};

// The products <x'_b, w'_j> of rescaled classes, in place of what the matrix product gave.
struct RescaledProductsParams {
  bool is_double;
  Matrix x;                  // [B, d]: x'
  Matrix weight;             // [n, d], a chunk
  const int32_t* exponents;  // [n]
  void* products;            // [B, n] Real, rows `row_stride` apart
  int64_t row_stride;
};

// Where the raw products of a chunk lie, and which classes these are.
struct Chunk {
  bool is_double;
  int64_t batch, classes;  // B, n
  int64_t first;           // the chunk's first class
  double scale;
  const void* inverse_norms;  // [n] Real
};

// The rows' most, sum and weighted go on by this chunk. Products become cosines in place if `keep_cosines`, with -inf for
// the target; else they stay. Rows without a target in range are left as they are.
struct ForwardChunkParams {
  Chunk chunk;
  void* products;  // [B, n] Real, rows `row_stride` apart
  int64_t row_stride;
  bool keep_cosines;
  bool smoothing;
  const void* class_weight;  // [n] Real: u of the chunk, or null: all 1
  Row* rows;                 // [B]
};

struct LossSettings {
  double scale;
  double label_smoothing;
  const void* class_weight;  // [C] Real, or null: all 1
  const double* weight_sum;  // [1]: the sum of u
  int64_t num_classes;       // C
};

struct LossParams {
  bool is_double;
  int64_t batch;
  LossSettings settings;
  const Row* rows;  // [B]
  void* loss;       // [B] Real; 0 for an ignored row
};

// Cosines, or raw products, to H_bj = dL/dcos_bj / (|x'_b| |w_j|), whose products with w and x' are the raw gradients.
struct BackwardChunkParams {
  Chunk chunk;
  LossSettings settings;
  const void* products;  // [B, n] Real, rows `row_stride` apart
  int64_t row_stride;
  bool are_cosines;
  const void* grad_loss;  // [B] Real
  const Row* rows;        // [B]
  DType product_dtype;
  void* out;    // [B, n] product_dtype, contiguous; may be `products` where that is the same
  double* own;  // [B]: dL/dcos of the target, where it is in the chunk and the row aligned; H is 0 there
};

// Raw products of a chunk to logits, in place.
struct LogitsParams {
  Chunk chunk;
  void* products;  // [B, n] Real, rows `row_stride` apart
  int64_t row_stride;
  const Row* rows;  // [B]
};

// The gradient of the logits to H.
struct LogitsBackwardParams {
  Chunk chunk;
  const void* grad_logits;  // [B, n] Real, strided
  int64_t row_stride, col_stride;
  const Row* rows;  // [B]
  DType product_dtype;
  void* out;    // [B, n] product_dtype, contiguous
  double* own;  // [B], as above
};

// The part of rescaled classes in the gradient of x': grad_b = sum_j H_bj w'_j, or grad_b + that; then H_bj = 0, so that
// the matrix product, which knows w_j only, leaves them out.
struct RescaledGradientsParams {
  bool is_double;
  Matrix weight;                // [n, d], a chunk
  const int32_t* exponents;     // [n]
  const int32_t* any_rescaled;  // [1]
  int64_t batch;
  DType product_dtype;
  void* h;       // [B, n] product_dtype, contiguous
  bool add;      // to what is in grad_x
  void* grad_x;  // [B, d] Real, contiguous
};

// out_i = factor_i (g_i - v_i <v_i, g_i> inverse_norm_i^2). `grad` and `out` may be the same.
struct ProjectParams {
  bool is_double;
  int64_t count, size;        // rows and columns
  const void* grad;           // [count, size] Real, contiguous
  Matrix v;                   // [count, size]
  const void* inverse_norms;  // [count] Real: v is a chunk of w; or null: v is x'
  const int32_t* exponents;   // [count] of w: v counts as v 2^-exponent, which is the factor too; or null
  const Row* rows;            // [count] or null: of x', whose power is the factor
  void* out;                  // [count, size] Real, contiguous
};

// What aligned rows and their targets add to each other's gradients, with u = v / |v|, c = cos(theta), g = dL/dc:
//
//   grad x_b += g (u_w - c u_x) / |x_b|,   grad w_y += g (u_x - c u_w) / |w_y|
struct OwnGradientsParams {
  bool is_double;
  Matrix x;           // [B, d]: x'
  Matrix weight;      // [n, d]: all classes, or a chunk
  int64_t first;      // its first class
  const Row* rows;    // [B]
  const double* own;  // [B]: g
  void* grad;         // Real, contiguous: of x [B, d], or of w [n, d]
};

}  // namespace otface::margin
