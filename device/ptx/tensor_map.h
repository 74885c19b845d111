// The driver's CUtensorMap: opaque, filled by cuTensorMapEncodeTiled on the host.
#pragma once
#include "device/types.h"

namespace phalanx {

struct alignas(128) TensorMap {
  u64 opaque[16];
};

}  // namespace phalanx
