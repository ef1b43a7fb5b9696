#include "margin/rows.cuh"

namespace otface::margin {

template const char* launch_start<double>(const StartParams&, simt::Stream);
template const char* launch_inverse_norms<double>(const NormsParams&, simt::Stream);
template const char* launch_project<double>(const ProjectParams&, simt::Stream);

}  // namespace otface::margin
