// The simulated cuBLASLt: what its parts share.
//   cublaslt_descriptors.cpp   handles, descriptors and their attributes
//   cublaslt_validation.cpp    every rule that a call can break
//   cublaslt_matmul.cpp        heuristics, cublasLtMatmul and its epilogues
//   cublaslt_product.cpp       the fp32 product of two packed matrices
// It computes D = epilogue(alpha·op(A)·op(B) + beta·C) for fp32, bf16 and FP8 operands with fp32 accumulation, those of
// FP8 times their scales, and refuses what the real library documents as wrong, and what the simulator does not compute.
// A refused call gives the status of the real library; the reason goes to stderr where CUBLASLT_LOG_LEVEL is 1 or more (as
// in the real library), and a refused cublasLtMatmul, which a program never does on purpose, is reported as an error of
// kind "cublaslt".
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cudasim::cublaslt {

// --- descriptors: the contents of the opaque structs of cublasLt.h ---------------------------------------------------

struct Descriptor {
  int32_t compute_type = CUBLAS_COMPUTE_32F;
  int32_t scale_type = CUDA_R_32F;
  int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
  int32_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N, trans_c = CUBLAS_OP_N;
  int32_t fill_mode = CUBLAS_FILL_MODE_FULL;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void* bias = nullptr;
  int64_t bias_batch_stride = 0;
  int32_t bias_type = -1;  // -1: the type of D
  int32_t aux_type = -1;
  void* aux = nullptr;
  int64_t aux_ld = 0, aux_batch_stride = 0;
  int32_t sm_count_target = 0;
  int8_t fast_accumulation = 0;                        // of FP8 only, and not simulated: sums are those of fp32
  const float *a_scale = nullptr, *b_scale = nullptr;  // of FP8 only; null: 1
  // Accepted by the real library, not simulated: they must keep their defaults.
  int32_t a_scale_mode = 0, b_scale_mode = 0, c_scale_mode = 0, d_scale_mode = 0, aux_scale_mode = 0;
  int32_t d_out_scale_mode = 0;
  int64_t alpha_batch_stride = 0;
  void *c_scale = nullptr, *d_scale = nullptr, *d_out_scale = nullptr;
  void *d_amax = nullptr, *aux_scale = nullptr, *aux_amax = nullptr, *emulation = nullptr;
};
static_assert(sizeof(Descriptor) <= sizeof(cublasLtMatmulDescOpaque_t), "stored in the opaque struct");

struct Layout {
  uint32_t type = CUDA_R_32F;
  int32_t order = CUBLASLT_ORDER_COL;
  uint64_t rows = 0, cols = 0;
  int64_t ld = 0;
  int32_t batch_count = 1;
  uint32_t batch_mode = CUBLASLT_BATCH_MODE_STRIDED;
  int64_t batch_stride = 0;
  int64_t plane_offset = 0;

  uint64_t contiguous() const { return order == CUBLASLT_ORDER_ROW ? cols : rows; }  // length of one piece of memory
  uint64_t pieces() const { return order == CUBLASLT_ORDER_ROW ? rows : cols; }      // ... of which there are so many
};
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "stored in the opaque struct");

struct Preference {
  uint32_t search_mode = CUBLASLT_SEARCH_BEST_FIT;
  uint32_t reduction_scheme_mask = CUBLASLT_REDUCTION_SCHEME_MASK;
  uint64_t max_workspace = 0;
  uint32_t alignment_a = 256, alignment_b = 256, alignment_c = 256, alignment_d = 256;
  float max_waves = 0;
  uint64_t impl_mask = ~uint64_t{0};
};
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t), "stored in the opaque struct");

inline const Descriptor& contents(cublasLtMatmulDesc_t x) { return *reinterpret_cast<const Descriptor*>(x); }
inline const Layout& contents(cublasLtMatrixLayout_t x) { return *reinterpret_cast<const Layout*>(x); }
inline const Preference& contents(cublasLtMatmulPreference_t x) { return *reinterpret_cast<const Preference*>(x); }

