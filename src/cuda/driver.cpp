#include "cuda/driver.h"

#include <dlfcn.h>
#include "cuda/cuda.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx::cuda {
namespace {

struct Loaded {
  Driver table;
  int version = 0;
  std::string error;  // empty: usable
};

Loaded load() {
  Loaded l;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    l.error = format_text("the NVIDIA driver is not installed ({})", dlerror());
    return l;
  }
#define PHALANX_LOAD(name, symbol, arguments)                                      \
  l.table.name = reinterpret_cast<decltype(l.table.name)>(dlsym(library, symbol)); \
  if (!l.table.name && l.error.empty())                                            \
    l.error = format_text("the NVIDIA driver is too old: it lacks {}; CUDA 12.3 or later is needed", symbol);
  PHALANX_DRIVER_FUNCTIONS(PHALANX_LOAD)
#undef PHALANX_LOAD
  if (!l.error.empty()) return l;
  if (const CUresult result = l.table.cuInit(0); result != kSuccess) {
    const char* text = nullptr;
    l.table.cuGetErrorString(result, &text);
    l.error = format_text("the NVIDIA driver does not start: {}", text ? text : "unknown error");
    return l;
  }
  l.table.cuDriverGetVersion(&l.version);
  return l;
}

const Loaded& loaded() {
  static const auto& l = *new Loaded(load());
  return l;
}

}  // namespace

const Driver& driver() {
  const Loaded& l = loaded();
  if (!l.error.empty()) throw Error(ErrorCode::unsupported, "CUDA is not available: " + l.error);
  return l.table;
}

DriverInfo driver_info() {
  const Loaded& l = loaded();
  return {l.error.empty(), l.version, l.error};
}

void check(CUresult result, const char* call) {
  if (result == kSuccess) return;
  const char *name = nullptr, *text = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  throw Error(ErrorCode::cuda_error, format_text("{} failed: {} ({})", call, name ? name : "?", text ? text : "?"));
}

}  // namespace phalanx::cuda
