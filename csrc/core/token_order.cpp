#include "core/token_order.h"

#include <algorithm>
#include <numeric>

namespace llmc {

void sort_by_token(int32_t* order, const int32_t* tokens, int64_t n) {
  std::iota(order, order + n, 0);
  std::stable_sort(order, order + n, [tokens](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
}

}  // namespace llmc
