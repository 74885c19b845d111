// Multiplies two small matrices of ones on the CPU through the installed headers and library, and checks every element.
#include <phalanx/phalanx.h>

#include <cstdio>
#include <cstring>
#include <vector>

int main() {
  if (std::strcmp(phalanx::version(), PHALANX_VERSION_STRING) != 0) {
    std::printf("headers are %s, the library is %s\n", PHALANX_VERSION_STRING, phalanx::version());
    return 1;
  }

  constexpr int kM = 3, kN = 20, kK = 272;  // neither N nor K a multiple of 128
  constexpr unsigned char kOne = 0x38;      // 1.0 in E4M3
  std::vector<unsigned char> a(kM * kK, kOne), b(kN * kK, kOne);
  std::vector<float> a_scales(kM * 3, 0.5f), b_scales(1 * 3, 4.0f), d(kM * kN, -1.0f);

  using namespace phalanx;
  gemm_fp8({row_major(a.data(), DType::e4m3, kM, kK), row_major(a_scales.data(), DType::f32, kM, 3)},
           {row_major(b.data(), DType::e4m3, kN, kK), row_major(b_scales.data(), DType::f32, 1, 3)},
           row_major(d.data(), DType::f32, kM, kN));
  for (const float value : d) {
    if (value != kK * 0.5f * 4.0f) {
      std::printf("expected %g, got %g\n", kK * 0.5 * 4.0, value);
      return 1;
    }
  }

  // Exceptions cross the boundary of the library with their type.
  try {
    gemm_fp8({}, {}, {});
    std::printf("null tensors were accepted\n");
    return 1;
  } catch (const Error& error) {
    std::printf("phalanx %s works; null tensors are refused with: %s\n", version(), error.what());
  }
  return 0;
}
