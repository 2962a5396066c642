// Causal flash attention (Dao 2023).
//
// Scores are kept transposed, (keys, queries): a row has one key's scores against a block of kQueries queries, so that the
// softmax runs down the rows with a query in each lane, and the causal mask touches the last rows of a block only.
// Forward: one block of queries against one block of keys after the other, with a running maximum and sum for each query.
// Backward: the same blocks, probabilities recomputed from lse. With many (batch, head) pairs each pair is one work item,
// which forms dq, dk and dv together (5 products per block). With few, dq by blocks of queries and dk, dv by blocks of keys
// are separate work items (7 products). Which way and which blocks depends on the shape alone, and every element of the
// result is summed by one work item in a fixed order, so the bits do not depend on the number of threads.
// A work item copies what it reads of q, k, v and dout to fp32 rows in its scratch, padded with zeros to whole tiles.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/dispatch.h"
#include "core/integers.h"
#include "cpu/cpu_ops.h"
#include "cpu/math.h"
#include "cpu/panel.h"
#include "cpu/scratch.h"
#include "cpu/small_product.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int32_t kQueries = 32;        // of a block
constexpr int64_t kKeys = 256;          // of a block at most
constexpr int64_t kEnoughItems = 64;    // forward work items, to keep many threads busy
constexpr int64_t kEnoughHeads = 8;     // batch·heads from which the backward has one work item per head
constexpr int64_t kItemPositions = 64;  // of a backward work item if there are fewer
constexpr int64_t kRows = 8;            // of keys, a multiple of the tiles' rows
static_assert(kQueries % kTileColumns == 0 && kRows % kTileRows == 0);

struct Shape {
  int64_t B, T, NH, HS;

  int64_t C() const { return NH * HS; }
  int64_t width() const { return round_up(HS, kTileColumns); }  // of a padded row
  float scale() const { return 1.0f / std::sqrt(float(HS)); }
};

// to (padded rows, width) = scale · from (rows,HS), whose rows are ld apart; zeros elsewhere.
template <typename X>
void copy_rows(float* to, const X* from, int64_t ld, int64_t rows, int64_t padded, const Shape& s, float scale = 1) {
  const int64_t width = s.width();
  for (int64_t row = 0; row < padded; ++row, to += width, from += ld) {
    const int64_t count = row < rows ? s.HS : 0;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = scale * to_float(from[i]);
    for (int64_t i = count; i < width; ++i) to[i] = 0;
  }
}

// to (rows,HS) = scale · from (rows, width).
template <typename X>
void store_rows(X* to, int64_t ld, const float* from, int64_t rows, const Shape& s, float scale = 1) {
  for (int64_t row = 0; row < rows; ++row, to += ld, from += s.width()) {
#pragma omp simd
    for (int64_t i = 0; i < s.HS; ++i) store(to + i, scale * from[i]);
  }
}

// Working memory of a work item: parts of its thread's scratch, one after the other.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : next_(thread_scratch(floats)) {}
  float* take(int64_t rows, int64_t columns) {
    float* result = next_;
    next_ += rows * columns;
    return result;
  }

 private:
  float* next_;
};

// A number for each query of a block.
struct alignas(64) Lanes {
  float x[kQueries];
};

// Of scores (n,kQueries), of the keys from `key` on and the queries from `query` on, those of keys in the future are -inf.
void hide_future(float* scores, int64_t n, int64_t key, int64_t query) {
  for (int64_t i = max(0, query - key + 1); i < n; ++i) {
    float* row = scores + i * kQueries;
    const int32_t hidden = int32_t(key + i - query);
#pragma omp simd
    for (int32_t j = 0; j < kQueries; ++j) row[j] = j < hidden ? -INFINITY : row[j];
  }
}

// scores (n,kQueries) become exp(score - maximum). Updates the running maximum and sum; returns the factor by which
// everything summed before has to be multiplied.
Lanes softmax(float* scores, int64_t n, Lanes& maximum, Lanes& sum) {
  Lanes largest = maximum, block_sum = {}, correction;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = scores + i * kQueries;
#pragma omp simd
    for (int32_t j = 0; j < kQueries; ++j) largest.x[j] = row[j] > largest.x[j] ? row[j] : largest.x[j];
  }
  for (int64_t i = 0; i < n; ++i) {
    float* row = scores + i * kQueries;
#pragma omp simd
    for (int32_t j = 0; j < kQueries; ++j) {
      row[j] = probability_exp(row[j] - largest.x[j]);
      block_sum.x[j] += row[j];
    }
  }
#pragma omp simd
  for (int32_t j = 0; j < kQueries; ++j) {
    correction.x[j] = probability_exp(maximum.x[j] - largest.x[j]);
    sum.x[j] = sum.x[j] * correction.x[j] + block_sum.x[j];
  }
  maximum = largest;
  return correction;
}

