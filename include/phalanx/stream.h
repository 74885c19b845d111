// Where CUDA work is enqueued.
#pragma once

namespace phalanx {

/// A `cudaStream_t` or `CUstream`; null is the legacy default stream. Ignored for CPU tensors, whose work is done on
/// return.
struct Stream {
  void* handle = nullptr;
};

}  // namespace phalanx
