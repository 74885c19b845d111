#include "ops/kernel.h"

#include <algorithm>

#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx {

void check_supported(const cuda::DeviceInfo& device) {
  if (!device.is_hopper())
    throw Error(ErrorCode::unsupported,
                format_text("cuda:{} is a {} of compute capability {}.{}; the kernels need Hopper, 9.0", device.ordinal,
                            device.name, device.major, device.minor));
}

const cuda::DeviceInfo& require_hopper(int ordinal) {
  const cuda::DeviceInfo& device = cuda::device(ordinal);
  check_supported(device);
  return device;
}

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
