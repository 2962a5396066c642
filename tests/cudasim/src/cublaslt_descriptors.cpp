// Handles, descriptors and their attributes.
//
// As in the real library, setting an attribute checks its size and nothing else; whether the values go together is
// decided when they are used.
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>

#include "cublaslt.h"

namespace cudasim::cublaslt {
namespace {

// --- refusals --------------------------------------------------------------------------------------------------------

thread_local std::string last_reason;

// --- attributes ------------------------------------------------------------------------------------------------------

struct Attribute {
  int id;
  size_t offset, size;  // of the member that holds it
};

#define ATTRIBUTE(id, type, member) {id, offsetof(type, member), sizeof(type::member)}

const Attribute descriptor_attributes[] = {
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, Descriptor, compute_type),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_SCALE_TYPE, Descriptor, scale_type),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_POINTER_MODE, Descriptor, pointer_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSA, Descriptor, trans_a),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSB, Descriptor, trans_b),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSC, Descriptor, trans_c),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_FILL_MODE, Descriptor, fill_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE, Descriptor, epilogue),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_POINTER, Descriptor, bias),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, Descriptor, bias_batch_stride),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, Descriptor, bias_type),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, Descriptor, aux),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, Descriptor, aux_ld),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, Descriptor, aux_batch_stride),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, Descriptor, aux_type),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, Descriptor, sm_count_target),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_ALPHA_VECTOR_BATCH_STRIDE, Descriptor, alpha_batch_stride),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, Descriptor, a_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, Descriptor, b_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_C_SCALE_POINTER, Descriptor, c_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, Descriptor, d_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, Descriptor, d_amax),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_SCALE_POINTER, Descriptor, aux_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_AMAX_POINTER, Descriptor, aux_amax),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_FAST_ACCUM, Descriptor, fast_accumulation),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, Descriptor, a_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, Descriptor, b_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_C_SCALE_MODE, Descriptor, c_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_SCALE_MODE, Descriptor, d_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_SCALE_MODE, Descriptor, aux_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_OUT_SCALE_POINTER, Descriptor, d_out_scale),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_OUT_SCALE_MODE, Descriptor, d_out_scale_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_DESC_EMULATION_DESCRIPTOR, Descriptor, emulation),
};

const Attribute layout_attributes[] = {
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_TYPE, Layout, type),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_ORDER, Layout, order),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_ROWS, Layout, rows),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_COLS, Layout, cols),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_LD, Layout, ld),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, Layout, batch_count),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, Layout, batch_stride),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_PLANE_OFFSET, Layout, plane_offset),
    ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_BATCH_MODE, Layout, batch_mode),
};

const Attribute preference_attributes[] = {
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_SEARCH_MODE, Preference, search_mode),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, Preference, max_workspace),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, Preference, reduction_scheme_mask),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, Preference, alignment_a),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, Preference, alignment_b),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, Preference, alignment_c),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, Preference, alignment_d),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT, Preference, max_waves),
    ATTRIBUTE(CUBLASLT_MATMUL_PREF_IMPL_MASK, Preference, impl_mask),
};

template <size_t N>
const Attribute& find(const Attribute (&attributes)[N], int id) {
  for (const Attribute& attribute : attributes)
    if (attribute.id == id) return attribute;
  refuse(CUBLAS_STATUS_INVALID_VALUE, "attribute %d does not exist", id);
}

template <size_t N>
cublasStatus_t set(const Attribute (&attributes)[N], void* object, int id, const void* value, size_t bytes) {
  return answer([&] {
    if (!object || !value) refuse(CUBLAS_STATUS_INVALID_VALUE, "the %s is null", object ? "value" : "descriptor");
    const Attribute& attribute = find(attributes, id);
    if (bytes != attribute.size)
      refuse(CUBLAS_STATUS_INVALID_VALUE, "attribute %d has %zu bytes, not %zu", id, attribute.size, bytes);
    std::memcpy(static_cast<char*>(object) + attribute.offset, value, bytes);
  });
}

// bytes = 0 asks for the size.
template <size_t N>
cublasStatus_t get(const Attribute (&attributes)[N], const void* object, int id, void* value, size_t bytes,
                   size_t* written) {
  return answer([&] {
    const Attribute& attribute = find(attributes, id);
    if (!object || (bytes ? !value : !written)) refuse(CUBLAS_STATUS_INVALID_VALUE, "a pointer is null");
    if (bytes && bytes != attribute.size)
      refuse(CUBLAS_STATUS_INVALID_VALUE, "attribute %d has %zu bytes, not %zu", id, attribute.size, bytes);
    if (bytes) std::memcpy(value, static_cast<const char*>(object) + attribute.offset, bytes);
    if (written) *written = attribute.size;
  });
}

// Puts `contents` into an opaque struct of `bytes` bytes.
template <typename Contents, typename Opaque>
cublasStatus_t initialize(Opaque* opaque, size_t bytes, const Contents& contents) {
  return answer([&] {
    if (!opaque || bytes < sizeof(Opaque)) refuse(CUBLAS_STATUS_INVALID_VALUE, "no room for the descriptor");
    new (opaque) Contents(contents);
  });
}