// Queries [begin, end) of one head; qkv, out and lse point to its first position.
template <typename X>
void forward_queries(X* out, float* lse, const X* qkv, const Shape& s, int64_t begin, int64_t end) {
  const int64_t C = s.C(), HS = s.HS, width = s.width(), padded = round_up(end, kRows);
  Scratch scratch(2 * padded * width + 2 * kQueries * width + HS * kQueries + kKeys * kQueries);
  float* k = scratch.take(padded, width);
  float* v = scratch.take(padded, width);
  float* rows_of_block = scratch.take(kQueries, width);
  float* o = scratch.take(kQueries, width);
  float* q = scratch.take(HS, kQueries);  // scaled and transposed
  float* scores = scratch.take(kKeys, kQueries);
  copy_rows(k, qkv + C, 3 * C, end, padded, s);
  copy_rows(v, qkv + 2 * C, 3 * C, end, padded, s);

  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t rows = min(kQueries, end - first), last_key = round_up(first + rows, kRows);
    copy_rows(rows_of_block, qkv + first * 3 * C, 3 * C, rows, kQueries, s);
    copy_transposed(q, rows_of_block, width, kQueries, HS, s.scale());
    Lanes maximum, sum = {};
    for (float& x : maximum.x) x = -FLT_MAX;  // not -inf: -inf - -inf would be NaN
    for (int64_t key = 0; key < last_key; key += kKeys) {
      const int64_t keys = min(kKeys, last_key - key);
      multiply({keys, kQueries, HS, k + key * width, width, q, kQueries, scores, kQueries, false});
      hide_future(scores, keys, key, first);
      const Lanes correction = softmax(scores, keys, maximum, sum);
      for (int64_t r = 0; key > 0 && r < kQueries; ++r) {
        float* row = o + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) row[i] *= correction.x[r];
      }
      multiply_transposed({kQueries, width, keys, scores, kQueries, v + key * width, width, o, width, key > 0});
    }
    for (int64_t r = 0; r < rows; ++r) {
      lse[first + r] = maximum.x[r] + std::log(sum.x[r]);
      store_rows(out + (first + r) * C, C, o + r * width, 1, s, 1.0f / sum.x[r]);
    }
  }
}

template <typename X>
void forward(X* out, float* lse, const X* qkv, const Shape& s, int64_t first) {
  const int64_t C = s.C(), heads = s.B * s.NH, queries = s.T - first;
  int64_t chunk = divide_up(queries, kQueries) * kQueries;
  while (heads * divide_up(queries, chunk) < kEnoughItems && chunk > kQueries) {
    chunk = divide_up(chunk / 2, kQueries) * kQueries;
  }
  const int64_t chunks = divide_up(queries, chunk), items = heads * chunks;
#pragma omp parallel for schedule(dynamic, 1) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t b = item % heads / s.NH, h = item % heads % s.NH;
    const int64_t begin = first + (chunks - 1 - item / heads) * chunk;  // the last queries first: they take longest
    forward_queries(out + b * s.T * C + h * s.HS, lse + (b * s.NH + h) * s.T, qkv + b * s.T * 3 * C + h * s.HS, s,
                    begin, min(begin + chunk, s.T));
  }
}

