// Climbs the ladder: compiles each kernel, refuses spills, and where there is a Hopper GPU checks and times them.
//
//     ladder               compile; with a GPU also check and print TFLOPS
//     ladder --accuracy    and the error of one level of accumulation and of two, over K
//     ladder --check       compile and check only: short enough for compute-sanitizer
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "examples/kernels/problem.h"
#include "jit/jit.h"
#include "jit/sources.h"
#include "phalanx/phalanx.h"

namespace ladder {

std::span<const phalanx::jit::EmbeddedFile> sources();

namespace {

using namespace phalanx;

constexpr int kBlock = 128;

struct Rung {
  const char* file;
  int num_threads, num_stages;  // in shared memory
  bool scaled;                  // uses the scales
  int (*num_ctas)(const Problem&, int num_sms);
};

int one_a_tile(const Problem& p, int) { return (p.m / kBlock) * (p.n / kBlock); }
int one_an_sm(const Problem& p, int num_sms) { return std::min(one_a_tile(p, 0), num_sms); }
int one_for_256_elements(const Problem& p, int) { return (p.m * p.n + 255) / 256; }

constexpr Rung kRungs[] = {
    {"1_naive.cu", 256, 0, false, one_for_256_elements}, {"2_tma.cu", 256, 1, false, one_a_tile},
    {"3_pipelined.cu", 384, 6, false, one_a_tile},       {"4_scaled.cu", 384, 6, true, one_a_tile},
    {"5_ordered.cu", 384, 6, true, one_an_sm},
};
constexpr const Rung &kOneLevel = kRungs[2], &kTwoLevels = kRungs[3];

std::string text_of(const std::string& file) {
  for (const jit::EmbeddedFile& source : sources())
    if (file == source.name) return std::string(source.text);
  throw std::logic_error("no source " + file);
}

jit::KernelSource source_of(const Rung& rung) {
  const std::string name = rung.file;
  return {"ladder_" + name.substr(0, name.find('.')), text_of("problem.h") + text_of("common.cuh") + text_of(name)};
}

// --- without a GPU ---------------------------------------------------------------------------------------------------

bool compiles(const Rung& rung) {
  const jit::CompileInfo info = jit::compile(source_of(rung), "sm_90a").info;
  std::printf("%-16s %5.2f s to compile, %3d registers", rung.file, info.seconds, info.registers);
  if (info.spill_bytes || info.stack_bytes) std::printf(", SPILLS %d, STACK %d", info.spill_bytes, info.stack_bytes);
  for (const std::string& warning : info.warnings) std::printf("\n  %s", warning.c_str());
  std::printf("\n");
  return info.spill_bytes == 0 && info.stack_bytes == 0 && info.warnings.empty();
}

// --- with a GPU ------------------------------------------------------------------------------------------------------

template <class T>
std::shared_ptr<T> to_gpu(const std::vector<T>& values) {
  cuda::CUdeviceptr memory = 0;
  PHALANX_CUDA(cuMemAlloc(&memory, values.size() * sizeof(T)));
  PHALANX_CUDA(cuMemcpyHtoD(memory, values.data(), values.size() * sizeof(T)));
  return {reinterpret_cast<T*>(memory), [](T* p) { cuda::driver().cuMemFree(reinterpret_cast<cuda::CUdeviceptr>(p)); }};
}

struct Operands {
  int m, n, k;
  std::vector<std::uint8_t> a, b;  // E4M3 codes
  std::vector<float> sfa, sfb, d;

