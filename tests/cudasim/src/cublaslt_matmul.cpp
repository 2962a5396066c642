// Heuristics, cublasLtMatmul and its epilogues.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "bf16.h"
#include "cublaslt.h"
#include "internal.h"

namespace cudasim::cublaslt {
namespace {

// --- algorithms ------------------------------------------------------------------------------------------------------

// The first takes so much workspace where it may have it, however much more the preference allows.
constexpr uint64_t kLargestWorkspace = 64 << 10;

// How an algorithm adds up. Those with several parts of k add their sums afterwards, so that they round differently.
struct Method {
  int64_t parts;
  uint32_t reduction;  // cublasLtReductionScheme_t
  enum { Good, Fails, NotForThis } kind = Good;
};
const Method methods[] = {
    {1, CUBLASLT_REDUCTION_SCHEME_NONE},
    {1, CUBLASLT_REDUCTION_SCHEME_NONE},  // without workspace
    {2, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE},
    {3, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE},
    {2, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE},
    {1, CUBLASLT_REDUCTION_SCHEME_NONE, Method::Fails},       // refuses to run
    {1, CUBLASLT_REDUCTION_SCHEME_NONE, Method::NotForThis},  // the query's result says so
};
constexpr uint64_t kWithoutWorkspace = 1;

uint64_t workspace_of(uint64_t number, const Configuration& x, uint64_t allowed) {
  const Method& method = methods[number];
  if (method.parts > 1) return method.parts * x.m * x.n * sizeof(float) * x.d.batch_count;
  return number == kWithoutWorkspace ? 0 : std::min(allowed, kLargestWorkspace);
}

// On the simulated clock: the environment variables make some faster or slower than the others.
double milliseconds_of(const Call& call) {
  const char* fastest = std::getenv("CUDASIM_CUBLASLT_FASTEST");
  double milliseconds = 1;
  if (fastest && std::strtoull(fastest, nullptr, 10) == call.algorithm) milliseconds /= 2;
  if (names_epilogue("CUDASIM_CUBLASLT_SLOW", *call.configuration.epilogue)) milliseconds *= 4;
  return milliseconds;
}

uint64_t checksum(const Algorithm& x) {
  uint64_t sum = 0x9e3779b97f4a7c15u;
  for (uint64_t part : {x.number, x.configuration, x.workspace, uint64_t{x.alignment_a}, uint64_t{x.alignment_b},
                        uint64_t{x.alignment_c}, uint64_t{x.alignment_d}})
    sum = (sum ^ part) * 0x100000001b3u;
  return sum;
}

Algorithm read_algorithm(const cublasLtMatmulAlgo_t& opaque) {
  Algorithm x;
  std::memcpy(&x, &opaque, sizeof x);
  if (x.checksum != checksum(x) || x.number >= std::size(methods))
    refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was not returned by a query");
  return x;
}

void check_preference(const Preference& x) {
  for (uint32_t alignment : {x.alignment_a, x.alignment_b, x.alignment_c, x.alignment_d})
    if (!alignment || alignment & (alignment - 1))
      refuse(CUBLAS_STATUS_INVALID_VALUE, "minimum alignment %u is not a power of two", alignment);
  if (x.search_mode != CUBLASLT_SEARCH_BEST_FIT)
    refuse(CUBLAS_STATUS_NOT_SUPPORTED, "search mode %u: only BEST_FIT is simulated", x.search_mode);
}

// Those whose workspace and reduction the preference allows.
std::vector<Algorithm> find_algorithms(const Configuration& configuration, const Preference& preference) {
  std::vector<Algorithm> found;
  for (uint64_t number = 0; number < std::size(methods); number++) {
    const uint32_t reduction = methods[number].reduction;
    const uint64_t workspace = workspace_of(number, configuration, preference.max_workspace);
    if (workspace > preference.max_workspace || (reduction & preference.reduction_scheme_mask) != reduction) continue;
    Algorithm x = {};
    x.number = number;
    x.configuration = configuration.hash();
    x.workspace = workspace;
    x.alignment_a = preference.alignment_a;
    x.alignment_b = preference.alignment_b;
    x.alignment_c = preference.alignment_c;
    x.alignment_d = preference.alignment_d;
    x.checksum = checksum(x);
    found.push_back(x);
  }
  return found;
}

cublasLtMatmulHeuristicResult_t result_of(const Algorithm& algorithm) {
  cublasLtMatmulHeuristicResult_t result = {};
  std::memcpy(&result.algo, &algorithm, sizeof algorithm);
  const bool usable = methods[algorithm.number].kind != Method::NotForThis;
  result.workspaceSize = algorithm.workspace;
  result.state = usable ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
  result.wavesCount = 1;
  return result;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Calls visit(first byte, bytes) for each contiguous part; false as soon as it is.
template <typename Visit>
bool visit_memory(const Region& x, Visit visit) {
  const size_t size = element_size(x.layout.type);
  const bool dense = static_cast<uint64_t>(x.layout.ld) == x.layout.contiguous();
  const uint64_t parts = dense ? 1 : x.layout.pieces();
  const uint64_t length = dense ? x.layout.pieces() * x.layout.contiguous() : x.layout.contiguous();
  for (int32_t batch = 0; batch < x.layout.batch_count; batch++)
    for (uint64_t part = 0; part < parts; part++) {
      const size_t offset = (batch * x.layout.batch_stride + part * x.layout.ld) * size;
      if (!visit(static_cast<const char*>(x.data) + offset, length * size)) return false;
    }
  return true;
}

// Reports what the call must not read or write, and marks what it writes as initialised.
bool check_accesses(const Call& call) {
  for (const Region& x : regions(call)) {
    const std::string what = std::string(x.written ? "cublasLtMatmul writes " : "cublasLtMatmul reads ") + x.name;
    const bool allowed = visit_memory(x, [&](const void* p, size_t bytes) {
      return x.written ? check_write(p, bytes, what.c_str()) : check_read(p, bytes, what.c_str());
    });
    if (!allowed) return false;
  }
  return true;
}

const void* batch_of(const void* data, const Layout& layout, int batch) {
  return static_cast<const char*>(data) + batch * layout.batch_stride * element_size(layout.type);
}
void* batch_of(void* data, const Layout& layout, int batch) {
  return const_cast<void*>(batch_of(const_cast<const void*>(data), layout, batch));
}

View view(const void* data, const Layout& layout, bool transposed) {
  const bool rows_contiguous = (layout.order == CUBLASLT_ORDER_COL) != transposed;
  return rows_contiguous ? View{data, layout.type, 1, layout.ld} : View{data, layout.type, layout.ld, 1};
}

// Column j of a matrix of m rows.
void load_column(const View& x, int64_t j, std::vector<float>& column) {
  for (size_t i = 0; i < column.size(); i++) {
    const int64_t at = i * x.row_stride + j * x.col_stride;
    column[i] = x.type == CUDA_R_32F ? static_cast<const float*>(x.data)[at]
                                     : float_from_bf16(static_cast<const uint16_t*>(x.data)[at]);
  }
}
void store_column(const View& x, int64_t j, const std::vector<float>& column) {
  void* data = const_cast<void*>(x.data);
  for (size_t i = 0; i < column.size(); i++) {
    const int64_t at = i * x.row_stride + j * x.col_stride;
    if (x.type == CUDA_R_32F)
      static_cast<float*>(data)[at] = column[i];
    else
      static_cast<uint16_t*>(data)[at] = bf16_from_float(column[i]);
  }
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// GELU in the tanh form, x/2·(1 + tanh(√(2/π)·(x + 0.044715 x³))), and its derivative.
constexpr float kGeluScale = 0.7978845608028654f;

float gelu(float x) { return 0.5f * x * (1 + std::tanh(kGeluScale * (x + 0.044715f * x * x * x))); }

float gelu_derivative(float x) {
  const float t = std::tanh(kGeluScale * (x + 0.044715f * x * x * x));
  return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kGeluScale * (1 + 3 * 0.044715f * x * x);
}

// The sum over k of each row of a packed matrix.
std::vector<float> row_sums(const std::vector<float>& packed, int64_t rows, int64_t k, int64_t height) {
  std::vector<float> sums(rows);
  for (int64_t i = 0; i < rows; i++) {
    double sum = 0;
    for (int64_t p = 0; p < k; p++) sum += packed[(i / height * k + p) * height + i % height];
    sums[i] = static_cast<float>(sum);
  }
  return sums;
}

// The sums of all parts of k, each rounded to the output's type where the reduction says so.
std::vector<float> multiply_parts(const Method& method, uint32_t output, const std::vector<float>& a,
                                  const std::vector<float>& b, int64_t m, int64_t n, int64_t k) {
  std::vector<float> sums;
  for (int64_t part = 0; part < method.parts; part++) {
    std::vector<float> own = multiply(a, b, m, n, k, part * k / method.parts, (part + 1) * k / method.parts);
    if (method.reduction == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE && output == CUDA_R_16BF)
      for (float& sum : own) sum = float_from_bf16(bf16_from_float(sum));
    if (part == 0) {
      sums = std::move(own);
    } else {
      for (size_t i = 0; i < sums.size(); i++) sums[i] += own[i];
    }
  }
  return sums;
}

void run_batch(const Call& call, int batch) {
  const Configuration& x = call.configuration;
  const uint32_t epilogue = x.epilogue->value;
  const auto m = static_cast<int64_t>(x.m), n = static_cast<int64_t>(x.n), k = static_cast<int64_t>(x.k);
  const bool tf32 = x.descriptor.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32;
  const bool trans_a = x.descriptor.trans_a != CUBLAS_OP_N, trans_b = x.descriptor.trans_b != CUBLAS_OP_N;
  const Layout bias_layout = x.bias_layout(), aux_layout = x.aux_layout();
  void* bias_data = batch_of(x.descriptor.bias, bias_layout, batch);
  const View bias_view = view(bias_data, bias_layout, false);
  const View aux_view = view(batch_of(x.descriptor.aux, aux_layout, batch), aux_layout, false);
  const View c_view = view(batch_of(call.c, x.c, batch), x.c, false);
  const View d_view = view(batch_of(call.d, x.d, batch), x.d, false);

  const auto a = pack(view(batch_of(call.a, x.a, batch), x.a, trans_a), m, k, kPanelA, tf32);
  const auto b = pack(view(batch_of(call.b, x.b, batch), x.b, !trans_b), n, k, kPanelB, tf32);
  const auto sums = multiply_parts(methods[call.algorithm], x.d.type, a, b, m, n, k);
  const int64_t sums_ld = (m + kPanelA - 1) / kPanelA * kPanelA;
  float alpha = call.alpha;
  for (const float* scale : {x.descriptor.a_scale, x.descriptor.b_scale}) alpha *= scale ? *scale : 1;
  if (epilogue == CUBLASLT_EPILOGUE_BGRADA) store_column(bias_view, 0, row_sums(a, m, k, kPanelA));
  if (epilogue == CUBLASLT_EPILOGUE_BGRADB) store_column(bias_view, 0, row_sums(b, n, k, kPanelB));

  std::vector<float> value(m), other(m), bias(m), bias_gradient(m);
  if (x.epilogue->bias) load_column(bias_view, 0, bias);
  for (int64_t j = 0; j < n; j++) {
    for (int64_t i = 0; i < m; i++) value[i] = alpha * sums[j * sums_ld + i];
    if (call.beta != 0) {
      load_column(c_view, j, other);
      for (int64_t i = 0; i < m; i++) value[i] += call.beta * other[i];
    }
    for (int64_t i = 0; i < m; i++) value[i] += bias[i];  // zeros where the epilogue has no bias
    if (x.epilogue->writes_aux) store_column(aux_view, j, value);
    if (x.epilogue->reads_aux) load_column(aux_view, j, other);
    switch (epilogue) {
      case CUBLASLT_EPILOGUE_RELU:
      case CUBLASLT_EPILOGUE_RELU_BIAS:
        for (float& v : value) v = v > 0 ? v : 0;
        break;
      case CUBLASLT_EPILOGUE_GELU:
      case CUBLASLT_EPILOGUE_GELU_BIAS:
      case CUBLASLT_EPILOGUE_GELU_AUX:
      case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
        for (float& v : value) v = gelu(v);
        break;
      case CUBLASLT_EPILOGUE_DGELU:
      case CUBLASLT_EPILOGUE_DGELU_BGRAD:
        for (int64_t i = 0; i < m; i++) value[i] *= gelu_derivative(other[i]);
        break;
      default:
        break;
    }
    if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
      for (int64_t i = 0; i < m; i++) bias_gradient[i] += value[i];
    store_column(d_view, j, value);
  }
  if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD) store_column(bias_view, 0, bias_gradient);
}

// What the stream runs.
void run(const Call& call) {
  pass_time(call.milliseconds);
  if (call.workspace_bytes) {
    if (!check_write(call.workspace, call.workspace_bytes, "cublasLtMatmul writes its workspace")) return;
    std::memset(call.workspace, 0xff, call.workspace_bytes);  // NaN for whoever kept something there
  }
  if (!check_accesses(call)) return;
  for (int batch = 0; batch < call.configuration.d.batch_count; batch++) run_batch(call, batch);
}

}  // namespace
}  // namespace cudasim::cublaslt

using namespace cudasim::cublaslt;

extern "C" {

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
  return answer([&] {
    check_handle(handle);
    if (!preference || !results || !returned) refuse(CUBLAS_STATUS_INVALID_VALUE, "a pointer is null");
    *returned = 0;
    if (requested < 1) refuse(CUBLAS_STATUS_INVALID_VALUE, "%d algorithms requested", requested);
    check_preference(contents(preference));
    const Configuration configuration = check_configuration(descriptor, a, b, c, d);
    check_available(configuration);
    for (const Algorithm& algorithm : find_algorithms(configuration, contents(preference)))
      if (*returned < requested) results[(*returned)++] = result_of(algorithm);
  });
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                       cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
  return answer([&] {
    check_handle(handle);
    if (!algo || !result) refuse(CUBLAS_STATUS_INVALID_VALUE, "a pointer is null");
    const Configuration configuration = check_configuration(descriptor, a, b, c, d);
    check_available(configuration);
    const Algorithm algorithm = read_algorithm(*algo);
    if (algorithm.configuration != configuration.hash())
      refuse(CUBLAS_STATUS_NOT_SUPPORTED, "the algorithm was returned for another configuration");
    if (methods[algorithm.number].kind == Method::NotForThis)
      refuse(CUBLAS_STATUS_NOT_SUPPORTED, "algorithm %zu does not do this", size_t{algorithm.number});
    *result = result_of(algorithm);
  });
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  bool fails_as_it_should = false;
  const cublasStatus_t status = answer([&] {
    check_handle(handle);
    if (!alpha || !beta) refuse(CUBLAS_STATUS_INVALID_VALUE, "alpha or beta is null");
    Call call = {};
    call.configuration = check_configuration(descriptor, a_layout, b_layout, c_layout, d_layout);
    std::memcpy(&call.alpha, alpha, sizeof call.alpha);
    std::memcpy(&call.beta, beta, sizeof call.beta);
    call.a = a;
    call.b = b;
    call.c = c;
    call.d = d;
    call.workspace = workspace;
    if (algo) {
      const Algorithm algorithm = read_algorithm(*algo);
      call.workspace_bytes = algorithm.workspace;
      call.algorithm = algorithm.number;
      check_call(call, &algorithm, workspace_bytes);
      fails_as_it_should = methods[algorithm.number].kind != Method::Good;
      if (fails_as_it_should)
        refuse(CUBLAS_STATUS_NOT_SUPPORTED, "algorithm %zu does not run", size_t{algorithm.number});
    } else {
      check_available(call.configuration);
      call.workspace_bytes = std::min<uint64_t>(workspace_bytes, kLargestWorkspace);
      check_call(call, nullptr, workspace_bytes);
    }
    call.milliseconds = milliseconds_of(call);
    cudasim::enqueue(stream, [call] { run(call); });
  });
  if (status != CUBLAS_STATUS_SUCCESS && !fails_as_it_should)
    cudasim::report("cublaslt", "cublasLtMatmul refused (%s): %s", cublasLtGetStatusName(status),
                    cudasim_cublaslt_reason());
  return status;
}

}  // extern "C"
