#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/string.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "bindings/convert.h"

namespace phalanx::python {
namespace {

/// Objects that Python holds by number, until it releases them.
template <class T>
class Registry {
 public:
  std::int64_t add(T object) {
    const std::lock_guard lock(mutex_);
    objects_.emplace(++last_, std::make_shared<T>(std::move(object)));
    return last_;
  }
  std::shared_ptr<T> get(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(id);
    if (found == objects_.end()) throw Error(ErrorCode::aborted, "the group or its ExpertParallel has been closed");
    return found->second;
  }
  void release(std::int64_t id) {
    std::shared_ptr<T> last;  // destroyed outside of the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = objects_.find(id); found != objects_.end()) {
      last = std::move(found->second);
      objects_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::map<std::int64_t, std::shared_ptr<T>> objects_;
  std::int64_t last_ = 0;
};

// Never destroyed: Python releases late.
Registry<Group>& groups() {
  static auto& registry = *new Registry<Group>;
  return registry;
}
Registry<ExpertParallel>& eps() {
  static auto& registry = *new Registry<ExpertParallel>;
  return registry;
}

template <class Call>
auto translated(Call&& call) {
  std::invoke_result_t<Call> result;
  translating_errors([&] { result = call(); });
  return result;
}

Device device_of(std::int64_t ordinal) {
  if (ordinal < 0) return {};
  return {DeviceType::cuda, to_int("device", ordinal)};
}

std::optional<Tensor> optional_tensor(const char* name, const AnyView& argument) {
  if (argument == nullptr) return std::nullopt;
  return to_tensor(name, argument);
}

// --- groups: ordinals below 0 mean the CPU --------------------------------------------------------------------------

ffi::Array<std::int64_t> group_local(ffi::Shape ordinals, double timeout) {
  std::vector<std::int64_t> ids;
  translating_errors([&] {
    std::vector<Device> devices;
    for (const std::int64_t ordinal : ordinals) devices.push_back(device_of(ordinal));
    for (Group& group : Group::local(devices, {.timeout = timeout})) ids.push_back(groups().add(std::move(group)));
  });
  return {ids.begin(), ids.end()};
}

std::int64_t group_process(std::int64_t rank, std::int64_t size, std::int64_t ordinal, ffi::Function all_gather,
                           double timeout) {
  const AllGather gather = [all_gather](const std::string& mine) {
    std::vector<std::string> all;
    for (const ffi::Bytes& bytes : all_gather(ffi::Bytes(mine)).cast<ffi::Array<ffi::Bytes>>())
      all.emplace_back(bytes.data(), bytes.size());
    return all;
  };
  return translated([&] {
    return groups().add(
        Group::process(to_int("rank", rank), to_int("size", size), device_of(ordinal), gather, {.timeout = timeout}));
  });
}

std::int64_t group_nccl(ffi::Bytes id, std::int64_t rank, std::int64_t size, std::int64_t ordinal, double timeout) {
  return translated([&] {
    return groups().add(Group::nccl(std::string(id), to_int("rank", rank), to_int("size", size), device_of(ordinal),
                                    {.timeout = timeout}));
  });
}

std::int64_t group_nccl_comm(std::int64_t comm, double timeout) {
  return translated([&] {
    return groups().add(Group::nccl(reinterpret_cast<void*>(static_cast<std::uintptr_t>(comm)), {.timeout = timeout}));
  });
}

ffi::Bytes nccl_id() {
  return ffi::Bytes(translated([] { return Group::nccl_id(); }));
}

/// rank, size, ordinal
ffi::Shape group_info(std::int64_t id) {
  std::vector<std::int64_t> info;
  translating_errors([&] {
    const auto group = groups().get(id);
    info = {group->rank(), group->size(), group->device().type == DeviceType::cpu ? -1 : group->device().index};
  });
  return ffi::Shape(info);
}

void group_barrier(std::int64_t id) {
  translating_errors([&] { groups().get(id)->barrier(); });
}
void group_abort(std::int64_t id) {
  translating_errors([&] { groups().get(id)->abort(); });
}
void group_close(std::int64_t id) {
  translating_errors([&] { groups().get(id)->close(); });
}
void group_release(std::int64_t id) { groups().release(id); }

// --- expert parallelism ---------------------------------------------------------------------------------------------

ExpertParallelConfig to_config(std::int64_t hidden, std::int64_t num_experts, std::int64_t topk,
                               std::int64_t max_tokens, bool bf16, bool latency, std::int64_t num_sms,
                               std::int64_t alignment, const ffi::Shape& experts_per_rank) {
  std::vector<int> experts;
  for (const std::int64_t number : experts_per_rank) experts.push_back(to_int("experts_per_rank", number));
  return {.hidden = to_int("hidden", hidden),
          .num_experts = to_int("num_experts", num_experts),
          .topk = to_int("topk", topk),
          .max_tokens = to_int("max_tokens", max_tokens),
          .dtype = bf16 ? DType::bf16 : DType::e4m3,
          .latency = latency,
          .num_sms = to_int("num_sms", num_sms),
          .alignment = to_int("alignment", alignment),
          .experts_per_rank = std::move(experts)};
}

std::int64_t ep_bytes(std::int64_t num_ranks, std::int64_t hidden, std::int64_t num_experts, std::int64_t topk,
                      std::int64_t max_tokens, bool bf16, bool latency, std::int64_t num_sms, std::int64_t alignment,
                      ffi::Shape experts_per_rank) {
  return translated([&] {
    return std::int64_t(expert_parallel_bytes(
        to_config(hidden, num_experts, topk, max_tokens, bf16, latency, num_sms, alignment, experts_per_rank),
        to_int("num_ranks", num_ranks)));
  });
}

std::int64_t ep_create(std::int64_t group, std::int64_t hidden, std::int64_t num_experts, std::int64_t topk,
                       std::int64_t max_tokens, bool bf16, bool latency, std::int64_t num_sms, std::int64_t alignment,
                       ffi::Shape experts_per_rank) {
  return translated([&] {
    return eps().add(ExpertParallel(*groups().get(group), to_config(hidden, num_experts, topk, max_tokens, bf16,
                                                                    latency, num_sms, alignment, experts_per_rank)));
  });
}

/// first local expert, local experts, handle words, max rows
ffi::Shape ep_info(std::int64_t id) {
  std::vector<std::int64_t> info;
  translating_errors([&] {
    const auto ep = eps().get(id);
    info = {ep->first_local_expert(), ep->num_local_experts(), ep->handle_words(), ep->max_rows()};
  });
  return ffi::Shape(info);
}

void ep_release(std::int64_t id) { eps().release(id); }

void ep_check(std::int64_t id) {
  translating_errors([&] { eps().get(id)->check(); });
}

std::int64_t ep_num_rows(std::int64_t id, AnyView handle, Optional<std::int64_t> stream) {
  return translated([&] {
    const auto ep = eps().get(id);
    return ep->num_rows(to_tensor("handle", handle), to_stream(ep->group().device(), stream));
  });
}

// Without rows: the routing alone.
void ep_dispatch(std::int64_t id, AnyView x, AnyView x_scales, AnyView topk_idx, AnyView topk_weights, AnyView handle,
                 AnyView rows, AnyView row_scales, AnyView row_weights, AnyView offsets, AnyView counts,
                 AnyView pow2_scales, std::int64_t part, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const auto ep = eps().get(id);
    EpDispatch args;
    args.topk_idx = optional_tensor("topk_idx", topk_idx);
    args.topk_weights = optional_tensor("topk_weights", topk_weights);
    args.handle = to_tensor("handle", handle);
    args.offsets = optional_tensor("offsets", offsets);
    args.counts = optional_tensor("counts", counts);
    args.pow2_scales = to_bool("pow2_scales", pow2_scales);
    args.part = static_cast<EpPart>(part);
    args.stream = to_stream(ep->group().device(), stream);
    if (rows == nullptr) return ep->route(args);
    args.x = to_tensor("x", x);
    args.x_scales = optional_tensor("x_scales", x_scales);
    args.rows = to_tensor("rows", rows);
    args.row_scales = optional_tensor("row_scales", row_scales);
    args.row_weights = optional_tensor("row_weights", row_weights);
    ep->dispatch(args);
  });
}

void ep_combine(std::int64_t id, AnyView rows, AnyView handle, AnyView out, AnyView residual, AnyView weighted,
                AnyView row_values, AnyView topk_values, std::int64_t part, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const auto ep = eps().get(id);
    EpCombine args;
    args.rows = to_tensor("rows", rows);
    args.handle = to_tensor("handle", handle);
    args.out = to_tensor("out", out);
    args.residual = optional_tensor("residual", residual);
    args.weighted = to_bool("weighted", weighted);
    args.row_values = optional_tensor("row_values", row_values);
    args.topk_values = optional_tensor("topk_values", topk_values);
    args.part = static_cast<EpPart>(part);
    args.stream = to_stream(ep->group().device(), stream);
    ep->combine(args);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_local, group_local)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_process, group_process)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_nccl, group_nccl)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_nccl_comm, group_nccl_comm)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(nccl_id, nccl_id)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_info, group_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_barrier, group_barrier)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_abort, group_abort)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_close, group_close)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_release, group_release)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_bytes, ep_bytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_create, ep_create)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_info, ep_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_release, ep_release)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_check, ep_check)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_num_rows, ep_num_rows)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_dispatch, ep_dispatch)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ep_combine, ep_combine)

}  // namespace phalanx::python
