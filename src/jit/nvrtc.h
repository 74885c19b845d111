// NVRTC, loaded at run time: the library needs neither it nor any CUDA header to be built, or to run on the CPU.
#pragma once

#include <cstddef>

#include "jit/jit.h"

namespace phalanx::jit {

/// The part of NVRTC's C interface that we call. A result of 0 is success.
struct Nvrtc {
  using Program = struct OpaqueProgram*;

  int (*version)(int* major, int* minor) = nullptr;
  const char* (*error_string)(int result) = nullptr;
  int (*create_program)(Program*, const char* text, const char* name, int num_headers, const char* const* headers,
                        const char* const* include_names) = nullptr;
  int (*destroy_program)(Program*) = nullptr;
  int (*compile_program)(Program, int num_options, const char* const* options) = nullptr;
  int (*log_size)(Program, std::size_t*) = nullptr;
  int (*log)(Program, char*) = nullptr;
  int (*cubin_size)(Program, std::size_t*) = nullptr;
  int (*cubin)(Program, char*) = nullptr;

  NvrtcInfo info;
};

/// Searched for and loaded at the first call, and never unloaded; `info` says whether that worked.
const Nvrtc& nvrtc();

/// nvrtc(), or an Error (unsupported) that says where it was looked for and how to install it.
const Nvrtc& require_nvrtc();

}  // namespace phalanx::jit
