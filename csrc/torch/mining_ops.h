// The bodies of the operators on labels: what is looked at before a loss, and the mining. On the CPU only.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "mining/hard_triplets.h"
#include "torch/tensors.h"

namespace otface::binding {

inline std::tuple<int64_t, int64_t> look_at_labels(Tensor labels, int64_t classes,
                                                   std::optional<int64_t> ignore_index) {
  check_contiguous(labels, "labels", labels, ScalarType::Long, {labels.size(0)});
  const int64_t* of = labels.const_data_ptr<int64_t>();
  int64_t first_wrong = -1, kept = 0;
  for (int64_t b = 0; b < labels.size(0); ++b) {
    if (ignore_index && of[b] == *ignore_index) continue;
    kept += 1;
    if (first_wrong < 0 && (of[b] < 0 || of[b] >= classes)) first_wrong = b;
  }
  return {first_wrong, kept};
}

template <class Device>
std::tuple<Tensor, Tensor> hard_triplets(Tensor cosines, Tensor labels, double alpha,
                                         std::optional<int64_t> ignore_index) {
  const int64_t N = labels.size(0);
  check_contiguous(labels, "labels", cosines, ScalarType::Long, {N});
  check_contiguous(cosines, "cosines", cosines, real_of(cosines), {N, N});
  const mining::Batch batch{real_of(cosines) == ScalarType::Double,
                            N,
                            cosines.const_data_ptr(),
                            labels.const_data_ptr<int64_t>(),
                            alpha,
                            ignore_index.has_value(),
                            ignore_index.value_or(0)};
  std::vector<int64_t> counts(static_cast<size_t>(N));
  const int64_t T = Device::count_hard(batch, counts.data());
  const Tensor triplets = make(cosines, true, ScalarType::Long, {T, 3}),
               excess = make(cosines, true, real_of(cosines), {T});
  Device::write_hard(batch, counts.data(), static_cast<int64_t*>(data(triplets)), data(excess));
  return {triplets, excess};
}

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_MINING(m, Device)                                \
  m.impl("look_at_labels", TORCH_BOX(&otface::binding::look_at_labels)); \
  m.impl("hard_triplets", TORCH_BOX(&otface::binding::hard_triplets<Device>))

}  // namespace otface::binding
