#include "cli/bench.h"

#include <fmt/format.h>

#include <cstdio>
#include <random>
#include <vector>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/machine.h"
#include "phalanx/phalanx.h"

namespace phalanx::cli {
namespace {

struct Shape {
  int m, n, k;
};

constexpr int kScaleBlock = 128;

std::int64_t blocks(std::int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// A matrix and the memory under it.
struct Matrix {
  std::shared_ptr<void> memory;
  Tensor view;
};

// Rows are padded to the 16 bytes that the hardware wants.
Matrix make_matrix(Machine& machine, DType dtype, std::int64_t rows, std::int64_t cols) {
  const std::int64_t granule = 16 / size_of(dtype), pitch = (cols + granule - 1) / granule * granule;
  auto memory = machine.allocate(static_cast<std::size_t>(rows * pitch * size_of(dtype)));
  return {memory, row_major(memory.get(), dtype, rows, cols, machine.device(), pitch)};
}

// The activations' scales, MN-major and padded to 16 bytes: what the kernel loads fastest.
Matrix make_row_scales(Machine& machine, std::int64_t rows, std::int64_t cols) {
  const std::int64_t pitch = (rows + 3) / 4 * 4;
  auto memory = machine.allocate(static_cast<std::size_t>(pitch * blocks(cols)) * sizeof(float));
  return {memory, col_major(memory.get(), DType::f32, rows, blocks(cols), machine.device(), pitch)};
}

// Random, as the power that a GPU draws, and with it the clock, depends on the data.
Matrix random_matrix(Machine& machine, std::int64_t rows, std::int64_t cols, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> period(65521);  // a prime, so that rows differ
  for (float& value : period) value = normal(generator);
  Matrix matrix = make_matrix(machine, DType::f32, rows, cols);
  std::vector<float> values(static_cast<std::size_t>(rows * matrix.view.strides[0]));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = period[i % period.size()];
  machine.upload(matrix.memory.get(), values.data(), values.size() * sizeof(float));
  return matrix;
}

struct Operands {
  Matrix a, a_scales, b, b_scales, d;

  void multiply(Stream stream) const {
    GemmOptions options;
    options.stream = stream;
    gemm_fp8({a.view, a_scales.view}, {b.view, b_scales.view}, d.view, options);
  }
};

Operands make_operands(Machine& machine, const Shape& shape, DType out_dtype) {
  std::mt19937 generator(1);
  const auto x = random_matrix(machine, shape.m, shape.k, generator);
  const auto w = random_matrix(machine, shape.n, shape.k, generator);
  Operands operands{make_matrix(machine, DType::e4m3, shape.m, shape.k), make_row_scales(machine, shape.m, shape.k),
                    make_matrix(machine, DType::e4m3, shape.n, shape.k),
                    make_matrix(machine, DType::f32, blocks(shape.n), blocks(shape.k)),
                    make_matrix(machine, out_dtype, shape.m, shape.n)};
  QuantizeOptions options;
  options.stream = machine.stream();
  // Timed, so that the work is done before x and w are freed.
  machine.time([&] {
    quantize_rows(x.view, {operands.a.view, operands.a_scales.view}, options);
    quantize_blocks(w.view, {operands.b.view, operands.b_scales.view}, options);
  });
  return operands;
}

double median_seconds(Machine& machine, const Operands& operands, const BenchOptions& options) {
  const auto work = [&] { operands.multiply(machine.stream()); };
  machine.time(work);  // plans and compiles
  std::vector<double> seconds;
  for (double total = 0; total < options.min_seconds || static_cast<int>(seconds.size()) < options.min_repeats;) {
    seconds.push_back(machine.time(work));
    total += seconds.back();
  }
  return median(seconds);
}

std::vector<Shape> shapes_to_run(const BenchOptions& options, Device device) {
  if (options.m > 0) return {{options.m, options.n, options.k}};
  auto sets = options.sets;
  // A CPU would take minutes over a large model's prefill.
  if (sets.empty() && device.type == DeviceType::cpu) sets = {"small", "decode"};
  if (sets.empty()) sets = {"prefill", "decode", "square"};

  const Json all = Json::parse(kShapesJson);
  std::vector<Shape> shapes;
  for (const auto& set : sets) {
    if (!all.contains(set)) {
      std::string names;
      for (const auto& [name, list] : all.items()) names += (names.empty() ? "" : ", ") + name;
      throw Error(ErrorCode::invalid_argument, fmt::format("--set: {}; expected one of {}", set, names));
    }
    for (const auto& shape : all[set]) {
      if (shape[0] > 0) shapes.push_back({shape[0], shape[1], shape[2]});
    }
  }
  return shapes;
}

}  // namespace

int bench(const BenchOptions& options) {
  const auto machine = open_machine(options.device);
  const auto shapes = shapes_to_run(options, machine->device());
  const DType out_dtype = options.out_dtype == "f32" ? DType::f32 : DType::bf16;
  std::FILE* table = options.json == "-" ? stderr : stdout;

  fmt::print(table, "gemm_fp8 to {} on {}, median of at least {} runs\n", options.out_dtype, machine->name(),
             options.min_repeats);
  fmt::print(table, "{:>7} {:>7} {:>7} {:>12} {:>9} {:>9}\n", "M", "N", "K", "median us", "TFLOPS", "GB/s");
  Json rows = Json::array();
  for (const Shape& shape : shapes) {
    const double m = shape.m, n = shape.n, k = shape.k;
    const double seconds = median_seconds(*machine, make_operands(*machine, shape, out_dtype), options);
    const double tflops = 2 * m * n * k / seconds * 1e-12;
    const double gbps = (m * k + n * k + m * n * size_of(out_dtype)) / seconds * 1e-9;
    fmt::print(table, "{:>7} {:>7} {:>7} {:>12.1f} {:>9.3f} {:>9.1f}\n", shape.m, shape.n, shape.k, seconds * 1e6,
               tflops, gbps);
    std::fflush(table);
    rows.push_back({{"op", "gemm_fp8"},
                    {"shape", {{"m", shape.m}, {"n", shape.n}, {"k", shape.k}, {"out", options.out_dtype}}},
                    {"median_us", seconds * 1e6},
                    {"tflops", tflops},
                    {"gbps", gbps}});
  }
  if (!options.json.empty()) write_json(options.json, {{"device", machine->name()}, {"rows", rows}});
  return 0;
}

}  // namespace phalanx::cli
