// Errors. Every public function throws phalanx::Error before it writes anything.
#pragma once

#include <stdexcept>
#include <string>

#include "phalanx/export.h"

namespace phalanx {

enum class ErrorCode {
  invalid_argument,    ///< a shape, stride, alignment, value or aliasing that the operation does not accept
  invalid_dtype,       ///< an element type that the operation does not accept
  invalid_device,      ///< tensors on different devices, or a device that does not exist
  unsupported,         ///< right arguments, but this machine cannot serve them: architecture, driver or NVRTC
  compilation_failed,  ///< NVRTC refused a kernel; the message holds its log
  cuda_error,          ///< the CUDA driver returned an error
  timeout,             ///< a peer did not come in time; the message says which, and for what
  aborted,             ///< a rank called abort(), or the group has been closed
  capacity_exceeded,   ///< more rows than the caller gave room for; the message says how many
};

class PHALANX_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace phalanx
