// Memory that ranks share, on the CPU and on CUDA.
#pragma once

#include <string>

#include "ep/group.h"

namespace phalanx::ep {

/// Zeroed, 256-byte aligned.
Block allocate_block(Device device, std::size_t bytes);

/// Lets kernels on `from` reach memory of `to`, both CUDA devices of this process.
/// @throws Error unsupported, naming both
void enable_peer_access(int from, int to);

/// A CUDA block as bytes for another process on this host, and there as memory on `device`.
std::string export_block(const Block& block, Device device);
Block import_block(const std::string& description, Device device);

/// Makes so many bytes from `begin` on `value`, and waits until they are.
void fill(const Block& block, Device device, std::size_t begin, std::size_t bytes, int value);

/// Writes the first byte, past all kernels that are running.
void set_stop_word(const Block& block, Device device, int value);

}  // namespace phalanx::ep
