#include "ops/kernel.h"

#include <algorithm>

#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx {

int usable_sms(const cuda::DeviceInfo& device, int num_sms) {
  return num_sms > 0 ? std::min(num_sms, device.num_sms) : device.num_sms;
}

const cuda::Kernel& load_kernel(int ordinal, const jit::KernelSource& source, int smem_bytes) {
  return cuda::kernel(ordinal, source.name, jit::kEntryPoint, smem_bytes, [&] {
    const auto cubin = jit::get_cubin(source, cuda::device(ordinal).arch());
    return std::shared_ptr<const std::string>(cubin, &cubin->bytes);
  });
}

}  // namespace phalanx
