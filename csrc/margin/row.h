// What follows from a row's statistics: its loss, and what its gradient is made of. The same code for every device.
#pragma once

#include <cmath>

#include "margin/formula.h"

namespace otface::margin {
namespace {

// Row::target where there is none
constexpr double ignored = -1, out_of_range = -2;

struct RowSoftmax {
  double rest;      // log of the sum of exp(logit) over the other classes; -inf without any
  double lse;       // over all classes
  double surprise;  // lse - logit of the target = -log p: not by this difference, which loses the digits of a small one
  double p, others;  // the target's probability, and 1 - p, which likewise keeps its digits
};

// log(1 + e^x)
OTFACE_HOST_DEVICE inline double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

OTFACE_HOST_DEVICE inline RowSoftmax softmax_of(const Row& row, double scale) {
  RowSoftmax s;
  s.rest = row.sum == 0 ? -INFINITY : scale * row.most + std::log(row.sum);
  const double x = s.rest - row.logit;
  s.surprise = softplus(x);
  s.lse = row.logit + s.surprise;
  s.p = 1 / (1 + std::exp(x));
  s.others = 1 / (1 + std::exp(-x));
  return s;
}

OTFACE_HOST_DEVICE inline double class_weight_of(const void* weights, bool is_double, double target) {
  if (weights == nullptr) return 1;
  const auto j = static_cast<int64_t>(target);
  return is_double ? static_cast<const double*>(weights)[j]
                   : static_cast<double>(static_cast<const float*>(weights)[j]);
}

OTFACE_HOST_DEVICE inline double loss_of(const Row& row, const LossSettings& settings, bool is_double) {
  if (row.target == ignored) return 0;
  if (row.target == out_of_range) return NAN;
  const RowSoftmax s = softmax_of(row, settings.scale);
  const double u = class_weight_of(settings.class_weight, is_double, row.target), e = settings.label_smoothing;
  const double hard = u * s.surprise;
  if (e == 0) return hard;
  return (1 - e) * hard + e / static_cast<double>(settings.num_classes) *
                              (*settings.weight_sum * s.lse - (row.weighted + u * row.logit));
}

// G_j = dL/dcos_j = softmax * exp(scale cos_j - lse) - uniform * u_j, but `target` for the target.
struct RowGradient {
  double softmax, uniform, target, lse;
};

OTFACE_HOST_DEVICE inline RowGradient gradient_of(const Row& row, const LossSettings& settings, bool is_double,
                                                  double grad_loss) {
  if (row.target < 0) return {NAN, NAN, NAN, NAN};
  const RowSoftmax s = softmax_of(row, settings.scale);
  const double u = class_weight_of(settings.class_weight, is_double, row.target), e = settings.label_smoothing;
  const double hard = (1 - e) * u, share = e / static_cast<double>(settings.num_classes);
  const double total = e == 0 ? 0 : *settings.weight_sum;
  RowGradient g;
  g.softmax = grad_loss * settings.scale * (hard + share * total);
  g.uniform = grad_loss * settings.scale * share;
  g.target = grad_loss * row.slope * (share * (total * s.p - u) - hard * s.others);
  g.lse = s.lse;
  if (!(s.lse == s.lse)) g.softmax = NAN;
  return g;
}

}  // namespace
}  // namespace otface::margin
