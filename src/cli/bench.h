// The GEMM shapes that `phalanx bench` runs.
#pragma once

namespace phalanx::cli {

/// The text of tests/cases/shapes.json at build time.
extern const char* const kShapesJson;

}  // namespace phalanx::cli
