#include "cuda/cublas_lt.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <tuple>

#include "cuda/check.h"
#include "cuda/timing.h"

namespace llmc::cuda {
namespace {

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(Algorithm));

constexpr int kOffered = 16;  // algorithms that are timed at most
// Another algorithm than cuBLASLt's first must be faster by so much: medians differ by some tenths of a percent without
// any reason, and what need not change the results should not.
constexpr float kWorthwhile = 0.98f;

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return CUDA_R_32F;
    case DType::E4M3:
      return CUDA_R_8F_E4M3;
    case DType::E5M2:
      return CUDA_R_8F_E5M2;
    default:
      return CUDA_R_16BF;
  }
}

// The power of two that the address is a multiple of, at most 256.
uint32_t alignment_of(const Tensor& x) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(x.data) | 256;
  return uint32_t(address & -address);
}

template <typename T>
void set(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  LLMC_CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(descriptor, attribute, &value, sizeof value));
}

template <typename T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  LLMC_CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

cublasLtEpilogue_t epilogue_of(const Product& product) {
  if (product.bias_gradient) return CUBLASLT_EPILOGUE_BGRADB;  // cuBLASLt's B is our a
  switch (product.gelu) {
    case Product::Gelu::Forward:
      return product.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    case Product::Gelu::Backward:
      return CUBLASLT_EPILOGUE_DGELU;
    default:
      return product.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  }
}

struct DestroyPreference {
  cublasLtMatmulPreference_t preference = nullptr;
  ~DestroyPreference() {
    if (preference) cublasLtMatmulPreferenceDestroy(preference);
  }
};

}  // namespace

struct CublasLt::Kind {
  int64_t N, M, K;
  DType input_a, input_b, output;
  bool transpose_a, transpose_b, accumulate, tf32, fast_accumulation;
  cublasLtEpilogue_t epilogue;
  uint32_t alignment_a, alignment_b, alignment_d, alignment_bias, alignment_pre;
  size_t workspace_bytes;

  auto all() const {
    return std::tie(N, M, K, input_a, input_b, output, transpose_a, transpose_b, accumulate, tf32, fast_accumulation,
                    epilogue, alignment_a, alignment_b, alignment_d, alignment_bias, alignment_pre, workspace_bytes);
  }
  bool operator<(const Kind& other) const { return all() < other.all(); }

  // All of it in words, as the key of what is kept for later runs.
  std::string name() const {
    const std::string inputs =
        input_a == input_b ? name_of(input_a) : std::string(name_of(input_a)) + "," + name_of(input_b);
    const char* arithmetic = tf32 && input_a == DType::F32 ? ", TF32" : fast_accumulation ? ", fast accumulation" : "";
    char text[256];
    std::snprintf(text, sizeof text,
                  "%s (%" PRId64 ",%" PRId64 ")%s (%" PRId64 ",%" PRId64
                  ")%s %s %s%s, epilogue %d, aligned %u %u %u %u %u, "
                  "workspace %zu",
                  inputs.c_str(), N, K, transpose_a ? "T" : "", K, M, transpose_b ? "T" : "", accumulate ? "+=" : "=",
                  name_of(output), arithmetic, int(epilogue), alignment_a, alignment_b, alignment_d, alignment_bias,
                  alignment_pre, workspace_bytes);
    return text;
  }
};

// "A" and "B" are cuBLASLt's here: its A is our b.
struct CublasLt::Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  cublasStatus_t refusal = CUBLAS_STATUS_NOT_SUPPORTED;  // success: there is an algorithm
  bool chosen = false;                                   // it was known or timed

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (operation) cublasLtMatmulDescDestroy(operation);
    for (const cublasLtMatrixLayout_t layout : {a, b, d}) {
      if (layout) cublasLtMatrixLayoutDestroy(layout);
    }
  }
};

CublasLt::CublasLt() { LLMC_CUBLAS_CHECK(cublasLtCreate(&handle_)); }

CublasLt::~CublasLt() {
  plans_.clear();
  cublasLtDestroy(handle_);
}

