// Causal flash attention (Dao 2023).
//
// Forward: a block of queries at a time, its scores against one block of keys after the other by BLAS, with a running
// maximum and sum of exponentials per query. The score block stays in the L2 cache. Up to kKeys positions there is one key
// block, and nothing is ever rescaled. Keys behind the last query of a block are never touched.
// Backward: the same blocks, probabilities recomputed from lse. With many (batch, head) pairs each pair is one work item,
// which forms dq, dk and dv together (5 products per block). With few, dq by blocks of queries and dk, dv by blocks of keys
// are separate work items (7 products). Which way and which blocks depends on the shape alone, and every element of the
// result is summed by one work item in a fixed order, so the bits do not depend on the number of threads.
// fp32: BLAS works on the strided q, k, v and writes its results in place. bf16: a work item widens what it needs.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/integers.h"
#include "cpu/blas.h"
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/math.h"
#include "cpu/scratch.h"
#include "cpu/widen.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kQueries = 64;          // of a block
constexpr int64_t kKeys = 1024;           // of a block, a multiple of kQueries
constexpr int64_t kScoreLd = kKeys + 16;  // row stride of a score block; not a power of two, for the cache's sake
constexpr int64_t kEnoughItems = 64;      // forward work items, to keep many threads busy
constexpr int64_t kEnoughHeads = 8;       // batch·heads from which the backward has one work item per head

struct Shape {
  int64_t B, T, NH, HS;

  int64_t C() const { return NH * HS; }
  float scale() const { return 1.0f / std::sqrt(float(HS)); }
};

// The rows of one head in fp32.
template <typename F>
struct Rows {
  F* data;
  int64_t ld;

  F* operator[](int64_t row) const { return data + row * ld; }
};

// fp32 is used where it is; bf16 is widened into scratch, which advances.
Rows<const float> read(const float* x, int64_t ld, int64_t, int64_t, float*&) { return {x, ld}; }
Rows<const float> read(const bf16* x, int64_t ld, int64_t rows, int64_t cols, float*& scratch) {
  float* data = scratch;
  widen(data, x, ld, rows, cols);
  scratch += rows * cols;
  return {data, cols};
}

// Where fp32 results are computed: in place, or in scratch until round_to() stores them.
Rows<float> result(float* x, int64_t ld, int64_t, int64_t, float*&) { return {x, ld}; }
Rows<float> result(bf16*, int64_t, int64_t rows, int64_t cols, float*& scratch) {
  float* data = scratch;
  scratch += rows * cols;
  return {data, cols};
}

void round_to(float*, int64_t, Rows<float>, int64_t, int64_t) {}
void round_to(bf16* to, int64_t ld, Rows<float> from, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* source = from[row];
    bf16* target = to + row * ld;
#pragma omp simd
    for (int64_t i = 0; i < cols; ++i) store(target + i, source[i]);
  }
}

// Rows of scores are processed kLanes at a time, without a scalar remainder (kScoreLd leaves room): in the last vector the
// scores behind the n visible ones are first replaced by a visible one, then their exponentials by 0. (With -inf in their
// place every row would pay for an underflow.)
constexpr int64_t kLanes = 16;

// Returns n rounded up to a multiple of kLanes.
LLMC_INLINE int64_t cover_tail(float* scores, int64_t n) {
  const int64_t last = (n - 1) / kLanes * kLanes;
  const float visible = scores[last];
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) scores[last + j] = last + j < n ? scores[last + j] : visible;
  return last + kLanes;
}

// Sets the scores [begin, end) to 0; begin is a multiple of kLanes.
LLMC_INLINE void clear(float* scores, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) scores[i + j] = 0;
  }
}

