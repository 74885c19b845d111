#include "cli/bench.h"

#include <cstdio>
#include <vector>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/operands.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

double median_seconds(Machine& machine, const Operands& operands, const BenchOptions& options) {
  GemmOptions gemm;
  gemm.stream = machine.stream();
  const auto work = [&] { operands.multiply(gemm); };
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
    if (!all.contains(set))
      throw Error(ErrorCode::invalid_argument, format_text("--set: {}; expected one of {}", set, names_of_sets()));
    for (const auto& shape : all[set]) {
      if (shape[0] > 0) shapes.push_back({shape[0], shape[1], shape[2]});
    }
  }
  return shapes;
}

}  // namespace

std::string names_of_sets() {
  const Json all = Json::parse(kShapesJson);
  std::string names;
  for (const auto& [name, list] : all.items()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

int bench(const BenchOptions& options) {
  const auto machine = open_machine(options.device);
  const auto shapes = shapes_to_run(options, machine->device());
  const DType out_dtype = options.out_dtype == "f32" ? DType::f32 : DType::bf16;
  std::FILE* table = options.json == "-" ? stderr : stdout;

  print_text(table, "gemm_fp8 to {} on {}, median of at least {} runs\n", options.out_dtype, machine->name(),
             options.min_repeats);
  print_text(table, "{:>7} {:>7} {:>7} {:>12} {:>9} {:>9}\n", "M", "N", "K", "median us", "TFLOPS", "GB/s");
  Json rows = Json::array();
  for (const Shape& shape : shapes) {
    const double m = shape.m, n = shape.n, k = shape.k;
    const double seconds = median_seconds(*machine, make_operands(*machine, shape, out_dtype), options);
    const double tflops = 2 * m * n * k / seconds * 1e-12;
    const double gbps = (m * k + n * k + m * n * size_of(out_dtype)) / seconds * 1e-9;
    print_text(table, "{:>7} {:>7} {:>7} {:>12.1f} {:>9.3f} {:>9.1f}\n", shape.m, shape.n, shape.k, seconds * 1e6,
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
