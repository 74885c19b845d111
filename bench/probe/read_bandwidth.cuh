// The memory ceiling: a kernel that reads a buffer once and does nothing else. What a memory-bound kernel is measured
// against.
#pragma once
#include "device/types.h"

namespace phalanx::probe {

struct Words {
  u32 x, y, z, w;
};

// Read once: no line in L1.
__device__ __forceinline__ Words load_streaming(const void* p) {
  Words v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Every thread keeps kDepth independent 16-byte loads in flight. `sink` is written only if the sum of what was read is
// a value that it practically never is: the loads must be kept, a store must not be paid for.
template <int kDepth>
__device__ __forceinline__ void read_bandwidth(const u8* data, i64 num_bytes, u32* sink) {
  constexpr int kBytes = sizeof(Words);
  const i64 stride = i64(gridDim.x) * blockDim.x * kBytes;
  i64 offset = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * kBytes;

  u32 sum = 0;
  for (; offset + (kDepth - 1) * stride < num_bytes; offset += kDepth * stride) {
    Words v[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) v[i] = load_streaming(data + offset + i * stride);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  for (; offset < num_bytes; offset += stride) {
    const Words v = load_streaming(data + offset);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}

}  // namespace phalanx::probe