void CublasLt::set_pointers(Plan& plan, const Product& product) {
  if (product.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias.data);
  if (product.bias_gradient) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias_gradient.data);
  if (product.pre) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.pre.data);
  if (product.unscale_a) set(plan.operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.unscale_a.data);
  if (product.unscale_b) set(plan.operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.unscale_b.data);
}

std::unique_ptr<CublasLt::Plan> CublasLt::make(const Kind& kind, const Product& product) {
  auto result = std::make_unique<Plan>();
  Plan& plan = *result;
  const auto compute = kind.tf32 && kind.input_a == DType::F32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  LLMC_CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, compute, CUDA_R_32F));
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, kind.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, kind.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, kind.epilogue);
  if (product.pre) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, kind.M);
  if (kind.fast_accumulation) set(plan.operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t(1));
  set_pointers(plan, product);  // the search looks at their alignment

  const auto layout = [](cublasLtMatrixLayout_t* result, DType dtype, int64_t rows, int64_t cols) {
    LLMC_CUBLAS_CHECK(cublasLtMatrixLayoutCreate(result, cuda_type(dtype), uint64_t(rows), uint64_t(cols), rows));
  };
  layout(&plan.a, kind.input_b, kind.transpose_b ? kind.K : kind.M, kind.transpose_b ? kind.M : kind.K);
  layout(&plan.b, kind.input_a, kind.transpose_a ? kind.N : kind.K, kind.transpose_a ? kind.K : kind.N);
  layout(&plan.d, kind.output, kind.M, kind.N);

  return result;
}

void CublasLt::choose_algorithms(const Algorithms& known, bool timing) {
  known_ = known;
  timing_ = timing;
  plans_.clear();
}

Algorithms CublasLt::algorithms() const {
  Algorithms result;
  for (const auto& [kind, plan] : plans_) {
    if (plan->chosen) std::memcpy(&result[kind.name()], &plan->algorithm, sizeof(Algorithm));
  }
  return result;
}

void CublasLt::choose(Plan& plan, const Kind& kind, const Product& product, const Place& place) {
  if (use_known(plan, kind, place)) return;
  const std::vector<cublasLtMatmulAlgo_t> algorithms = offered(plan, kind, timing_ ? kOffered : 1);
  if (algorithms.empty()) return;
  plan.algorithm = algorithms[0];
  if (timing_) take_fastest(plan, algorithms, product, place);
}

// False if nothing is known, or what is known is of no use here.
bool CublasLt::use_known(Plan& plan, const Kind& kind, const Place& place) {
  const auto known = known_.find(kind.name());
  if (known == known_.end()) return false;
  if (place.apart && known->second == Algorithm{}) return plan.chosen = true;  // without an algorithm
  std::memcpy(&plan.algorithm, &known->second, sizeof plan.algorithm);
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle_, plan.operation, plan.a, plan.b, plan.d, plan.d, &plan.algorithm, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kind.workspace_bytes) return false;
  plan.refusal = CUBLAS_STATUS_SUCCESS;
  plan.chosen = true;
  return true;
}

// What cuBLASLt offers for the product, best first; if nothing, plan.refusal says why.
std::vector<cublasLtMatmulAlgo_t> CublasLt::offered(Plan& plan, const Kind& kind, int most) {
  DestroyPreference guard;
  LLMC_CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&guard.preference));
  set(guard.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(kind.workspace_bytes));
  // Partial sums of a split K are added in fp32, in a fixed order: never in bf16.
  set(guard.preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(guard.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kind.alignment_b);
  set(guard.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kind.alignment_a);
  set(guard.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, kind.alignment_d);
  set(guard.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kind.alignment_d);
  std::vector<cublasLtMatmulHeuristicResult_t> results(most);
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                                               guard.preference, most, results.data(), &found);
  plan.refusal = status != CUBLAS_STATUS_SUCCESS ? status : CUBLAS_STATUS_NOT_SUPPORTED;
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; i++) {
    if (results[i].state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(results[i].algo);
  }
  if (!algorithms.empty()) plan.refusal = CUBLAS_STATUS_SUCCESS;
  return algorithms;
}

