// Integer arithmetic shared by plans and kernels.
#pragma once

#include "core/dtype.h"

namespace llmc {

LLMC_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LLMC_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LLMC_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
LLMC_INLINE constexpr int64_t round_up(int64_t a, int64_t multiple) { return divide_up(a, multiple) * multiple; }

}  // namespace llmc
