#include "margin/logits.cuh"

namespace otface::margin {

template const char* launch_logits<float>(const LogitsParams&, simt::Stream);
template const char* launch_logits_backward<float>(const LogitsBackwardParams&, simt::Stream);

}  // namespace otface::margin