// One head: pointers to its first position.
template <typename X>
struct Head {
  X* dqkv;
  const X* dout;
  const X* out;
  const float* lse;
  const X* qkv;
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// scores (n,kQueries) become probabilities, and dscores, which holds the gradient of the probabilities, that of the scores.
void probabilities(float* scores, float* dscores, int64_t n, const Lanes& lse, const Lanes& delta) {
  for (int64_t i = 0; i < n; ++i) {
    float* p = scores + i * kQueries;
    float* ds = dscores + i * kQueries;
#pragma omp simd
    for (int32_t j = 0; j < kQueries; ++j) {
      p[j] = probability_exp(p[j] - lse.x[j]);
      ds[j] = p[j] * (ds[j] - delta.x[j]);
    }
  }
}

// What the pairs (query, key) of the two ranges contribute: to dq of the queries if want_dq, to dk and dv of the keys if
// want_dkv. Each result must be complete with these ranges, as it overwrites.
template <typename X>
void backward_pairs(const Head<X>& head, const Shape& s, Range queries, Range keys, bool want_dq, bool want_dkv) {
  const int64_t C = s.C(), HS = s.HS, width = s.width(), padded = round_up(keys.size(), kRows);
  Scratch scratch(4 * padded * width + 3 * kQueries * width + 2 * HS * kQueries + 2 * kKeys * kQueries);
  float* k = scratch.take(padded, width);
  float* v = scratch.take(padded, width);
  float* dk = scratch.take(padded, width);
  float* dv = scratch.take(padded, width);
  float* q = scratch.take(kQueries, width);  // scaled
  float* dout = scratch.take(kQueries, width);
  float* dq = scratch.take(kQueries, width);
  float* q_transposed = scratch.take(HS, kQueries);
  float* dout_transposed = scratch.take(HS, kQueries);
  float* scores = scratch.take(kKeys, kQueries);
  float* dscores = scratch.take(kKeys, kQueries);
  const X* key_rows = head.qkv + keys.begin * 3 * C;
  copy_rows(k, key_rows + C, 3 * C, keys.size(), padded, s);
  copy_rows(v, key_rows + 2 * C, 3 * C, keys.size(), padded, s);
  for (int64_t i = 0; i < 2 * padded * width; ++i) dk[i] = 0;  // and dv behind it

  for (int64_t first = queries.begin; first < queries.end; first += kQueries) {
    const int64_t rows = min(kQueries, queries.end - first);
    copy_rows(q, head.qkv + first * 3 * C, 3 * C, rows, kQueries, s, s.scale());
    copy_rows(dout, head.dout + first * C, C, rows, kQueries, s);
    copy_transposed(q_transposed, q, width, kQueries, HS);
    copy_transposed(dout_transposed, dout, width, kQueries, HS);
    Lanes lse = {}, delta = {};  // Σ_u p·dp, which is dout·out
    for (int64_t r = 0; r < rows; ++r) {
      const X* o = head.out + (first + r) * C;
      const float* d = dout + r * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < HS; ++i) sum += d[i] * to_float(o[i]);
      delta.x[r] = sum;
      lse.x[r] = head.lse[first + r];
    }

    const int64_t end = min(padded, round_up(first + rows - keys.begin, kRows));
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t n = min(kKeys, end - key), at = key * width;
      multiply({n, kQueries, HS, k + at, width, q_transposed, kQueries, scores, kQueries, false});
      multiply({n, kQueries, HS, v + at, width, dout_transposed, kQueries, dscores, kQueries, false});
      hide_future(scores, n, keys.begin + key, first);
      probabilities(scores, dscores, n, lse, delta);
      if (want_dkv) {
        multiply({n, width, kQueries, scores, kQueries, dout, width, dv + at, width, true});
        multiply({n, width, kQueries, dscores, kQueries, q, width, dk + at, width, true});
      }
      if (want_dq) multiply_transposed({kQueries, width, n, dscores, kQueries, k + at, width, dq, width, key > 0});
    }
    if (want_dq) store_rows(head.dqkv + first * 3 * C, 3 * C, dq, rows, s, s.scale());
  }
  if (want_dkv) {
    X* rows = head.dqkv + keys.begin * 3 * C;
    store_rows(rows + C, 3 * C, dk, keys.size(), s);
    store_rows(rows + 2 * C, 3 * C, dv, keys.size(), s);
  }
}

template <typename X>
void backward(X* dqkv, const X* dout, const X* out, const float* lse, const X* qkv, const Shape& s) {
  const int64_t heads = s.B * s.NH, T = s.T;
  const auto head = [&](int64_t i) {
    const int64_t C = s.C(), row = i / s.NH * T, channel = i % s.NH * s.HS;
    return Head<X>{dqkv + row * 3 * C + channel, dout + row * C + channel, out + row * C + channel, lse + i * T,
                   qkv + row * 3 * C + channel};
  };
  if (heads >= kEnoughHeads || T <= kItemPositions) {
#pragma omp parallel for schedule(dynamic, 1) if (heads > 1)
    for (int64_t item = 0; item < heads; ++item) backward_pairs(head(item), s, {0, T}, {0, T}, true, true);
    return;
  }
  const int64_t blocks = divide_up(T, kItemPositions);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t item = 0; item < 2 * heads * blocks; ++item) {
    // Longest first: late queries and early keys.
    const int64_t block = item / 2 / heads;
    if (item % 2 == 0) {
      const int64_t begin = (blocks - 1 - block) * kItemPositions, end = min(begin + kItemPositions, T);
      backward_pairs(head(item / 2 % heads), s, {begin, end}, {0, end}, true, false);
    } else {
      const int64_t begin = block * kItemPositions, end = min(begin + kItemPositions, T);
      backward_pairs(head(item / 2 % heads), s, {begin, T}, {begin, end}, false, true);
    }
  }
}

}  // namespace

void CpuOps::attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) {
  dispatch(qkv.dtype, [&](auto zero) {
    using X = decltype(zero);
    const Shape shape{qkv.shape[0], qkv.shape[1], num_heads, qkv.last() / 3 / num_heads};
    forward<X>(out.as<X>(), lse.as<float>(), qkv.as<X>(), shape, first);
  });
}

void CpuOps::attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) {
  dispatch(qkv.dtype, [&](auto zero) {
    using X = decltype(zero);
    const Shape shape{qkv.shape[0], qkv.shape[1], num_heads, qkv.last() / 3 / num_heads};
    backward<X>(dqkv.as<X>(), dout.as<X>(), out.as<X>(), lse.as<float>(), qkv.as<X>(), shape);
  });
}

}  // namespace llmc::cpu::LLMC_ISA