template <typename Contents, typename Opaque>
cublasStatus_t create(Opaque** opaque, const Contents& contents) {
  return answer([&] {
    if (!opaque) refuse(CUBLAS_STATUS_INVALID_VALUE, "no place for the descriptor");
    *opaque = new Opaque();
    new (*opaque) Contents(contents);
  });
}

Descriptor make_descriptor(cublasComputeType_t compute_type, cudaDataType_t scale_type) {
  Descriptor descriptor;
  descriptor.compute_type = compute_type;
  descriptor.scale_type = scale_type;
  return descriptor;
}

Layout make_layout(cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld) {
  Layout layout;
  layout.type = type;
  layout.rows = rows;
  layout.cols = cols;
  layout.ld = ld;
  return layout;
}

std::set<cublasLtHandle_t> handles;

struct StatusText {
  cublasStatus_t status;
  const char *name, *text;
};
#define STATUS(status, text) {status, #status, text}
const StatusText status_texts[] = {
    STATUS(CUBLAS_STATUS_SUCCESS, "success"),
    STATUS(CUBLAS_STATUS_NOT_INITIALIZED, "the library was not initialized"),
    STATUS(CUBLAS_STATUS_ALLOC_FAILED, "the resource allocation failed"),
    STATUS(CUBLAS_STATUS_INVALID_VALUE, "an unsupported value or parameter was passed to the function"),
    STATUS(CUBLAS_STATUS_ARCH_MISMATCH, "the function requires an architectural feature absent from the device"),
    STATUS(CUBLAS_STATUS_MAPPING_ERROR, "an access to GPU memory space failed"),
    STATUS(CUBLAS_STATUS_EXECUTION_FAILED, "the function failed to launch on the GPU"),
    STATUS(CUBLAS_STATUS_INTERNAL_ERROR, "an internal operation failed"),
    STATUS(CUBLAS_STATUS_NOT_SUPPORTED, "the requested functionality is not supported"),
    STATUS(CUBLAS_STATUS_LICENSE_ERROR, "the license check failed"),
};
const StatusText& text_of(cublasStatus_t status) {
  static const StatusText unknown = {status, "unrecognized status", "unrecognized status"};
  for (const StatusText& text : status_texts)
    if (text.status == status) return text;
  return unknown;
}

}  // namespace

void refuse(cublasStatus_t status, const char* format, ...) {
  char reason[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  throw Refusal{status, reason};
}

cublasStatus_t answer(const std::function<void()>& body) {
  last_reason.clear();
  try {
    body();
    return CUBLAS_STATUS_SUCCESS;
  } catch (const Refusal& refusal) {
    last_reason = refusal.reason;
    const char* level = std::getenv("CUBLASLT_LOG_LEVEL");
    if (level && std::atoi(level) >= 1)
      std::fprintf(stderr, "cudasim: cuBLASLt: %s: %s\n", text_of(refusal.status).name, last_reason.c_str());
    return refusal.status;
  }
}

void check_handle(cublasLtHandle_t handle) {
  if (!handles.count(handle)) refuse(CUBLAS_STATUS_NOT_INITIALIZED, "%p is not a handle", static_cast<void*>(handle));
}

}  // namespace cudasim::cublaslt

using namespace cudasim::cublaslt;

extern "C" {

const char* cudasim_cublaslt_reason() { return last_reason.c_str(); }

// --- library ---------------------------------------------------------------------------------------------------------

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return answer([&] {
    if (!handle) refuse(CUBLAS_STATUS_INVALID_VALUE, "no place for the handle");
    *handle = reinterpret_cast<cublasLtHandle_t>(new char);
    handles.insert(*handle);
  });
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return answer([&] {
    if (!handle) refuse(CUBLAS_STATUS_INVALID_VALUE, "the handle is null");
    check_handle(handle);
    handles.erase(handle);
    delete reinterpret_cast<char*>(handle);
  });
}

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
const char* cublasLtGetStatusName(cublasStatus_t status) { return text_of(status).name; }
const char* cublasLtGetStatusString(cublasStatus_t status) { return text_of(status).text; }

// --- matmul descriptor -----------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t descriptor, size_t size,
                                               cublasComputeType_t compute_type, cudaDataType_t scale_type) {
  return initialize(descriptor, size, make_descriptor(compute_type, scale_type));
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* descriptor, cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
  return create(descriptor, make_descriptor(compute_type, scale_type));
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t descriptor) {
  delete descriptor;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  return set(descriptor_attributes, descriptor, attribute, value, bytes);
}
cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute,
                                              void* value, size_t bytes, size_t* written) {
  return get(descriptor_attributes, descriptor, attribute, value, bytes, written);
}

// --- matrix layout ---------------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size, cudaDataType_t type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
  return initialize(layout, size, make_layout(type, rows, cols, ld));
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  return create(layout, make_layout(type, rows, cols, ld));
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                size_t bytes) {
  return set(layout_attributes, layout, attribute, value, bytes);
}
cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, void* value, size_t bytes,
                                                size_t* written) {
  return get(layout_attributes, layout, attribute, value, bytes, written);
}

// --- preference ------------------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, size_t size) {
  return initialize(preference, size, Preference{});
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return create(preference, Preference{});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  return set(preference_attributes, preference, attribute, value, bytes);
}
cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, void* value,
                                                    size_t bytes, size_t* written) {
  return get(preference_attributes, preference, attribute, value, bytes, written);
}

}  // extern "C"
