#include "cli/operands.h"

#include <charconv>
#include <random>
#include <vector>

#include "text/text.h"

namespace phalanx::cli {
namespace {

constexpr int kScaleBlock = 128;

std::int64_t blocks(std::int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

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

}  // namespace

Shape parse_shape(const std::string& text, const char* option) {
  Shape shape{};
  const char *at = text.data(), *const end = at + text.size();
  const auto read = [&](int& size) {
    const auto [stop, error] = std::from_chars(at, end, size);
    at = stop;
    return error == std::errc{} && size > 0;
  };
  const auto read_x = [&] { return at != end && *at++ == 'x'; };
  if (read(shape.m) && read_x() && read(shape.n) && read_x() && read(shape.k) && at == end) return shape;
  throw Error(ErrorCode::invalid_argument, format_text("{}: {}; expected MxNxK, as in 64x7168x2048", option, text));
}

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

}  // namespace phalanx::cli
