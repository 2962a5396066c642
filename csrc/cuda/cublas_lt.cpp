#include "cuda/cublas_lt.h"

#include <algorithm>
#include <cinttypes>
#include <tuple>

#include "cuda/check.h"

namespace llmc::cuda {
namespace {

cudaDataType_t cuda_type(DType dtype) { return dtype == DType::F32 ? CUDA_R_32F : CUDA_R_16BF; }

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

// Not BGRADB for the bias gradient: with beta = 1 it would still overwrite the bias.
cublasLtEpilogue_t epilogue_of(const Product& product) {
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
  DType input, output;
  bool transpose_a, transpose_b, accumulate, tf32;
  cublasLtEpilogue_t epilogue;
  uint32_t alignment_a, alignment_b, alignment_d, alignment_bias, alignment_pre;
  size_t workspace_bytes;

  auto all() const {
    return std::tie(N, M, K, input, output, transpose_a, transpose_b, accumulate, tf32, epilogue, alignment_a,
                    alignment_b, alignment_d, alignment_bias, alignment_pre, workspace_bytes);
  }
  bool operator<(const Kind& other) const { return all() < other.all(); }
};

// "A" and "B" are cuBLASLt's here: its A is our b.
struct CublasLt::Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulHeuristicResult_t algorithm{};
  cublasStatus_t refusal = CUBLAS_STATUS_NOT_SUPPORTED;  // success: there is an algorithm

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
  if (product.pre) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.pre.data);
}

std::unique_ptr<CublasLt::Plan> CublasLt::make(const Kind& kind, const Product& product) {
  auto result = std::make_unique<Plan>();
  Plan& plan = *result;
  const auto compute = kind.tf32 && kind.input == DType::F32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  LLMC_CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, compute, CUDA_R_32F));
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, kind.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, kind.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, kind.epilogue);
  if (product.pre) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, kind.M);
  set_pointers(plan, product);  // the search looks at their alignment

  const auto layout = [](cublasLtMatrixLayout_t* result, DType dtype, int64_t rows, int64_t cols) {
    LLMC_CUBLAS_CHECK(cublasLtMatrixLayoutCreate(result, cuda_type(dtype), uint64_t(rows), uint64_t(cols), rows));
  };
  layout(&plan.a, kind.input, kind.transpose_b ? kind.K : kind.M, kind.transpose_b ? kind.M : kind.K);
  layout(&plan.b, kind.input, kind.transpose_a ? kind.N : kind.K, kind.transpose_a ? kind.K : kind.N);
  layout(&plan.d, kind.output, kind.M, kind.N);

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
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                                               guard.preference, 1, &plan.algorithm, &found);
  plan.refusal = status != CUBLAS_STATUS_SUCCESS ? status
                 : found > 0                     ? plan.algorithm.state
                                                 : CUBLAS_STATUS_NOT_SUPPORTED;
  return result;
}

bool CublasLt::run(const Product& product, bool tf32, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  Kind kind;
  kind.N = product.d.rows();
  kind.M = product.d.last();
  kind.K = product.transpose_a ? product.a.rows() : product.a.last();
  kind.input = product.a.dtype;
  kind.output = product.d.dtype;
  kind.transpose_a = product.transpose_a;
  kind.transpose_b = product.transpose_b;
  kind.accumulate = product.accumulate;
  kind.tf32 = tf32;
  kind.epilogue = epilogue_of(product);
  kind.alignment_a = alignment_of(product.a);
  kind.alignment_b = alignment_of(product.b);
  kind.alignment_d = alignment_of(product.d);
  kind.alignment_bias = product.bias ? alignment_of(product.bias) : 0;
  kind.alignment_pre = product.pre ? alignment_of(product.pre) : 0;
  kind.workspace_bytes = workspace_bytes;

  // What the epilogue's auxiliary matrix must be.
  if (product.pre && (kind.M % 8 != 0 || kind.alignment_pre < 16)) return false;

  auto entry = plans_.find(kind);
  if (entry == plans_.end()) entry = plans_.emplace(kind, make(kind, product)).first;
  Plan& plan = *entry->second;
  if (plan.refusal != CUBLAS_STATUS_SUCCESS) {
    LLMC_CHECK(product.gelu != Product::Gelu::None,
               "cuBLASLt has no algorithm for the product of (%" PRId64 ",%" PRId64 ") and (%" PRId64 ",%" PRId64
               ") in %s: %s",
               kind.N, kind.K, kind.K, kind.M, name_of(kind.input), cublasLtGetStatusString(plan.refusal));
    return false;
  }
  set_pointers(plan, product);
  const float one = 1, beta = product.accumulate ? 1 : 0;
  LLMC_CUBLAS_CHECK(cublasLtMatmul(handle_, plan.operation, &one, product.b.data, plan.a, product.a.data, plan.b, &beta,
                                   product.d.data, plan.d, product.d.data, plan.d, &plan.algorithm.algo, workspace,
                                   workspace_bytes, stream));
  return true;
}

}  // namespace llmc::cuda