// Replaces n scores by exp(score - maximum) and the following ones up to `end` by 0. Updates the running maximum and sum;
// returns the factor by which everything summed before has to be multiplied. 1 <= n <= end.
LLMC_INLINE float softmax_row(float* scores, int64_t n, int64_t end, float& running_max, float& running_sum) {
  const int64_t padded = cover_tail(scores, n), last = padded - kLanes;
  float maximum = running_max;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < padded; ++i) maximum = scores[i] > maximum ? scores[i] : maximum;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < last; ++i) {
    scores[i] = fast_exp(scores[i] - maximum);
    sum += scores[i];
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kLanes; ++j) {
    const float p = fast_exp(scores[last + j] - maximum);
    scores[last + j] = last + j < n ? p : 0.0f;
    sum += scores[last + j];
  }
  clear(scores, padded, end);

  const float correction = running_max == -FLT_MAX ? 0.0f : fast_exp(running_max - maximum);
  running_max = maximum;
  running_sum = running_sum * correction + sum;
  return correction;
}

// Queries [begin, end) of one head; qkv, out and lse point to its first position.
template <typename X>
void forward_queries(X* out, float* lse, const X* qkv, const Shape& s, int64_t begin, int64_t end) {
  const int64_t C = s.C(), HS = s.HS;
  float* scratch = thread_scratch(kQueries * (kScoreLd + HS) + 3 * end * HS);
  float* scores = scratch;
  scratch += kQueries * kScoreLd;
  const Rows<const float> q = read(qkv + begin * 3 * C, 3 * C, end - begin, HS, scratch);
  const Rows<const float> k = read(qkv + C, 3 * C, end, HS, scratch);
  const Rows<const float> v = read(qkv + 2 * C, 3 * C, end, HS, scratch);

  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t rows = min(kQueries, end - first);
    X* block_out = out + first * C;
    float* block_scratch = scratch;
    const Rows<float> o = result(block_out, C, rows, HS, block_scratch);
    float maximum[kQueries], sum[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      maximum[r] = -FLT_MAX;  // not -inf: -inf - -inf would be NaN
      sum[r] = 0;
    }
    for (int64_t key = 0; key < first + rows; key += kKeys) {
      const int64_t keys = min(kKeys, first + rows - key);
      blas::gemm(false, true, rows, keys, HS, s.scale(), q[first - begin], q.ld, k[key], k.ld, 0, scores, kScoreLd);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = min(keys, first + r + 1 - key);
        const float correction = softmax_row(scores + r * kScoreLd, visible, keys, maximum[r], sum[r]);
        if (key == 0) continue;
        float* row = o[r];
#pragma omp simd
        for (int64_t i = 0; i < HS; ++i) row[i] *= correction;
      }
      blas::gemm(false, false, rows, HS, keys, 1, scores, kScoreLd, v[key], v.ld, key == 0 ? 0.0f : 1.0f, o.data, o.ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      lse[first + r] = maximum[r] + std::log(sum[r]);
      const float inverse = 1.0f / sum[r];
      float* row = o[r];
#pragma omp simd
      for (int64_t i = 0; i < HS; ++i) row[i] *= inverse;
    }
    round_to(block_out, C, o, rows, HS);
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

// What the pairs (query, key) of the two ranges contribute: to dq of the queries if want_dq, to dk and dv of the keys if
// want_dkv. Each result must be complete with these ranges, as it overwrites.
template <typename X>
void backward_pairs(const Head<X>& head, const Shape& s, Range queries, Range keys, bool want_dq, bool want_dkv) {
  const int64_t C = s.C(), HS = s.HS;
  float* scratch = thread_scratch(2 * kQueries * kScoreLd + (3 * queries.size() + 4 * keys.size()) * HS);
  float* probabilities = scratch;
  float* dscores = scratch + kQueries * kScoreLd;
  scratch += 2 * kQueries * kScoreLd;
  const X* query_rows = head.qkv + queries.begin * 3 * C;
  const X* key_rows = head.qkv + keys.begin * 3 * C;
  X* dquery_rows = head.dqkv + queries.begin * 3 * C;
  X* dkey_rows = head.dqkv + keys.begin * 3 * C;
  const Rows<const float> q = read(query_rows, 3 * C, queries.size(), HS, scratch);
  const Rows<const float> dout = read(head.dout + queries.begin * C, C, queries.size(), HS, scratch);
  const Rows<const float> k = read(key_rows + C, 3 * C, keys.size(), HS, scratch);
  const Rows<const float> v = read(key_rows + 2 * C, 3 * C, keys.size(), HS, scratch);
  const Rows<float> dq = result(dquery_rows, 3 * C, queries.size(), HS, scratch);
  const Rows<float> dk = result(dkey_rows + C, 3 * C, keys.size(), HS, scratch);
  const Rows<float> dv = result(dkey_rows + 2 * C, 3 * C, keys.size(), HS, scratch);

  // From the last block of queries to the first: the last one sees all keys, so it overwrites all of dk and dv.
  const int64_t blocks = divide_up(queries.size(), kQueries);
  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t row = block * kQueries, rows = min(kQueries, queries.size() - row);
    const int64_t first = queries.begin + row;
    const float* dout_rows = dout[row];

    float delta[kQueries];  // Σ_u p·dp, which is dout·out
    for (int64_t r = 0; r < rows; ++r) {
      const float* d = dout_rows + r * dout.ld;
      const X* o = head.out + (first + r) * C;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < HS; ++i) sum += d[i] * to_float(o[i]);
      delta[r] = sum;
    }

    const int64_t last_key = min(keys.end, first + rows);
    for (int64_t key = keys.begin; key < last_key; key += kKeys) {
      const int64_t n = min(kKeys, last_key - key), at = key - keys.begin;
      blas::gemm(false, true, rows, n, HS, s.scale(), q[row], q.ld, k[at], k.ld, 0, probabilities, kScoreLd);
      blas::gemm(false, true, rows, n, HS, 1, dout_rows, dout.ld, v[at], v.ld, 0, dscores, kScoreLd);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = max(0, min(n, first + r + 1 - key));
        const float lse = head.lse[first + r], row_delta = delta[r];
        float* p = probabilities + r * kScoreLd;
        float* ds = dscores + r * kScoreLd;
        const int64_t padded = visible > 0 ? cover_tail(p, visible) : 0;
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
          const float probability = fast_exp(p[i] - lse);
          p[i] = i < visible ? probability : 0.0f;
          ds[i] = p[i] * (ds[i] - row_delta);
        }
        clear(p, padded, n);
        clear(ds, padded, n);
      }
      const float add = block == blocks - 1 ? 0.0f : 1.0f;
      if (want_dkv) {
        blas::gemm(true, false, n, HS, rows, 1, probabilities, kScoreLd, dout_rows, dout.ld, add, dv[at], dv.ld);
        blas::gemm(true, false, n, HS, rows, s.scale(), dscores, kScoreLd, q[row], q.ld, add, dk[at], dk.ld);
      }
      if (want_dq) {
        blas::gemm(false, false, rows, HS, n, s.scale(), dscores, kScoreLd, k[at], k.ld, at == 0 ? 0.0f : 1.0f, dq[row],
                   dq.ld);
      }
    }
  }
  if (want_dq) round_to(dquery_rows, 3 * C, dq, queries.size(), HS);
  if (want_dkv) {
    round_to(dkey_rows + C, 3 * C, dk, keys.size(), HS);
    round_to(dkey_rows + 2 * C, 3 * C, dv, keys.size(), HS);
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
  if (heads >= kEnoughHeads || T <= kQueries) {
#pragma omp parallel for schedule(dynamic, 1) if (heads > 1)
    for (int64_t item = 0; item < heads; ++item) backward_pairs(head(item), s, {0, T}, {0, T}, true, true);
    return;
  }
  const int64_t blocks = divide_up(T, kQueries);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t item = 0; item < 2 * heads * blocks; ++item) {
    // Longest first: late queries and early keys.
    const int64_t block = item / 2 / heads;
    if (item % 2 == 0) {
      const int64_t begin = (blocks - 1 - block) * kQueries, end = min(begin + kQueries, T);
      backward_pairs(head(item / 2 % heads), s, {begin, end}, {0, end}, true, false);
    } else {
      const int64_t begin = block * kQueries, end = min(begin + kQueries, T);
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
