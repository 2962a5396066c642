// The bucketed order in which the embedding backward visits a batch.
#pragma once

#include <cstdint>

namespace llmc {

// Writes to order[0..n) the positions 0..n-1 sorted by token, ties by position: all occurrences of a token are
// neighbours, so each row of dwte is written by one thread in a fixed order.
void sort_by_token(int32_t* order, const int32_t* tokens, int64_t n);

}  // namespace llmc