// What cublasLtMatmulAlgo_t holds. Plain numbers: it may be saved and restored.
struct Algorithm {
  uint64_t number;         // which one
  uint64_t configuration;  // Configuration::hash() of the query that returned it
  uint64_t workspace;      // bytes
  uint32_t alignment_a, alignment_b, alignment_c, alignment_d;
  uint64_t checksum;
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t), "stored in the opaque struct");

// --- refusals --------------------------------------------------------------------------------------------------------

struct Refusal {
  cublasStatus_t status;
  std::string reason;
};

// Throws Refusal with the printf-formatted reason.
[[noreturn]] void refuse(cublasStatus_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The status of an entry point: what `body` throws, or success. The reason is kept and logged as said above.
cublasStatus_t answer(const std::function<void()>& body);

void check_handle(cublasLtHandle_t handle);  // refuses what cublasLtCreate did not return or cublasLtDestroy ended

// --- one matrix product ----------------------------------------------------------------------------------------------

// Which parts an epilogue has.
struct Epilogue {
  uint32_t value;
  const char* name;
  bool bias;           // adds the bias vector (m)
  bool bias_gradient;  // writes the bias vector: m elements, for BGRADB n
  bool writes_aux, reads_aux;
};
// Refuses an unknown or not simulated value.
const Epilogue& find_epilogue(uint32_t value);

// The operation and its matrices, without their addresses.
struct Configuration {
  Descriptor descriptor;
  Layout a, b, c, d;
  const Epilogue* epilogue;
  uint64_t m, n, k;  // D is (m,n), op(A) (m,k), op(B) (k,n)

  uint64_t hash() const;
  Layout bias_layout() const;
  Layout aux_layout() const;
};
// Refuses what can be seen without addresses.
Configuration check_configuration(cublasLtMatmulDesc_t descriptor, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d);
// Refuses epilogues that the environment variable CUDASIM_CUBLASLT_WITHOUT names ("DGELU,GELU_AUX_BIAS"), so that a
// caller's fallback can be tested.
void check_available(const Configuration& configuration);
// Whether a list of epilogues ("DGELU,GELU_AUX_BIAS", or null) in an environment variable has this one. Refuses other names.
bool names_epilogue(const char* variable, const Epilogue& epilogue);

struct Call {
  Configuration configuration;
  float alpha, beta;
  const void *a, *b, *c;
  void* d;
  void* workspace;
  size_t workspace_bytes;  // that the algorithm uses
  uint64_t algorithm;      // its number
  double milliseconds;     // that it takes on the simulated clock
};
// Refuses wrong addresses. algorithm may be null.
void check_call(const Call& call, const Algorithm* algorithm, size_t workspace_given);

// One matrix or vector of a call in memory.
struct Region {
  const char* name;
  const void* data;
  Layout layout;
  bool written;
  bool in_place = false;  // C in the memory of D
};
// Everything that the call reads and writes, except the workspace.
std::vector<Region> regions(const Call& call);

size_t element_size(uint32_t type);  // 1, 2 or 4 bytes
bool is_fp8(uint32_t type);

// --- the product -----------------------------------------------------------------------------------------------------

constexpr int64_t kPanelA = 16, kPanelB = 6;  // rows of op(A), columns of op(B) in one packed panel

// A matrix of fp32, bf16 or FP8 elements with any two strides; also the transpose of one.
struct View {
  const void* data;
  uint32_t type;
  int64_t row_stride, col_stride;  // elements
};

// x (rows,k) as fp32 in panels of `height` rows: element (i,p) is packed[(i / height · k + p)·height + i % height]. The
// last panel is padded with zero rows. tf32: values are rounded to TF32.
std::vector<float> pack(const View& x, int64_t rows, int64_t k, int64_t height, bool tf32);

// sum (m,n) = a·b, column-major; a (m,k) is packed with kPanelA, bᵀ (n,k) with kPanelB.
// The leading dimension of sum is m rounded up to kPanelA, it has n rounded up to kPanelB columns.
// The order of the additions depends on the shape alone. Only the part [begin, end) of k is added.
std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b, int64_t m, int64_t n, int64_t k,
                            int64_t begin, int64_t end);

}  // namespace cudasim::cublaslt

// For tests: why the last call of this thread was refused; empty if it was not.
extern "C" const char* cudasim_cublaslt_reason();
