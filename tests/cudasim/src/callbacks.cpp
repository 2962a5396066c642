// The functions that GCC's -fsanitize=thread,bounds,alignment calls: instead of libtsan and libubsan, the checker.
#include <cstring>

#include "checker.h"

using namespace cudasim;

namespace {

void check_aligned(const volatile void* p, size_t bytes, AccessKind kind, const void* pc) {
  if (current_thread && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    report_site("misaligned", Site{pc, nullptr, 0}, nullptr, "access of %zu bytes to %p", bytes,
                const_cast<const void*>(p));
    fail_kernel(cudaErrorMisalignedAddress);
  }
  check_access(p, bytes, kind, pc);
}

// Layouts of GCC's libsanitizer/ubsan/ubsan_value.h and ubsan_handlers.h.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};
struct TypeMismatchData {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char check_kind;
};
struct OutOfBoundsData {
  SourceLocation location;
  const void* array_type;
  const void* index_type;
};

}  // namespace

extern "C" {

void __tsan_init() { start_checking(); }

#define CUDASIM_CALLBACKS(bytes)                                                                                 \
  void __tsan_read##bytes(void* p) { check_aligned(p, bytes, AccessKind::Read, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { check_aligned(p, bytes, AccessKind::Write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                                   \
    check_access(p, bytes, AccessKind::Read, __builtin_return_address(0));                                       \
  }                                                                                                              \
  void __tsan_unaligned_write##bytes(void* p) {                                                                  \
    check_access(p, bytes, AccessKind::Write, __builtin_return_address(0));                                      \
  }
CUDASIM_CALLBACKS(1)
CUDASIM_CALLBACKS(2)
CUDASIM_CALLBACKS(4)
CUDASIM_CALLBACKS(8)
CUDASIM_CALLBACKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  if (bytes > 0) check_access(p, bytes, AccessKind::Read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  if (bytes > 0) check_access(p, bytes, AccessKind::Write, __builtin_return_address(0));
}

// Host code in the same files.
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define CUDASIM_HOST_ATOMICS(bits, type)                                                                        \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                                         \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                             \
  type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) {                                      \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type value, int) {                                     \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type value, int) {                                     \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                             \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* expected, type value, int, int) {  \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }
CUDASIM_HOST_ATOMICS(8, uint8_t)
CUDASIM_HOST_ATOMICS(32, uint32_t)
CUDASIM_HOST_ATOMICS(64, uint64_t)

void __ubsan_handle_type_mismatch_v1(TypeMismatchData* data, uintptr_t address) {
  report_at("misaligned", data->location.file, int(data->location.line), "address 0x%zx is not a multiple of %u",
            size_t(address), 1u << data->log_alignment);
  if (in_kernel()) fail_kernel(cudaErrorMisalignedAddress);
}

void __ubsan_handle_out_of_bounds(OutOfBoundsData* data, uintptr_t index) {
  report_at("out-of-bounds", data->location.file, int(data->location.line), "index %ld of an array", long(index));
  if (in_kernel()) fail_kernel(cudaErrorIllegalAddress);
}

}  // extern "C"
