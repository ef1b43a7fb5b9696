#include "margin/logits.cuh"

namespace otface::margin {

template const char* launch_logits<double>(const LogitsParams&, simt::Stream);
template const char* launch_logits_backward<double>(const LogitsBackwardParams&, simt::Stream);

}  // namespace otface::margin
