#include "margin/rows.cuh"

namespace otface::margin {

template const char* launch_start<float>(const StartParams&, simt::Stream);
template const char* launch_inverse_norms<float>(const NormsParams&, simt::Stream);
template const char* launch_project<float>(const ProjectParams&, simt::Stream);

}  // namespace otface::margin
