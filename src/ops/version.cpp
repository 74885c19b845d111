#include "phalanx/version.h"

namespace phalanx {

const char* version() noexcept { return PHALANX_VERSION_STRING; }

}  // namespace phalanx
