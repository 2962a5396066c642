// Every rule that a call of the simulated cuBLASLt can break, from the documentation of cublasLtMatmul(), of the
// attributes in cublasLt.h, and from what one device allocation holds.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <utility>

#include "cublaslt.h"
#include "internal.h"

namespace cudasim::cublaslt {
namespace {

constexpr cublasStatus_t kInvalid = CUBLAS_STATUS_INVALID_VALUE;
constexpr cublasStatus_t kUnsupported = CUBLAS_STATUS_NOT_SUPPORTED;

// Bias and auxiliary pointers: the vectors that the fast epilogues load.
constexpr uint64_t kEpilogueAlignment = 16;
constexpr uint64_t kWorkspaceAlignment = 256;
constexpr uint64_t kFp8Alignment = 16;  // of the matrices

#define EPILOGUE(name) CUBLASLT_EPILOGUE_##name, #name
const Epilogue epilogues[] = {
    //                         bias   bias gradient  writes aux  reads aux
    {EPILOGUE(DEFAULT), false, false, false, false}, {EPILOGUE(RELU), false, false, false, false},
    {EPILOGUE(BIAS), true, false, false, false},     {EPILOGUE(RELU_BIAS), true, false, false, false},
    {EPILOGUE(GELU), false, false, false, false},    {EPILOGUE(GELU_BIAS), true, false, false, false},
    {EPILOGUE(GELU_AUX), false, false, true, false}, {EPILOGUE(GELU_AUX_BIAS), true, false, true, false},
    {EPILOGUE(DGELU), false, false, false, true},    {EPILOGUE(DGELU_BGRAD), false, true, false, true},
    {EPILOGUE(BGRADA), false, true, false, false},   {EPILOGUE(BGRADB), false, true, false, false},
};
// Of the real library; their bit masks are not simulated.
const uint32_t relu_mask_epilogues[] = {CUBLASLT_EPILOGUE_RELU_AUX, CUBLASLT_EPILOGUE_RELU_AUX_BIAS,
                                        CUBLASLT_EPILOGUE_DRELU, CUBLASLT_EPILOGUE_DRELU_BGRAD};

bool is_operation(int32_t value) { return value == CUBLAS_OP_N || value == CUBLAS_OP_T || value == CUBLAS_OP_C; }

void check_descriptor(const Descriptor& x) {
  if (x.compute_type != CUBLAS_COMPUTE_32F && x.compute_type != CUBLAS_COMPUTE_32F_FAST_TF32)
    refuse(kUnsupported, "compute type %d: 32F and 32F_FAST_TF32 are simulated", x.compute_type);
  if (x.scale_type != CUDA_R_32F)
    refuse(kUnsupported, "scale type %d: alpha and beta must be R_32F with this compute type", x.scale_type);
  if (x.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
    refuse(kUnsupported, "pointer mode %d: alpha and beta on the host are simulated", x.pointer_mode);
  if (!is_operation(x.trans_a) || !is_operation(x.trans_b))
    refuse(kInvalid, "transposes %d and %d: not values of cublasOperation_t", x.trans_a, x.trans_b);
  if (x.trans_c != CUBLAS_OP_N) refuse(kUnsupported, "C cannot be transposed");
  if (x.fill_mode != CUBLAS_FILL_MODE_FULL) refuse(kUnsupported, "fill mode %d: only FULL", x.fill_mode);
  if (x.sm_count_target < 0) refuse(kInvalid, "SM count target %d is negative", x.sm_count_target);
  if (x.fast_accumulation != 0 && x.fast_accumulation != 1)
    refuse(kInvalid, "fast accumulation is %d: it must be 0 or 1", x.fast_accumulation);
  if (x.a_scale_mode || x.b_scale_mode || x.c_scale_mode || x.d_scale_mode || x.aux_scale_mode || x.d_out_scale_mode ||
      x.alpha_batch_stride || x.c_scale || x.d_scale || x.d_out_scale || x.d_amax || x.aux_scale || x.aux_amax ||
      x.emulation)
    refuse(kUnsupported,
           "the attributes of 8-bit results, of scales of blocks, alpha vectors and emulation must keep "
           "their defaults");
}

void check_layout(const char* name, const Layout& x, bool operand) {
  if (x.type != CUDA_R_32F && x.type != CUDA_R_16BF && !(operand && is_fp8(x.type)))
    refuse(kUnsupported, "%s has type %u: R_32F and R_16BF are simulated, and as operands R_8F_E4M3 and R_8F_E5M2",
           name, x.type);
  if (x.order != CUBLASLT_ORDER_COL && x.order != CUBLASLT_ORDER_ROW)
    refuse(kUnsupported, "%s has order %d: COL and ROW are simulated", name, x.order);
  if (x.rows < 1 || x.cols < 1 || x.rows > INT32_MAX || x.cols > INT32_MAX)
    refuse(kInvalid, "%s is %zu x %zu: both must be 1 to 2^31 - 1", name, size_t{x.rows}, size_t{x.cols});
  if (x.ld < 0 || static_cast<uint64_t>(x.ld) < x.contiguous())
    refuse(kInvalid, "%s has leading dimension %lld, less than its %zu %s", name, static_cast<long long>(x.ld),
           size_t{x.contiguous()}, x.order == CUBLASLT_ORDER_ROW ? "columns" : "rows");
  if (x.batch_count < 1) refuse(kInvalid, "%s has batch count %d", name, x.batch_count);
  if (x.batch_mode != CUBLASLT_BATCH_MODE_STRIDED || x.plane_offset)
    refuse(kUnsupported, "%s: pointer-array batches and planar complex matrices are not simulated", name);
  if (x.batch_stride < 0) refuse(kInvalid, "%s has batch stride %lld", name, static_cast<long long>(x.batch_stride));
}

// What cublasLtMatmul() asks of FP8 operands on all devices that have them; Blackwell's data-centre chips ask less.
void check_fp8(const Configuration& x) {
  const Descriptor& descriptor = x.descriptor;
  if (!is_fp8(x.a.type) || !is_fp8(x.b.type))
    refuse(kUnsupported, "A and B have the types %u and %u: both must be FP8 or none", x.a.type, x.b.type);
  if (x.a.type == CUDA_R_8F_E5M2 && x.b.type == CUDA_R_8F_E5M2)
    refuse(kUnsupported, "A and B are both R_8F_E5M2: one must be R_8F_E4M3");
  if (descriptor.trans_a == CUBLAS_OP_N || descriptor.trans_b != CUBLAS_OP_N)
    refuse(kUnsupported, "FP8 needs A transposed and B not");
  for (const Layout* layout : {&x.a, &x.b, &x.c, &x.d})
    if (layout->order != CUBLASLT_ORDER_COL) refuse(kUnsupported, "FP8 needs column-major order");
  if (descriptor.compute_type != CUBLAS_COMPUTE_32F) refuse(kUnsupported, "FP8 needs compute type 32F");
  for (uint64_t dimension : {x.m, x.n, x.k})
    if (dimension % 16)
      refuse(kUnsupported, "FP8 needs dimensions that are multiples of 16, op(A)·op(B) is (%zu,%zu)·(%zu,%zu)",
             size_t{x.m}, size_t{x.k}, size_t{x.k}, size_t{x.n});
  for (const Layout* layout : {&x.a, &x.b, &x.c, &x.d})
    if (layout->ld * element_size(layout->type) % 16)
      refuse(kUnsupported, "FP8 needs leading dimensions of whole 16 bytes, one is %lld elements",
             static_cast<long long>(layout->ld));
  if (x.epilogue->bias_gradient) refuse(kUnsupported, "FP8 has no epilogue %s", x.epilogue->name);
  if (x.epilogue->value != CUBLASLT_EPILOGUE_DEFAULT && x.d.type != CUDA_R_16BF)
    refuse(kUnsupported, "epilogues of FP8 products are simulated for a result in R_16BF");
}

// "Type combinations" of cublasLtMatmul(), as far as they are simulated.
void check_types(const Configuration& x) {
  const uint32_t in = x.a.type, out = x.d.type;
  if (is_fp8(in) || is_fp8(x.b.type)) {
    check_fp8(x);
  } else if (x.descriptor.a_scale || x.descriptor.b_scale || x.descriptor.fast_accumulation) {
    refuse(kUnsupported, "scales and fast accumulation need FP8 operands");
  } else if (x.b.type != in) {
    refuse(kUnsupported, "A and B have different types (%u and %u)", in, x.b.type);
  }
  if (x.c.type != out) refuse(kUnsupported, "C and D have different types (%u and %u)", x.c.type, out);
  if (in == CUDA_R_32F && out != CUDA_R_32F) refuse(kUnsupported, "R_32F operands give an R_32F result, not %u", out);
  if (in != CUDA_R_32F && x.descriptor.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32)
    refuse(kUnsupported, "compute type 32F_FAST_TF32 needs R_32F operands");
  const int32_t bias = x.descriptor.bias_type, aux = x.descriptor.aux_type;
  if ((x.epilogue->bias || x.epilogue->bias_gradient) && bias != -1 && static_cast<uint32_t>(bias) != out)
    refuse(kUnsupported, "bias type %d: it must be that of D, %u", bias, out);
  if ((x.epilogue->writes_aux || x.epilogue->reads_aux) && aux != -1 && static_cast<uint32_t>(aux) != out)
    refuse(kUnsupported, "auxiliary type %d: it must be that of D, %u", aux, out);
}

void check_shapes(const Configuration& x) {
  const Layout &a = x.a, &b = x.b;
  const uint64_t k_of_b = x.descriptor.trans_b == CUBLAS_OP_N ? b.rows : b.cols;
  if (k_of_b != x.k)
    refuse(kInvalid, "op(A) is %zu x %zu but op(B) has %zu rows", size_t{x.m}, size_t{x.k}, size_t{k_of_b});
  const std::pair<const char*, const Layout*> results[] = {{"C", &x.c}, {"D", &x.d}};
  for (auto [name, layout] : results)
    if (layout->rows != x.m || layout->cols != x.n)
      refuse(kInvalid, "%s is %zu x %zu but op(A)·op(B) is %zu x %zu", name, size_t{layout->rows}, size_t{layout->cols},
             size_t{x.m}, size_t{x.n});
  if (x.c.order != x.d.order) refuse(kInvalid, "C and D have different orders");
  for (const Layout* layout : {&a, &b, &x.c})
    if (layout->batch_count != x.d.batch_count)
      refuse(kInvalid, "batch counts differ (%d and %d)", layout->batch_count, x.d.batch_count);
}

void check_epilogue(const Configuration& x) {
  const Epilogue& epilogue = *x.epilogue;
  const Descriptor& descriptor = x.descriptor;
  const bool batched = x.d.batch_count > 1;
  if (epilogue.value != CUBLASLT_EPILOGUE_DEFAULT && x.d.order != CUBLASLT_ORDER_COL)
    refuse(kUnsupported, "epilogue %s needs D in column-major order", epilogue.name);
  if ((epilogue.value == CUBLASLT_EPILOGUE_BGRADA || epilogue.value == CUBLASLT_EPILOGUE_BGRADB) && batched)
    refuse(kUnsupported, "epilogue %s is not simulated for batches", epilogue.name);
  if ((epilogue.bias || epilogue.bias_gradient) && descriptor.bias_batch_stride < 0)
    refuse(kInvalid, "bias batch stride %lld", static_cast<long long>(descriptor.bias_batch_stride));
  if (epilogue.writes_aux || epilogue.reads_aux) {
    const auto ld = static_cast<long long>(descriptor.aux_ld);
    const auto stride = static_cast<long long>(descriptor.aux_batch_stride);
    if (ld % 8 || ld < 0 || static_cast<uint64_t>(ld) < x.m)
      refuse(kInvalid, "auxiliary leading dimension %lld: it must be a multiple of 8 and at least the %zu rows of D",
             ld, size_t{x.m});
    if (stride % 8 || stride < 0) refuse(kInvalid, "auxiliary batch stride %lld: it must be a multiple of 8", stride);
  }
}

// The pieces of memory of a region as sorted [begin, end) pairs.
std::vector<std::pair<uintptr_t, uintptr_t>> intervals(const Region& x) {
  std::vector<std::pair<uintptr_t, uintptr_t>> result;
  const size_t size = element_size(x.layout.type);
  for (int32_t batch = 0; batch < x.layout.batch_count; batch++)
    for (uint64_t piece = 0; piece < x.layout.pieces(); piece++) {
      const uintptr_t begin =
          reinterpret_cast<uintptr_t>(x.data) + (batch * x.layout.batch_stride + piece * x.layout.ld) * size;
      result.push_back({begin, begin + x.layout.contiguous() * size});
    }
  std::sort(result.begin(), result.end());
  return result;
}

// Bytes from the first to behind the last element.
size_t span(const Layout& x) {
  const uint64_t elements = (x.batch_count - 1) * x.batch_stride + (x.pieces() - 1) * x.ld + x.contiguous();
  return elements * element_size(x.type);
}

bool overlap(const Region& x, const Region& y) {
  const char *a = static_cast<const char*>(x.data), *b = static_cast<const char*>(y.data);
  if (a + span(x.layout) <= b || b + span(y.layout) <= a) return false;
  const auto xs = intervals(x), ys = intervals(y);
  for (size_t i = 0, j = 0; i < xs.size() && j < ys.size();) {
    if (xs[i].second <= ys[j].first)
      i++;
    else if (ys[j].second <= xs[i].first)
      j++;
    else
      return true;
  }
  return false;
}

bool overlaps_itself(const Region& x) {
  const auto pieces = intervals(x);
  for (size_t i = 1; i < pieces.size(); i++)
    if (pieces[i].first < pieces[i - 1].second) return true;
  return false;
}

bool same(const Layout& x, const Layout& y) { return std::memcmp(&x, &y, sizeof x) == 0; }

void check_memory(const Call& call) {
  const std::vector<Region> all = regions(call);
  for (const Region& x : all) {
    if (!x.data) refuse(kInvalid, "the pointer of %s is null", x.name);
    if (!in_one_allocation(x.data, span(x.layout)))
      refuse(kInvalid, "%s (%zu bytes at %p) does not lie in one allocation of device memory", x.name, span(x.layout),
             x.data);
    if (x.written && overlaps_itself(x)) refuse(kInvalid, "the batches of %s overlap", x.name);
  }
  for (const Region& written : all)
    for (const Region& other : all) {
      if (!written.written || &written == &other) continue;
      const bool in_place = other.in_place && written.data == call.d;
      if (in_place && !same(call.configuration.c, call.configuration.d))
        refuse(kInvalid, "C and D share their memory but not their layout");
      if (!in_place && overlap(written, other)) refuse(kInvalid, "%s overlaps %s", written.name, other.name);
    }
  if (!call.workspace_bytes) return;
  if (!in_one_allocation(call.workspace, call.workspace_bytes))
    refuse(kInvalid, "the workspace (%zu bytes at %p) does not lie in one allocation of device memory",
           call.workspace_bytes, call.workspace);
  if (reinterpret_cast<uintptr_t>(call.workspace) % kWorkspaceAlignment)
    refuse(kInvalid, "the workspace %p is not aligned to %zu bytes", call.workspace, size_t{kWorkspaceAlignment});
  Layout layout;
  layout.rows = layout.ld = static_cast<int64_t>(call.workspace_bytes / element_size(layout.type));
  layout.cols = 1;
  for (const Region& x : all)
    if (overlap({"workspace", call.workspace, layout, true}, x)) refuse(kInvalid, "the workspace overlaps %s", x.name);
}

void check_alignment(const char* name, const void* data, uint64_t bytes, const char* why) {
  if (reinterpret_cast<uintptr_t>(data) % bytes)
    refuse(kInvalid, "%s at %p is not aligned to %zu bytes, %s", name, data, size_t{bytes}, why);
}

}  // namespace

size_t element_size(uint32_t type) { return type == CUDA_R_32F ? 4 : is_fp8(type) ? 1 : 2; }

bool is_fp8(uint32_t type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }

const Epilogue& find_epilogue(uint32_t value) {
  for (const Epilogue& epilogue : epilogues)
    if (epilogue.value == value) return epilogue;
  for (uint32_t known : relu_mask_epilogues)
    if (known == value) refuse(kUnsupported, "epilogue %u: the ReLU masks are not simulated", value);
  refuse(kInvalid, "epilogue %u does not exist", value);
}

Configuration check_configuration(cublasLtMatmulDesc_t descriptor, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
  if (!descriptor || !a || !b || !c || !d) refuse(kInvalid, "a descriptor or layout is null");
  Configuration x;
  x.descriptor = contents(descriptor);
  x.a = contents(a);
  x.b = contents(b);
  x.c = contents(c);
  x.d = contents(d);
  check_descriptor(x.descriptor);
  check_layout("A", x.a, true);
  check_layout("B", x.b, true);
  check_layout("C", x.c, false);
  check_layout("D", x.d, false);
  const bool trans_a = x.descriptor.trans_a != CUBLAS_OP_N, trans_b = x.descriptor.trans_b != CUBLAS_OP_N;
  x.m = trans_a ? x.a.cols : x.a.rows;
  x.k = trans_a ? x.a.rows : x.a.cols;
  x.n = trans_b ? x.b.rows : x.b.cols;
  x.epilogue = &find_epilogue(x.descriptor.epilogue);
  check_shapes(x);
  check_types(x);
  check_epilogue(x);
  return x;
}

bool names_epilogue(const char* variable, const Epilogue& epilogue) {
  const char* list = std::getenv(variable);
  std::stringstream names(list ? list : "");
  bool found = false;
  for (std::string name; std::getline(names, name, ',');) {
    const bool known = std::any_of(std::begin(epilogues), std::end(epilogues), [&](auto& x) { return x.name == name; });
    if (!known) refuse(kInvalid, "%s names %s, which is not an epilogue", variable, name.c_str());
    found = found || epilogue.name == name;
  }
  return found;
}

void check_available(const Configuration& configuration) {
  const Epilogue& epilogue = *configuration.epilogue;
  if (names_epilogue("CUDASIM_CUBLASLT_WITHOUT", epilogue))
    refuse(kUnsupported, "CUDASIM_CUBLASLT_WITHOUT names the epilogue %s", epilogue.name);
}

Layout Configuration::bias_layout() const {
  Layout layout = d;
  layout.rows = epilogue->value == CUBLASLT_EPILOGUE_BGRADB ? n : m;
  layout.cols = 1;
  layout.ld = static_cast<int64_t>(layout.rows);
  layout.batch_stride = descriptor.bias_batch_stride;
  return layout;
}

Layout Configuration::aux_layout() const {
  Layout layout = d;
  layout.ld = descriptor.aux_ld;
  layout.batch_stride = descriptor.aux_batch_stride;
  return layout;
}

uint64_t Configuration::hash() const {
  std::vector<int64_t> numbers = {descriptor.compute_type, descriptor.trans_a, descriptor.trans_b,
                                  static_cast<int64_t>(epilogue->value), descriptor.fast_accumulation};
  for (const Layout* x : {&a, &b, &c, &d}) {
    const auto rows = static_cast<int64_t>(x->rows), cols = static_cast<int64_t>(x->cols);
    numbers.insert(numbers.end(), {x->type, x->order, rows, cols, x->ld, x->batch_count, x->batch_stride});
  }
  if (epilogue->writes_aux || epilogue->reads_aux)
    numbers.insert(numbers.end(), {descriptor.aux_ld, descriptor.aux_batch_stride});
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a number at a time
  for (int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3u;
  return hash;
}

std::vector<Region> regions(const Call& call) {
  const Configuration& x = call.configuration;
  const Epilogue& epilogue = *x.epilogue;
  std::vector<Region> result = {{"A", call.a, x.a, false}, {"B", call.b, x.b, false}};
  if (call.beta != 0) result.push_back({"C", call.c, x.c, false, call.c == call.d});
  Layout scale;
  scale.rows = scale.cols = scale.ld = 1;
  if (x.descriptor.a_scale) result.push_back({"the scale of A", x.descriptor.a_scale, scale, false});
  if (x.descriptor.b_scale) result.push_back({"the scale of B", x.descriptor.b_scale, scale, false});
  if (epilogue.bias) result.push_back({"bias", x.descriptor.bias, x.bias_layout(), false});
  if (epilogue.reads_aux) result.push_back({"auxiliary matrix", x.descriptor.aux, x.aux_layout(), false});
  if (epilogue.writes_aux) result.push_back({"auxiliary matrix", x.descriptor.aux, x.aux_layout(), true});
  if (epilogue.bias_gradient) result.push_back({"bias gradient", x.descriptor.bias, x.bias_layout(), true});
  result.push_back({"D", call.d, x.d, true});
  return result;
}

void check_call(const Call& call, const Algorithm* algorithm, size_t workspace_given) {
  const Configuration& x = call.configuration;
  if (algorithm) {
    if (algorithm->configuration != x.hash()) refuse(kInvalid, "the algorithm was returned for another configuration");
    if (workspace_given < algorithm->workspace)
      refuse(kInvalid, "the algorithm needs %zu bytes of workspace, not %zu", size_t{algorithm->workspace},
             workspace_given);
  }
  check_memory(call);
  const char* why = algorithm ? "which the query for the algorithm assumed" : "the size of its elements";
  const bool fp8 = is_fp8(x.a.type);
  if (fp8 && !algorithm) why = "which FP8 needs";
  const auto needed = [&](const Layout& layout, uint32_t assumed) {
    return std::max<uint64_t>({algorithm ? assumed : 1, element_size(layout.type), fp8 ? kFp8Alignment : 1});
  };
  const Algorithm none = {};
  const Algorithm& assumed = algorithm ? *algorithm : none;
  check_alignment("A", call.a, needed(x.a, assumed.alignment_a), why);
  check_alignment("B", call.b, needed(x.b, assumed.alignment_b), why);
  if (call.beta != 0) check_alignment("C", call.c, needed(x.c, assumed.alignment_c), why);
  check_alignment("D", call.d, needed(x.d, assumed.alignment_d), why);
  const char* epilogue_why = "which the epilogues need";
  if (x.epilogue->bias || x.epilogue->bias_gradient)
    check_alignment("the bias vector", x.descriptor.bias, kEpilogueAlignment, epilogue_why);
  if (x.epilogue->writes_aux || x.epilogue->reads_aux)
    check_alignment("the auxiliary matrix", x.descriptor.aux, kEpilogueAlignment, epilogue_why);
}

}  // namespace cudasim::cublaslt