  int k_blocks() const { return k / kBlock; }
  ScaledTensor a_view(void* data, void* scales, Device device = {}) const {
    return {row_major(data, DType::e4m3, m, k, device), col_major(scales, DType::f32, m, k_blocks(), device)};
  }
  ScaledTensor b_view(void* data, void* scales, Device device = {}) const {
    return {row_major(data, DType::e4m3, n, k, device), row_major(scales, DType::f32, n / kBlock, k_blocks(), device)};
  }
};

using Codes = std::vector<std::uint8_t>;

Codes small_integers(std::size_t count, std::mt19937& rng) {
  constexpr std::uint8_t kCodes[] = {0xc0, 0xb8, 0x00, 0x38, 0x40};  // -2 ... 2
  Codes codes(count);
  for (std::uint8_t& code : codes) code = kCodes[rng() % 5];
  return codes;
}

// What quantisation makes of normal values; the scales that would go with them are left aside.
Codes quantized_normals(std::int64_t rows, std::int64_t cols, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> period(65521), values(static_cast<std::size_t>(rows * cols)), scales(values.size() / kBlock);
  for (float& value : period) value = normal(rng);  // a prime number of them, so that rows differ
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = period[i % period.size()];
  Codes codes(values.size());
  quantize_rows(
      row_major(values.data(), DType::f32, rows, cols),
      {row_major(codes.data(), DType::e4m3, rows, cols), row_major(scales.data(), DType::f32, rows, cols / kBlock)});
  return codes;
}

// With scales of one.
Operands make_operands(int m, int n, int k, Codes a, Codes b) {
  const std::size_t k_blocks = static_cast<std::size_t>(k / kBlock);
  return {m,
          n,
          k,
          std::move(a),
          std::move(b),
          std::vector<float>(m * k_blocks, 1.0f),
          std::vector<float>(n / kBlock * k_blocks, 1.0f),
          std::vector<float>(static_cast<std::size_t>(m) * n, NAN)};
}

// The operands on the GPU, and a rung's launch on them.
class OnGpu {
 public:
  explicit OnGpu(const Operands& o)
      : a_(to_gpu(o.a)), b_(to_gpu(o.b)), sfa_(to_gpu(o.sfa)), sfb_(to_gpu(o.sfb)), d_(to_gpu(o.d)), operands_(o) {
    const auto map = [&](const std::uint8_t* data, int rows) {
      return cuda::make_tensor_map({DType::e4m3, data, rows, o.k, o.k, kBlock, kBlock});
    };
    problem_ = {map(a_.get(), o.m), map(b_.get(), o.n), a_.get(), b_.get(), sfa_.get(),
                sfb_.get(),         d_.get(),           o.m,      o.n,      o.k};
  }

  void run(const Rung& rung) const {
    const jit::KernelSource source = source_of(rung);
    const int smem_bytes = rung.num_stages * (2 * kBlock * kBlock + 4 * kBlock + 16);
    const cuda::Kernel& kernel = cuda::kernel(0, source.name, jit::kEntryPoint, smem_bytes, [&] {
      const auto cubin = jit::get_cubin(source, cuda::device(0).arch());
      return std::shared_ptr<const std::string>(cubin, &cubin->bytes);
    });
    const int num_ctas = rung.num_ctas(problem_, cuda::device(0).num_sms);
    kernel.launch({num_ctas, rung.num_threads, 1, smem_bytes}, &problem_, nullptr);
  }

  void run_library() const {
    const Device device{DeviceType::cuda, 0};
    gemm_fp8(operands_.a_view(a_.get(), sfa_.get(), device), operands_.b_view(b_.get(), sfb_.get(), device),
             row_major(d_.get(), DType::f32, operands_.m, operands_.n, device));
  }

  std::vector<float> result() const {
    std::vector<float> d(operands_.d.size());
    PHALANX_CUDA(cuCtxSynchronize());
    PHALANX_CUDA(cuMemcpyDtoH(d.data(), reinterpret_cast<cuda::CUdeviceptr>(d_.get()), d.size() * sizeof(float)));
    return d;
  }

