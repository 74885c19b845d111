// How a product is told where in shared memory an operand lies.
#pragma once
#include "device/ptx/memory.cuh"

namespace phalanx::ptx {

// A K-major operand of 128-byte rows with the 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 wgmma_descriptor(const void* smem) {
  constexpr u64 kSwizzle128 = u64{1} << 62, kGroupStride = u64{1024 >> 4} << 32, kUnusedLeading = u64{1} << 16;
  return kSwizzle128 | kGroupStride | kUnusedLeading | ((smem_addr(smem) & 0x3ffff) >> 4);
}

// An MN-major operand of panels of 64 BF16 rows, `panel_bytes` apart: in each, a 128-byte line for every k, with the
// 128-byte swizzle; groups of 8 lines are 1024 bytes apart.
__device__ __forceinline__ u64 wgmma_descriptor_mn(const void* smem, int panel_bytes) {
  constexpr u64 kSwizzle128 = u64{1} << 62, kGroupStride = u64{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | static_cast<u64>(panel_bytes >> 4) << 16 | ((smem_addr(smem) & 0x3ffff) >> 4);
}

// A K-major operand of 32-byte rows without a swizzle: first halves of all rows, and behind them, anywhere, second ones.
__device__ __forceinline__ u64 wgmma_descriptor_halves(const void* first, const void* second) {
  constexpr u64 kGroupStride = u64{128 >> 4} << 32;  // from 8 rows to the next
  const u32 start = smem_addr(first), distance = smem_addr(second) - start;
  return kGroupStride | (distance << 12 | start >> 4);
}

// Its lower half says where the operand lies.
__device__ __forceinline__ u64 wgmma_descriptor_at(u64 descriptor, u32 place) {
  return (descriptor & 0xffffffff00000000ull) | place;
}

// The same operand `bytes` further on. Shared memory is small: the address never carries out of the lower half.
__device__ __forceinline__ u64 wgmma_advance(u64 descriptor, int bytes) {
  return wgmma_descriptor_at(descriptor, static_cast<u32>(descriptor) + bytes / 16);
}

// The same descriptor, of which the compiler knows only that a warp agrees on it: kept in uniform registers.
__device__ __forceinline__ u64 wgmma_keep(u64 descriptor) {
  return wgmma_descriptor_at(descriptor, __shfl_sync(0xffffffff, static_cast<u32>(descriptor), 0));
}

// First halves `bytes` further on, with the same second ones, which are so much nearer.
__device__ __forceinline__ u64 wgmma_advance_first(u64 descriptor, int bytes) {
  return wgmma_descriptor_at(descriptor, static_cast<u32>(descriptor) + bytes / 16 * (1 - (1 << 16)));
}

}  // namespace phalanx::ptx
