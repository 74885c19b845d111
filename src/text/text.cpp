#include "text/text.h"

namespace phalanx {

std::string format_arguments(fmt::string_view format, fmt::format_args args) { return fmt::vformat(format, args); }

}  // namespace phalanx