 private:
  std::shared_ptr<std::uint8_t> a_, b_;
  std::shared_ptr<float> sfa_, sfb_, d_;
  const Operands& operands_;
  Problem problem_;
};

// Integers and scales of powers of two: every sum is exact in every order, so the GPU must give the CPU's bits.
bool is_right(const Rung& rung) {
  std::mt19937 rng(1);
  constexpr int kM = 384, kN = 512, kK = 1152;
  Operands o = make_operands(kM, kN, kK, small_integers(kM * kK, rng), small_integers(kN * kK, rng));
  if (rung.scaled) {
    for (float& scale : o.sfa) scale = rng() % 2 ? 1.0f : 0.5f;
    for (float& scale : o.sfb) scale = rng() % 2 ? 2.0f : 1.0f;
  }
  const OnGpu gpu(o);
  gpu.run(rung);
  const std::vector<float> d = gpu.result();
  gemm_fp8(o.a_view(o.a.data(), o.sfa.data()), o.b_view(o.b.data(), o.sfb.data()),
           row_major(o.d.data(), DType::f32, o.m, o.n));
  return std::memcmp(d.data(), o.d.data(), d.size() * sizeof(float)) == 0;
}

// Median of a few runs, in TFLOPS. The naive one is given one run: it takes a while.
double tflops(const Operands& o, const std::function<void()>& work, int runs) {
  cuda::CUevent start, end;
  PHALANX_CUDA(cuEventCreate(&start, 0));
  PHALANX_CUDA(cuEventCreate(&end, 0));
  work();
  std::vector<float> times;
  for (int i = 0; i < runs; ++i) {
    PHALANX_CUDA(cuEventRecord(start, nullptr));
    work();
    PHALANX_CUDA(cuEventRecord(end, nullptr));
    PHALANX_CUDA(cuEventSynchronize(end));
    PHALANX_CUDA(cuEventElapsedTime(&times.emplace_back(), start, end));
  }
  std::sort(times.begin(), times.end());
  PHALANX_CUDA(cuEventDestroy(start));
  PHALANX_CUDA(cuEventDestroy(end));
  return 2e-9 * o.m * o.n * o.k / times[times.size() / 2];
}

bool check_all() {
  bool good = true;
  for (const Rung& rung : kRungs) {
    if (is_right(rung)) continue;
    std::printf("%s: WRONG\n", rung.file);
    good = false;
  }
  if (good) std::printf("All give the bits of the CPU\n");
  return good;
}

void print_tflops() {
  std::mt19937 rng(2);
  constexpr int kM = 4096, kN = 4096, kK = 7168;
  const Operands o = make_operands(kM, kN, kK, quantized_normals(kM, kK, rng), quantized_normals(kN, kK, rng));
  const OnGpu gpu(o);
  std::printf("\nTFLOPS, %dx%dx%d on %s\n", o.m, o.n, o.k, cuda::device(0).name.c_str());
  for (const Rung& rung : kRungs)
    std::printf("%-16s %7.1f\n", rung.file,
                tflops(
                    o, [&] { gpu.run(rung); }, rung.num_stages ? 20 : 1));
  std::printf("%-16s %7.1f\n", "the library",
              tflops(
                  o, [&] { gpu.run_library(); }, 20));
}

// The values of all codes.
std::vector<float> e4m3_values() {
  Codes codes(256);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<std::uint8_t>(i);
  std::vector<float> values(256), ones(2, 1.0f);
  dequantize({row_major(codes.data(), DType::e4m3, 1, 256), row_major(ones.data(), DType::f32, 1, 2)},
             row_major(values.data(), DType::f32, 1, 256));
  return values;
}

std::vector<double> exact_product(const Operands& o) {
  const std::vector<float> values = e4m3_values();
  std::vector<double> d(o.d.size());
  for (int i = 0; i < o.m; ++i)
    for (int j = 0; j < o.n; ++j) {
      const std::uint8_t *a = &o.a[std::size_t(i) * o.k], *b = &o.b[std::size_t(j) * o.k];
      double sum = 0;  // exact: a product has 8 bits, and there are far fewer than 2^24 of them
      for (int k = 0; k < o.k; ++k) sum += double(values[a[k]]) * values[b[k]];
      d[std::size_t(i) * o.n + j] = sum;
    }
  return d;
}

// Norm of the difference over the norm of the truth.
double relative_error(const std::vector<float>& d, const std::vector<double>& truth) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < d.size(); ++i)
    error += (d[i] - truth[i]) * (d[i] - truth[i]), norm += truth[i] * truth[i];
  return std::sqrt(error / norm);
}

// Over K, for sums whose terms have random signs, and for sums of positive terms.
void print_accuracy() {
  std::printf("\nRelative error of D, %dx%d\n%8s %24s %24s\n%8s %12s%12s %12s%12s\n", kBlock, kBlock, "",
              "normal values", "their magnitudes", "K", "one level", "two levels", "one level", "two levels");
  for (int k = 512; k <= 131072; k *= 4) {
    std::printf("%8d", k);
    for (const bool positive : {false, true}) {
      std::mt19937 rng(3);
      Operands o =
          make_operands(kBlock, kBlock, k, quantized_normals(kBlock, k, rng), quantized_normals(kBlock, k, rng));
      if (positive)
        for (Codes* codes : {&o.a, &o.b})
          for (std::uint8_t& code : *codes) code &= 0x7f;
      const OnGpu gpu(o);
      const std::vector<double> truth = exact_product(o);
      for (const Rung* rung : {&kOneLevel, &kTwoLevels}) {
        gpu.run(*rung);
        std::printf(" %11.2e", relative_error(gpu.result(), truth));
      }
      std::printf(" ");
    }
    std::printf("\n");
  }
}

int climb(const std::string& option) {
  bool good = true;
  for (const Rung& rung : kRungs) good &= compiles(rung);
  if (cuda::devices().empty() || !cuda::device(0).is_hopper()) {
    std::printf("No Hopper GPU: compiled only\n");
    return good ? 0 : 1;
  }
  const cuda::ContextGuard context(0);
  good &= check_all();
  if (option != "--check") print_tflops();
  if (option == "--accuracy") print_accuracy();
  return good ? 0 : 1;
}

}  // namespace
}  // namespace ladder

int main(int argc, char** argv) {
  try {
    return ladder::climb(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ladder: %s\n", error.what());
    return 1;
  }
}
