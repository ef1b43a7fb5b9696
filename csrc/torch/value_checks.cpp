// Looks at the values of arguments on the CPU, in one pass: what otface_cuda/_checks.py makes its messages from. As a chain of
// small operators of torch this would take longer than a small solve.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/cpu_half.h"
#include "torch/tensors.h"

namespace otface::binding {
namespace {

template <class T>
int64_t find_outside(const T* x, int64_t stride, int64_t count, double least, double most) {
  for (int64_t k = 0; k < count; ++k) {
    const auto value = static_cast<double>(x[k * stride]);
    if (!(value >= least && value <= most)) return k;
  }
  return -1;
}
// The first entry of x (N,), of int64 or float64, that is not between `least` and `most`; -1 where there is none.
int64_t first_outside(Tensor x, double least, double most) {
  STD_TORCH_CHECK(x.dim() == 1, "x must be (N,)");
  if (x.scalar_type() == ScalarType::Long)
    return find_outside(x.const_data_ptr<int64_t>(), x.stride(0), x.size(0), least, most);
  return find_outside(x.const_data_ptr<double>(), x.stride(0), x.size(0), least, most);
}

enum Fault : int64_t { none, wrong_entry, no_mass, unequal_masses };

// fault, side (0: a, 1: b), problem, entry; and the entry itself, or both masses
using Finding = std::tuple<int64_t, int64_t, int64_t, int64_t, double, double>;
constexpr Finding nothing{none, 0, 0, 0, 0.0, 0.0};

double read(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::float32: return static_cast<double>(static_cast<const float*>(data)[offset]);
    case DType::float64: return static_cast<const double*>(data)[offset];
    case DType::float16: return static_cast<double>(half_to_float(static_cast<const uint16_t*>(data)[offset]));
    default: return static_cast<double>(bfloat_to_float(static_cast<const uint16_t*>(data)[offset]));
  }
}

// The weights of one side: (count,) for all problems alike, or (B, count).
class Side {
 public:
  Side(const Tensor& w, const OptionalTensor& lengths)
      : data_(w.const_data_ptr()),
        dtype_(dtype_of(w, "weights")),
        problems_(w.dim() == 1 ? 1 : w.size(0)),
        count_(w.size(w.dim() - 1)),
        batch_stride_(w.dim() == 1 ? 0 : w.stride(0)),
        stride_(w.stride(w.dim() - 1)) {
    if (lengths) {
      STD_TORCH_CHECK(lengths->is_contiguous() && lengths->dim() == 1, "lengths must be (B,) and contiguous");
      lengths_ = lengths->const_data_ptr<int64_t>();
    } else if (batch_stride_ == 0) {
      problems_ = std::min<int64_t>(problems_, 1);
    }
    masses_.resize(static_cast<size_t>(problems_));
  }

  int64_t problems() const { return problems_; }
  double mass(int64_t problem) const { return masses_[static_cast<size_t>(problems_ == 1 ? 0 : problem)]; }

  // Adds up the masses, and tells what is wrong with a side by itself.
  Finding look(int64_t side) {
    int64_t without_mass = -1;
    for (int64_t k = 0; k < problems_; ++k) {
      const int64_t count = lengths_ == nullptr ? count_ : std::min(lengths_[k], count_);
      double mass = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double w = read(data_, dtype_, k * batch_stride_ + i * stride_);
        if (!(w >= 0 && w < std::numeric_limits<double>::infinity())) return {wrong_entry, side, k, i, w, 0.0};
        mass += w;
      }
      if (!(mass > 0) && without_mass < 0) without_mass = k;
      masses_[static_cast<size_t>(k)] = mass;
    }
    if (without_mass >= 0) return {no_mass, side, without_mass, 0, 0.0, 0.0};
    return nothing;
  }

 private:
  const void* data_;
  DType dtype_;
  int64_t problems_, count_, batch_stride_, stride_;
  const int64_t* lengths_ = nullptr;
  std::vector<double> masses_;
};

Finding weights_fault(Tensor a, OptionalTensor a_lengths, OptionalTensor b, OptionalTensor b_lengths,
                      double tolerance) {
  Side of_a(a, a_lengths);
  const Finding in_a = of_a.look(0);
  if (std::get<0>(in_a) != none || !b) return in_a;
  Side of_b(*b, b_lengths);
  const Finding in_b = of_b.look(1);
  if (std::get<0>(in_b) != none) return in_b;
  if (of_a.problems() == 0 || of_b.problems() == 0) return nothing;
  for (int64_t k = 0; k < std::max(of_a.problems(), of_b.problems()); ++k) {
    const double mass_a = of_a.mass(k), mass_b = of_b.mass(k);
    if (std::fabs(mass_a - mass_b) > tolerance * std::max(mass_a, mass_b))
      return {unequal_masses, 0, k, 0, mass_a, mass_b};
  }
  return nothing;
}

}  // namespace
}  // namespace otface::binding

STABLE_TORCH_LIBRARY_FRAGMENT(otface, m) {
  m.def("first_outside(Tensor x, float least, float most) -> int");
  m.def(
      "weights_fault(Tensor a, Tensor? a_lengths, Tensor? b, Tensor? b_lengths, float tolerance) -> "
      "(int, int, int, int, float, float)");
}
STABLE_TORCH_LIBRARY_IMPL(otface, CPU, m) {
  m.impl("first_outside", TORCH_BOX(&otface::binding::first_outside));
  m.impl("weights_fault", TORCH_BOX(&otface::binding::weights_fault));
}