// Of those that run: what is offered may still refuse to.
void CublasLt::take_fastest(Plan& plan, const std::vector<cublasLtMatmulAlgo_t>& algorithms, const Product& product,
                            const Place& place) {
  std::vector<cublasLtMatmulAlgo_t> running;
  std::vector<std::function<void()>> ways;
  for (const cublasLtMatmulAlgo_t& algorithm : algorithms) {
    plan.refusal = multiply(plan, algorithm, product, place);
    if (plan.refusal != CUBLAS_STATUS_SUCCESS) {
      cudaGetLastError();  // the refusal stays with this call
      continue;
    }
    running.push_back(algorithm);
    ways.push_back([&, algorithm] { LLMC_CUBLAS_CHECK(multiply(plan, algorithm, product, place)); });
  }
  if (running.empty()) return;
  if (place.apart) {
    place.apart();  // its own products are timed here
    ways.push_back(place.apart);
  }
  const std::vector<float> milliseconds = median_milliseconds(ways, place.stream);
  const size_t fastest = size_t(std::min_element(milliseconds.begin(), milliseconds.end()) - milliseconds.begin());
  const size_t taken = milliseconds[fastest] < kWorthwhile * milliseconds[0] ? fastest : 0;
  const bool apart = taken == running.size();
  plan.algorithm = apart ? cublasLtMatmulAlgo_t{} : running[taken];
  plan.refusal = apart ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
  plan.chosen = true;
}

cublasStatus_t CublasLt::multiply(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
                                  const Place& place) {
  const float one = 1, beta = product.accumulate ? 1 : 0;
  return cublasLtMatmul(handle_, plan.operation, &one, product.b.data, plan.a, product.a.data, plan.b, &beta,
                        product.d.data, plan.d, product.d.data, plan.d, &algorithm, place.workspace,
                        place.workspace_bytes, place.stream);
}

bool CublasLt::run(const Product& product, bool tf32, void* workspace, size_t workspace_bytes, cudaStream_t stream,
                   const std::function<void()>& apart) {
  Kind kind;
  kind.N = product.d.rows();
  kind.M = product.d.last();
  kind.K = product.transpose_a ? product.a.rows() : product.a.last();
  kind.input_a = product.a.dtype;
  kind.input_b = product.b.dtype;
  kind.output = product.d.dtype;
  kind.transpose_a = product.transpose_a;
  kind.transpose_b = product.transpose_b;
  kind.accumulate = product.accumulate;
  kind.tf32 = tf32;
  kind.fast_accumulation = product.fast_accumulation;
  kind.epilogue = epilogue_of(product);
  kind.alignment_a = alignment_of(product.a);
  kind.alignment_b = alignment_of(product.b);
  kind.alignment_d = alignment_of(product.d);
  const Tensor bias = product.bias ? product.bias : product.bias_gradient;
  kind.alignment_bias = bias ? alignment_of(bias) : 0;
  kind.alignment_pre = product.pre ? alignment_of(product.pre) : 0;
  kind.workspace_bytes = workspace_bytes;

  // What the epilogues' vector and auxiliary matrix must be.
  if (product.bias_gradient && kind.alignment_bias < 16) return false;
  if (product.pre && (kind.M % 8 != 0 || kind.alignment_pre < 16)) return false;

  const Place place = {workspace, workspace_bytes, stream, apart};
  auto entry = plans_.find(kind);
  if (entry == plans_.end()) {
    std::unique_ptr<Plan> made = make(kind, product);
    choose(*made, kind, product, place);
    entry = plans_.emplace(kind, std::move(made)).first;
  }
  Plan& plan = *entry->second;
  if (plan.refusal != CUBLAS_STATUS_SUCCESS) {
    LLMC_CHECK(product.gelu != Product::Gelu::None || product.bias_gradient,
               "cuBLASLt has no algorithm for the product of (%" PRId64 ",%" PRId64 ") and (%" PRId64 ",%" PRId64
               ") in %s: %s",
               kind.N, kind.K, kind.K, kind.M, name_of(kind.input_a), cublasLtGetStatusString(plan.refusal));
    return false;
  }
  set_pointers(plan, product);
  LLMC_CUBLAS_CHECK(multiply(plan, plan.algorithm, product, place));
  return true;
}

}  // namespace llmc::cuda
