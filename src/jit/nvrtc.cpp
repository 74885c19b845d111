#include "jit/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>

#include "jit/log.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

constexpr const char* kSonames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  // The Python package knows where pip has put a library that no search of the linker's would find.
  if (const char* hint = environment("PHALANX_NVRTC_HINT")) paths.emplace_back(hint);
  for (const char* soname : kSonames) {
    paths.emplace_back(soname);
    for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
      if (const char* root = environment(variable)) paths.push_back(format_text("{}/lib64/{}", root, soname));
    }
    paths.push_back(format_text("/usr/local/cuda/lib64/{}", soname));
  }
  return paths;
}

std::string last_dl_error() {
  const char* message = dlerror();
  return message != nullptr ? message : "unknown error";
}

template <class Function>
bool resolve(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool resolve_all(void* library, Nvrtc& n) {
  return resolve(library, "nvrtcVersion", n.version) && resolve(library, "nvrtcGetErrorString", n.error_string) &&
         resolve(library, "nvrtcCreateProgram", n.create_program) &&
         resolve(library, "nvrtcDestroyProgram", n.destroy_program) &&
         resolve(library, "nvrtcCompileProgram", n.compile_program) &&
         resolve(library, "nvrtcGetProgramLogSize", n.log_size) && resolve(library, "nvrtcGetProgramLog", n.log) &&
         resolve(library, "nvrtcGetCUBINSize", n.cubin_size) && resolve(library, "nvrtcGetCUBIN", n.cubin) &&
         n.version(&n.info.major, &n.info.minor) == 0;
}

std::string path_of(void* library, const std::string& fallback) {
  link_map* map = nullptr;
  const bool known = dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map->l_name != nullptr && *map->l_name != '\0';
  return known ? map->l_name : fallback;
}

// NVRTC opens its builtins by bare name and has no run path, so beside a library that the linker would not have found
// (a Python package's) it finds them only when they are in the process already.
void load_builtins(const NvrtcInfo& info) {
  std::error_code error;
  const auto folder = std::filesystem::weakly_canonical(info.path, error).parent_path();
  const auto path = folder / format_text("libnvrtc-builtins.so.{}.{}", info.major, info.minor);
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    log_debug(format_text("{}; leaving NVRTC to find its builtins", last_dl_error()));
  }
}

// True, or the reason is appended to `faults`.
bool load(const std::string& path, Nvrtc& n, std::string& faults) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    faults += "\n  " + last_dl_error();
    return false;
  }
  if (!resolve_all(library, n)) {
    faults += format_text("\n  {}: not an NVRTC that compiles to cubins", path);
    dlclose(library);
    return false;
  }
  n.info.path = path_of(library, path);
  n.info.available = true;
  load_builtins(n.info);
  log_debug(format_text("NVRTC {}.{} from {}", n.info.major, n.info.minor, n.info.path));
  return true;
}

Nvrtc search() {
  Nvrtc n;
  std::string faults;
  // A path that someone wrote down is an order: falling back to another version would hide the mistake.
  if (const char* path = environment("PHALANX_NVRTC")) {
    if (!load(path, n, faults)) {
      n.info.error = format_text("PHALANX_NVRTC is '{}', expected the full path of libnvrtc.so.13 or libnvrtc.so.12:{}",
                                 path, faults);
    }
    return n;
  }
  for (const std::string& path : candidates()) {
    if (load(path, n, faults)) return n;
  }
  n.info.error =
      "NVRTC, the CUDA run-time compiler, was not found. Install the CUDA toolkit (12 or later) or `pip install "
      "nvidia-cuda-nvrtc`, whose library the Python package finds; or set PHALANX_NVRTC to the full path of "
      "libnvrtc.so.13. It was looked for here:" +
      faults;
  return n;
}

}  // namespace

const Nvrtc& nvrtc() {
  static const auto& instance = *new Nvrtc(search());
  return instance;
}

const Nvrtc& require_nvrtc() {
  const Nvrtc& n = nvrtc();
  if (!n.info.available) throw Error(ErrorCode::unsupported, n.info.error);
  return n;
}

NvrtcInfo nvrtc_info() { return nvrtc().info; }

}  // namespace phalanx::jit
